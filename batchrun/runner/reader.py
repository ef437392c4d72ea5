"""From rows to requests: which to compute, their prompts, their own sampling parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.scores import Scoring
from batchrun.errors import PROCESS_ENDS, said_by
from batchrun.estimate.savings import Savings
from batchrun.grammars.constraint import in_time, with_constraint
from batchrun.jobs.errors import InputError
from batchrun.jobs.journal.results import CopiedResult, Partial, Result, RowDigests
from batchrun.jobs.output.joined import Digests, row_changed
from batchrun.jobs.rows.formats import FORMATS
from batchrun.jobs.rows.jsontext import encode
from batchrun.jobs.rows.row import Row, Source
from batchrun.jobs.spec import JobSpec
from batchrun.prompts.messages import PromptError
from batchrun.prompts.template import Template
from batchrun.runner.channel import Sender
from batchrun.runner.chat_columns import argument_columns
from batchrun.runner.duplicates import Duplicates
from batchrun.runner.overdue import BARREN, Overdue, PromptLimit, never_made, place_of, too_long
from batchrun.runner.param_columns import (
    OVERRIDES,
    BadParameterError,
    parameters_taken,
    read_parameter,
)
from batchrun.runner.planner import Planner, Waiting
from batchrun.runner.scoring import Scorer
from batchrun.runner.watchdog import Watchdog

if TYPE_CHECKING:  # they import torch, which is not loaded before there is something to compute
    from batchrun.engine.model.generation import Generation
    from batchrun.engine.settings import EncodeText
    from batchrun.grammars.matchers import Matchers

Read = Result | CopiedResult | RowDigests  # what the reader has for the journal

QUEUED_REQUESTS = 256  # inside the engine
HANDED_REQUESTS = 64  # between reader and engine: rows not handed over yet can be replanned
CRASHES = 2  # of the process with a row in it; there is no third try
CRASHED = f"the process crashed {CRASHES} times on this row"
_PAGE = 1024  # digests of rows that are looked up, or handed on, at a time
_EMPTY = ("empty_prompt", "null_prompt")


def prompt_options(spec: JobSpec) -> dict[str, Any]:
    """Arguments for `PromptBuilder`; the other options of `prompt` are the reader's."""
    own = {"skip_empty", "ignore_param_columns"}
    return {
        **{k: v for k, v in vars(spec.prompt).items() if k not in own},
        "arguments_are_data": spec.prompt.ignore_param_columns,
        "columnar": FORMATS[spec.input_format].columnar,
        "plain": encode,
        "told": spec.runtime.param_columns,  # when the job was submitted
    }


@dataclass
class ReadSoFar:
    """What was read of the rows without a result, duplicates included only in `samples`."""

    samples: int = 0
    to_compute: int = 0
    prompt_tokens: int = 0
    most_tokens: int = 0  # that answers may have
    stopping: int = 0  # rows to compute whose answers may be shorter


class Prompts(Protocol):
    """What the reader needs from a model."""

    @property
    def encode(self) -> Callable[[Mapping[str, Any]], tuple[int, ...]]:
        """Turns a row's fields into prompt tokens; raises `PromptError`."""

    @property
    def encode_text(self) -> EncodeText:
        """Turns a text behind a row's prompt into tokens; see `PromptBuilder.continuation`."""

    @property
    def generation(self) -> Generation:
        """The model's defaults, for what neither job nor row sets."""

    @property
    def matchers(self) -> Matchers:
        """Know which constraints answers of the model can keep."""

    @property
    def max_num_seqs(self) -> int:
        """Maximum number of concurrent sequences."""

    @property
    def max_num_batched_tokens(self) -> int:
        """Maximum number of tokens in a step."""


@dataclass
class Reader:
    """Reads the unfinished rows and turns them into requests.

    Args:
        spec: The job.
        source: Its rows.
        done: Samples that have a result already.
        workbench: Tokenises, and knows the model's sampling defaults.
        log: Told which columns are taken as sampling parameters.
        begun: What an earlier run computed, by (row, sample).
        crashes: How often the process crashed with a row in it.
        digests: Digests of rows that an earlier run read, by row; called with first and count.
        watchdog: Told when it reads.
        limit: Limits the time for a row's prompt, and notes what the reader is doing.
        condemned: Rows that become errors without another try, and why.
        drained: Called before making the prompt of a row that was in a crash; returns when no row
            is in the engine or on its way there.
        barren: Give up after this many successive rows whose prompts took too long.

    Attributes:
        columns: The columns read of each row.
        seconds: Time spent on making requests.
        made, handed: Number of requests made, and of those handed on.
        planner: Puts them in order; None if they stay in file order.
        duplicates: Knows which of them need no computing.
        savings: Knows what planning saved.
        read_so_far: Counts what it has read.
    """

    spec: JobSpec
    source: Source
    done: Container[tuple[int, int]]
    workbench: Prompts
    log: Callable[[str], None]
    _: KW_ONLY
    begun: Mapping[tuple[int, int], Partial] = field(default_factory=dict)
    crashes: Mapping[int, int] = field(default_factory=dict)
    digests: Digests = lambda first, count: {}
    watchdog: Watchdog = field(default_factory=Watchdog)
    limit: PromptLimit = field(default_factory=PromptLimit)
    condemned: Mapping[int, str] = field(default_factory=dict)
    drained: Callable[[], None] = lambda: None
    barren: int = BARREN

    def __post_init__(self) -> None:
        spec, source, workbench = self.spec, self.source, self.workbench
        self._known: Mapping[int, int] = {}
        self._seen: list[tuple[int, int]] = []
        self._next_row = self._overdue = self.made = self.handed = 0
        self.seconds, self.read_so_far = 0.0, ReadSoFar()
        self.duplicates = Duplicates(spec.n)
        self.planner = Planner() if spec.runtime.reorder else None
        self.savings = Savings(
            workbench.max_num_seqs,
            workbench.max_num_batched_tokens,
            share=spec.runtime.share_prefixes,
        )
        self._generation = workbench.generation
        # Best-of ranks by log-probabilities, and a choice's is in the output.
        scored = spec.keep is not None or spec.sampling.choice_logprob
        self._given = {**spec.sampling.given, "scored": scored}
        if self._generation.stop and (spec.sampling.num_beams or 1) > 1:
            raise InputError(
                "the model's generation config has stop strings that beam search does not "
                f"support: {', '.join(map(repr, self._generation.stop))}",
                hint="leave out --num-beams, or add --ignore-eos",
            )
        shape = with_constraint(self._given).get("constraint")
        if shape is not None:
            found = in_time(lambda: workbench.matchers.problem(shape))
            if found is not None:
                raise InputError(f"no answer can have the requested shape: {found}")
        self._has_told_internal = False
        scores = spec.sampling.scores
        self._scorer = Scorer(spec.sampling, workbench.encode_text) if scores else None
        prompt = spec.prompt
        if prompt.template:
            needed = Template(prompt.template).columns
        else:
            needed = [prompt.column or "prompt"]
        known = [name for name in OVERRIDES if name in source.column_names]
        # If later rows may add columns, look for all of them in each row.
        whole = source.num_rows is not None
        self._overrides = known if whole else list(OVERRIDES)
        if prompt.ignore_param_columns:
            known, self._overrides = [], []
        spoken = argument_columns(prompt, source)
        texts = self._scorer.columns if self._scorer else []
        self.columns = list(dict.fromkeys([*needed, *texts, *self._overrides, *spoken]))
        self._told = set(spec.runtime.param_columns)  # when the job was submitted
        self._tell(known)
        temperature = {**self._generation.sampling, **self._given}.get("temperature")
        if spec.n > 1 and not temperature and "temperature" not in known:
            own = "" if whole or not self._overrides else " without a temperature of its own"
            self.log(f"the temperature is 0: all samples of a row{own} will be the same")

    def read(self, requests: Sender[Request], results: Sender[Read]) -> None:
        """Send every row that has no result yet, in planned order, and close `requests`.

        A row's digest goes to `results` before the row goes anywhere.

        Raises:
            Closed: The other side of a channel is gone.
            ModelError: Every prompt takes too long.
            SpecChanged: A row has changed since an earlier run read it.
        """
        found = self._to_do(results)
        if self.planner is None:
            found = map(self._counted, found)
        else:
            to_compute = self._without_duplicates(self.planner, found, results)
            found = self._planned(self.planner, to_compute, requests)
        for request in found:
            self._note(results)
            self.handed += 1
            requests.put(request)
        self._note(results)
        requests.close()

    def _planned(
        self, planner: Planner, rows: Iterable[Waiting], requests: Sender[Request]
    ) -> Iterator[Request]:
        for waiting in planner.planned(rows, lambda: requests.full):
            self.savings.put(waiting, planner.expected(waiting.rest.params))
            yield waiting.request()

    def ended(self, request: Request, result: Result) -> list[Result]:
        """Learn the length of a computed row; return the results of its duplicates."""
        if self.planner is None:
            return []
        self.planner.learn(request, result.completion_tokens)
        return self.settle(request, result)

    def settle(self, request: Request, result: Result) -> list[Result]:
        """Settle a planned row that has ended; return the results of its duplicates."""
        same = self.duplicates.settle(request, result)
        for ended in (result, *same):
            self.savings.end(ended.row, ended.sample, ended.completion_tokens)
        return same

    def _without_duplicates(
        self, planner: Planner, requests: Iterable[Request], results: Sender[Read]
    ) -> Iterator[Waiting]:
        for request in requests:
            waiting = Waiting.of(request)
            self.savings.read(waiting, planner.expected(request.params))
            claimed = self.duplicates.claim(waiting, lambda: self._note(results))
            if isinstance(claimed, CopiedResult):
                self.savings.end(claimed.row, claimed.sample, claimed.tokens)
                self._note(results)
                results.put(claimed)
            elif claimed:
                self._counted(request)
                yield waiting

    def _counted(self, request: Request) -> Request:
        read = self.read_so_far
        read.to_compute += 1
        read.prompt_tokens += len(request.prompt_ids)
        read.most_tokens += request.params.max_tokens
        read.stopping += not request.params.ignore_eos
        return request

    def _to_do(self, results: Sender[Read]) -> Iterator[Request]:
        """Requests in file order; rows that can't become one send an error to `results`."""
        spec = self.spec
        rows = islice(self.source.rows(self.columns, spec.limit), spec.limit)
        while (row := self._next(rows)) is not None:
            self._compare(row, results)
            todo = [s for s in range(spec.n) if (row.index, s) not in self.done]
            if not todo:
                continue
            self.read_so_far.samples += len(todo)
            began = time.perf_counter()
            made = self._requests_of(row, todo)
            self.seconds += time.perf_counter() - began
            for item in made:
                if isinstance(item, Request):
                    self.made += 1
                    yield item
                else:
                    self._note(results)
                    results.put(item)

    def _compare(self, row: Row, results: Sender[Read]) -> None:
        """Refuse a row that changed since an earlier run; note the digest of a new one."""
        if row.index % _PAGE == 0:
            self._known = self.digests(row.index, _PAGE)
        was = self._known.get(row.index)
        if was is None:
            self._seen.append((row.index, row.digest))
            if len(self._seen) >= _PAGE:
                self._note(results)
        elif was != row.digest:
            raise row_changed(row.index)

    def _note(self, results: Sender[Read]) -> None:
        if self._seen:
            results.put(RowDigests(self._seen))
            self._seen = []

    def _next(self, rows: Iterator[Row]) -> Row | None:
        with self.watchdog.busy("reading the input"), self.limit.note.reading(None, self._next_row):
            row = next(rows, None)
        self._next_row += 1
        return row

    def _requests_of(self, row: Row, samples: list[int]) -> list[Request] | list[Result]:
        """The row's requests, or its errors."""
        if row.index in self.crashes:
            self.drained()
        try:
            if row.error is not None:
                raise PromptError("bad_row", row.error)
            if self.crashes.get(row.index, 0) >= CRASHES:
                raise PromptError("crashed", CRASHED)
            if row.index in self.condemned:
                raise PromptError("overdue", self.condemned[row.index])
            ids, params, scoring = self.limit.made(row.index, lambda: self._prompt(row.fields))
            self._overdue = 0
        except PROCESS_ENDS:
            raise
        except BaseException as error:
            found = self._problem(row.index, error)
            if found.kind in _EMPTY and self.spec.prompt.skip_empty:
                return [Result(row.index, s, "skipped") for s in samples]
            text = str(found).encode(errors="backslashreplace").decode()
            return [
                Result(row.index, s, "error", error=text, error_kind=found.kind) for s in samples
            ]
        seed = params.seed if params.seed is not None else self.spec.seed
        none = Partial(row.index, 0, ())
        begun = [self.begun.get((row.index, s), none) for s in samples]
        return [
            Request(
                *(row.index, s, ids, params, seed),
                *(b.token_ids, b.logprob or 0.0, b.logprobs or ()),
                scoring=scoring,
            )
            for s, b in zip(samples, begun, strict=True)
        ]

    def _prompt(
        self, fields: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], SamplingParams, Scoring | None]:
        given = self._sampling(fields)
        try:
            params = self._generation.params(given)
        except ValueError as error:
            raise PromptError("bad_parameter", str(error)) from None
        if params.constraint and (found := self.workbench.matchers.problem(params.constraint)):
            raise PromptError("bad_parameter", f"answers can't have that shape: {found}")
        ids = self.workbench.encode(fields)
        scoring = self._scorer.scoring(fields, len(ids)) if self._scorer else None
        return ids, self._generation.fitted(params, given, len(ids)), scoring

    def _problem(self, row: int, error: BaseException) -> PromptError:
        """What is wrong with a row; an unforeseen error is also the row's, and is logged."""
        if isinstance(error, PromptError):
            return error
        if isinstance(error, Overdue):
            place = place_of(error.__traceback__)
            self._overdue += 1
            if self._overdue == self.barren:
                raise never_made(self._overdue, place)
            return PromptError("overdue", too_long(self.limit.limit_s) + place)
        if not self._has_told_internal:
            self._has_told_internal = True
            self.log(f"no prompt can be built from row {row} and maybe others: {said_by(error)}")
        return PromptError("internal", f"no prompt can be built from the row: {said_by(error)}")

    def _sampling(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The job's sampling parameters, overridden by the row's own."""
        values, own = dict(self._given), set[str]()
        for name in self._overrides:
            value = fields.get(name)
            try:
                found = None if value is None else read_parameter(name, value)
            except BadParameterError as error:
                raise PromptError("bad_parameter", str(error)) from None
            if found is not None:
                values[name] = found
                own.add(name)
                self._tell([name])
        try:
            return with_constraint(values, own)
        except ValueError as error:
            raise PromptError("bad_parameter", str(error)) from None

    def _tell(self, names: Iterable[str]) -> None:
        """Log, once, columns taken as parameters that were not announced at submission."""
        new = [name for name in names if name not in self._told]
        if new:
            self._told.update(new)
            self.log(parameters_taken(new))
