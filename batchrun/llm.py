"""A model in this process, for loops in a notebook: prompts in, results out, nothing kept."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchrun.jobs.errors import InputError
from batchrun.jobs.folder import home
from batchrun.jobs.journal.results import DoneSet, Result
from batchrun.jobs.kinds import MODEL, PROMPT, RUNNING, SAMPLING, SCORES, SHAPE
from batchrun.jobs.options import ModelSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output.result_reader import ResultReader
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.rows.store import Part
from batchrun.jobs.spec import JobSpec
from batchrun.notebook import Bar
from batchrun.platforms import need_linux
from batchrun.runner.chat_columns import usual_column
from batchrun.runner.drive import Drive
from batchrun.runner.opening import open_runtime
from batchrun.runner.reader import Reader
from batchrun.specs import part_of, read_options, runtime_of, sampling_of, with_model
from batchrun.submission import as_lines, table_of

if TYPE_CHECKING:  # imports torch
    from batchrun.engine.build import Assembly

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
_log = logging.getLogger("batchrun").info
_SHOWN_AFTER_S = 2.0  # a loop of short calls has no bar for each


class LLM:
    """A model, loaded once, in the engine that jobs use. Close it to free its memory.

    Args:
        model: Alias, folder, `.gguf` file, the URL of either in an object store, or hub id.
        log: Called with each line that a user should see.
        options: As `batchrun submit --help` names them, with underscores; sampling options are
            defaults for `generate`.

    Raises:
        OptionError: An option is unknown or has an invalid value.
        ModelError: The model can't be used.
        MachineError: This is not Linux.
    """

    def __init__(
        self, model: str | None = None, *, log: Callable[[str], None] = _log, **options: Any
    ) -> None:
        need_linux()
        self._options, self._log = {"model": model, **options}, log
        asked = read_options(self._options, MODEL, PROMPT, SAMPLING, SHAPE, SCORES, RUNNING)
        sampling_of(asked)
        prompt, named = part_of(PromptSpec, asked), part_of(ModelSpec, asked)
        runtime = runtime_of(asked)
        unmodelled = JobSpec((), "jsonl", prompt, named, SamplingSpec(), runtime=runtime)
        self._spec = with_model(unmodelled, home(), log)
        self._runtime: Assembly | None = open_runtime(self._spec, log)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        progress: bool | None = None,
        **sampling: Any,
    ) -> list[Result]:
        """The results of all prompts, in order; if one failed, its `error` says why.

        Args:
            prompts: One or more. Each is text, a chat (a list of messages), or a row (a dict),
                whose columns mean the same as in a file: `prompt` or `messages`, fields of a
                template, its own sampling parameters. A table or DataFrame has a prompt per row.
            progress: Whether to show a progress bar; by default in a notebook, and where stderr is
                a terminal, once it has taken some seconds.
            sampling: Sampling options for these prompts. With `n` above 1 a prompt has that many
                successive results, numbered by `row` and `sample`.

        Raises:
            OptionError: An option is unknown or has an invalid value.
            InputError: A prompt has a value that can't be written as JSON.
        """
        read_options(sampling, SAMPLING, SHAPE, SCORES)
        options = read_options({**self._options, **sampling})
        best_of, n = options["best_of"], options["n"]
        spec = replace(
            self._spec,
            sampling=sampling_of(options),
            seed=options["seed"],
            n=best_of or n,
            keep=n if best_of else None,
        )
        rows = [self._fields(prompt) for prompt in self._listed(prompts)][: options["limit"]]
        lines = as_lines(rows)
        if self._runtime is None:
            self._runtime = open_runtime(self._spec, self._log)
        try:
            found = []
            if rows:
                with Bar(progress, "generating", 0.0 if progress else _SHOWN_AFTER_S) as bar:
                    found = _computed(spec, lines, self._runtime, self._log, bar)
        except BaseException:  # rows are left in the engine, where the next ones must not meet them
            self.close()
            raise
        answers = ResultReader(iter(found), spec.n, False, spec.keep, len(rows))
        return [result for row in range(len(rows)) for result in answers.take(row)]

    def _listed(self, prompts: Any) -> Iterable[Any]:
        """The prompts as a sequence, given one, several, or a column or table of them."""
        if hasattr(prompts, "to_pylist"):
            return list(prompts.to_pylist())
        table = table_of(prompts)
        if table is not None:
            return table.to_pylist()
        if isinstance(prompts, str | bytes | Mapping):
            return [prompts]
        if not isinstance(prompts, Iterable):
            kind = type(prompts).__name__
            raise InputError(f"prompts are texts, chats or rows, not of type {kind}")
        found = list(prompts)
        return [found] if found and all(map(self._is_message, found)) else found

    def _is_message(self, item: object) -> bool:
        """Whether it is a message of a chat, and not a row that the job could read."""
        if not isinstance(item, Mapping) or "role" not in item:
            return False
        column, template = self._spec.prompt.column, self._spec.prompt.template
        return not (column or template or usual_column([*item]) in item)

    def _fields(self, prompt: Prompt) -> dict[str, Any]:
        if not isinstance(prompt, Mapping):
            return {"prompt": prompt}
        if self._spec.prompt.column or self._spec.prompt.template:
            return dict(prompt)
        name = usual_column([*prompt])
        return {**prompt, "prompt": prompt[name]} if name in prompt else dict(prompt)

    def close(self) -> None:
        """Free the memory; `generate` loads the model again."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _computed(
    spec: JobSpec, lines: bytes, bench: Assembly, log: Callable[[str], None], bar: Bar
) -> list[Result]:
    """The results of rows given as lines of JSON, read, planned and computed like a job's."""
    samples = lines.count(b"\n") * spec.n
    with tempfile.TemporaryDirectory(prefix="batchrun-") as place:
        path = Path(place, "rows.jsonl")
        path.write_bytes(lines)
        source = open_source([Part(path)], "jsonl")
        reader = Reader(spec, source, DoneSet(spec.n), bench, log)
        failed = 0

        def ended(result: Result) -> None:
            nonlocal failed
            failed += result.error is not None
            bar.show("generating", samples, len(drive.results), failed)

        drive = Drive(bench.engine, reader, ended=ended)
        reader.read(drive, drive)
    return [drive.results[key] for key in sorted(drive.results)]
