"""Some rows of a job beside their answers, for people to look at, also while the job runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from heapq import nsmallest
from itertools import chain, islice
from typing import Any

from batchrun.jobs.errors import InputError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.journal.journal import READ, Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.output.result_reader import ResultReader
from batchrun.jobs.rows.formats import FORMATS
from batchrun.jobs.rows.jsontext import encode
from batchrun.jobs.rows.row import Chunk
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.rows.store import Noted, unnoted
from batchrun.jobs.spec import JobSpec
from batchrun.prompts.messages import CHAT_COLUMNS, PromptError, read_messages
from batchrun.prompts.template import Template

_CHANGED = "the row is not the one that the job read: the input has changed"
_UNREAD = "the input ends before this row: it has changed"


@dataclass(frozen=True)
class Example:
    """One sample of a row.

    Args:
        row: Its number in the input, from 0.
        prompt: What it asked: its text, the filled template, or the last user message of a chat.
            None if the row has no such text, or is no longer there.
        answer: The completion; None if the row has none.
        error: Why the row failed or was left out; None if it is fine.
        finish_reason: Why the answer ended.
        sample: Its number among those of the row in the output, from 0.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the answer.
        status: `ok`, `error` or `skipped`.
        unread: Why the row can't be shown as it was computed; None if its prompt is proven.
    """

    row: int
    prompt: str | None
    answer: str | None
    error: str | None
    finish_reason: str | None
    sample: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: str = "ok"
    unread: str | None = None


def examples(
    job: JobFolder,
    count: int | None,
    *,
    failed: bool = False,
    seed: int | None = None,
    rows: Sequence[range] = (),
    noted: Noted = unnoted,
    unread: str | None = None,
) -> list[Example]:
    """Finished rows of a job, in row order, with their prompts read from its input.

    A prompt is shown only if the journal's digest proves that the row is the one computed. The
    input is streamed up to the last of these rows.

    Args:
        job: The job, finished or not.
        count: How many rows at most; None for all.
        failed: Only failed rows, and of these only the failed samples.
        seed: Choose them at random; the same seed chooses the same rows. Default: the first ones.
        rows: Only rows of these ranges.
        noted: Told what is read of the input, as it may crash the process.
        unread: Leave the input alone, and give this as the reason.

    Raises:
        JobError: The job or its journal is damaged. An input that is gone or has changed is no
            error: see `Example.unread`.
    """
    spec = job.spec()
    with job.journal() as journal:
        chosen = _chosen(journal, count, failed=failed, seed=seed, rows=rows)
        found = [e for row in chosen for e in _samples(spec, journal, row, failed=failed)]
        if unread is not None:
            return [replace(example, unread=unread) for example in found]
        prompts = _prompts(spec, journal, {e.row for e in found}, noted)
    return [
        replace(example, prompt=prompts[example.row][0], unread=prompts[example.row][1])
        for example in found
    ]


def _chosen(
    journal: Journal, count: int | None, *, failed: bool, seed: int | None, rows: Sequence[range]
) -> list[int]:
    """The numbers of the rows to show, in order, each once."""
    spans = [journal.finished(span, failed=failed) for span in rows]
    found = chain(*spans) if rows else journal.finished(failed=failed)
    if seed is None:
        return sorted(set(islice(_once(found), count)))

    def place(row: int) -> bytes:
        return blake2b(f"{seed} {row}".encode(), digest_size=8).digest()

    distinct = _once(found)
    return sorted(distinct if count is None else nsmallest(count, distinct, key=place))


def _once(rows: Iterator[int]) -> Iterator[int]:
    seen: set[int] = set()
    for row in rows:
        if row not in seen:
            seen.add(row)
            yield row


def _samples(spec: JobSpec, journal: Journal, row: int, *, failed: bool) -> list[Example]:
    """A row's samples as the output has them; with `failed`, those that failed."""
    results = journal.results(range(row, row + 1), skip_damaged=True)
    taken = ResultReader(results, spec.n, True, None if failed else spec.keep).take(row)
    return [_example(result) for result in taken if result.status == "error" or not failed]


def _example(result: Result) -> Example:
    answered = result.status == "ok"
    return Example(
        row=result.row,
        prompt=None,
        answer=result.text if answered else None,
        error=result.error,
        finish_reason=result.finish_reason,
        sample=result.sample,
        prompt_tokens=result.prompt_tokens,
        completion_tokens=result.completion_tokens,
        status=result.status,
    )


def _prompts(
    spec: JobSpec, journal: Journal, rows: set[int], noted: Noted
) -> dict[int, tuple[str | None, str | None]]:
    """By row its prompt, and why it can't be shown."""
    found: dict[int, tuple[str | None, str | None]] = {}
    missing, columns = _UNREAD, journal.meta(READ) or []
    prompt = _prompt_of(spec)
    try:
        for chunk in _input(spec, columns, rows, noted):
            if any(row in rows for row in range(chunk.first, chunk.first + chunk.num_rows)):
                was = journal.digests(chunk.first, chunk.num_rows)
                for row in (r for r in chunk.rows() if r.index in rows):
                    same = was.get(row.index) == row.digest
                    found[row.index] = (prompt(row.fields), None) if same else (None, _CHANGED)
    except InputError as error:
        missing = str(error)
    return {row: found.get(row, (None, missing)) for row in rows}


def _input(spec: JobSpec, columns: Sequence[str], rows: set[int], noted: Noted) -> Iterator[Chunk]:
    """The input's chunks up to the last of these rows: only the columns that digests cover."""
    if not rows:
        return
    source = open_source(spec.parts, spec.input_format, noted=noted)
    yield from source.chunks(columns or None, max(rows) + 1)


def _prompt_of(spec: JobSpec) -> Callable[[Mapping[str, Any]], str | None]:
    """A function that returns the text of a row's prompt, or None if it has none."""
    said, columnar = spec.prompt, FORMATS[spec.input_format].columnar
    template = Template(said.template) if said.template is not None else None

    def prompt(fields: Mapping[str, Any]) -> str | None:
        if template is not None:
            values = {name: fields.get(name) for name in template.columns}
            return None if None in values.values() else template.fill(values, encode)
        value = fields.get(said.column or "prompt")
        if value is None or (isinstance(value, str) and said.column not in CHAT_COLUMNS):
            return value
        try:
            return _last_asked(read_messages(value, columnar=columnar))
        except (PromptError, RecursionError):
            return value if isinstance(value, str) else encode(value)

    return prompt


def _last_asked(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of the last user message; of a chat without one, that of the last message."""
    asked = [m for m in messages if m["role"] == "user"] or messages
    content = asked[-1].get("content")
    return content if content is None or isinstance(content, str) else "\n".join(content)
