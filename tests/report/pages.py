"""Reads a page as strictly as XML, and makes jobs to be reported on."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.journal.results import Result
from batchrun.jobs.journal.schema import SETUP
from batchrun.jobs.metrics import recorded
from batchrun.jobs.rows.source import open_source

_VOID = {"meta", "path", "br", "hr"}
GIB = 1 << 30


class Page(HTMLParser):
    """A page's elements and its text.

    Attributes:
        elements: Name and attributes of each.
        text: What people read, elements apart by a space, and every run of blanks as one.
        style: The style sheet.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.elements = html, []
        self._open: list[str] = []
        self._texts: list[str] = []
        self.style = ""
        assert html.lstrip().startswith("<!doctype html>")
        self.feed(html)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), attrs
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _VOID
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            self.style += data
        else:
            self._texts.append(data)

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]


def figures(at: float, **more: Any) -> dict[str, Any]:
    """What a run has measured after so many seconds of which one loaded the model."""
    tokens = int(100 * max(0.0, at - 1))
    found = {"wall_s": at, "load_s": 1.0, "engine_s": at - 1, "steps": int(10 * at), "rss": 3 << 20}
    found |= {"generated_tokens": tokens, "decode_tokens": tokens, "prefill_tokens": tokens // 2}
    found |= {"decode_s": at / 2, "prefill_s": at / 4, "completion_tokens": tokens}
    found |= {"running": 4, "waiting": 2, "kv_s": at, "sequence_s": 3 * at, "max_num_seqs": 8}
    for scale, name in enumerate(("live", "mapped", "shared", "paged", "static", "reserved"), 1):
        found |= {f"kv_{name}": scale << 20, f"kv_{name}_s": at * (scale << 20)}
        found[f"peak_kv_{name}"] = scale << 20
    return recorded({**found, "model": "tiny", "device": "cpu", **more})


def answer(row: int, text: str = "fine", sample: int = 0, **more: Any) -> Result:
    """An answered sample."""
    told = {"prompt_tokens": 5, "completion_tokens": 3, "finish_reason": "stop", **more}
    times = {"queue_s": 0.5, "prefill_s": 0.25, "decode_s": 2.0}
    return Result(row, sample, "ok", text, (1, 2, 3), **{**times, **told})


def failure(row: int, error: str = "it is too long", kind: str = "prompt_too_long") -> Result:
    """A row that failed."""
    return Result(row, 0, "error", error=error, error_kind=kind)


def run(
    job: JobFolder,
    results: list[Result],
    state: str | None = "done",
    seconds: float = 20.0,
    reason: str | None = None,
    **more: Any,
) -> None:
    """A run of the job, with a sample every two seconds; in the end it has these results."""
    spec = job.spec()
    source = open_source(spec.parts, spec.input_format)
    with job.journal(readonly=False) as journal:
        number = journal.begin_run()
        setup = {"versions": {"batchrun": "1.2.3"}, "cpu": "a processor", "cores": 2}
        setup |= {"memory": GIB, "gpus": [], "driver": None, "system": "Linux"}
        journal.set_meta(SETUP.format(number), setup)
        journal.set_meta("rows_total", source.count())
        journal.set_meta("columns_read", ["prompt"])
        known = set(journal.digests(0, 1000))
        rows = [(row.index, row.digest) for row in source.rows(["prompt"])]
        journal.write([], digests=[each for each in rows if each[0] not in known])
        for at in range(2, int(seconds), 2):
            journal.write([], figures(at, **more))
        last = figures(seconds, completions=len(results), **more)
        journal.write(results, last)
        if state is not None:
            journal.end_run(state, last, reason)
