"""Forecasts a job: reads and plans its rows as a run would, without loading weights.

The model is built from its config on torch's meta device, which has shapes but no data. So it goes
through the same gates as a real one, and its KV cache has the size that it will have.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from batchrun.engine.core import Request
from batchrun.engine.model.generation import Generation
from batchrun.engine.prefixes import BLOCK, common_length
from batchrun.engine.waiting import why_row_refused
from batchrun.estimate.measured import Measured
from batchrun.estimate.savings import BatchModel
from batchrun.fleet.devices import one_engine
from batchrun.grammars.matchers import Matchers
from batchrun.jobs.folder import home
from batchrun.jobs.journal.results import CopiedResult, DoneSet, Result, RowDigests
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.spec import JobSpec
from batchrun.runner.opening import engine_settings
from batchrun.runner.overdue import PromptLimit
from batchrun.runner.planner import Waiting
from batchrun.runner.reader import HANDED_REQUESTS, QUEUED_REQUESTS, Reader, prompt_options


@dataclass(frozen=True)
class ModelInfo:
    """A model known from its config and tokenizer alone.

    Attributes:
        encode: Makes prompt tokens from a row's fields.
        encode_text: Makes tokens of a text behind a row's prompt.
        generation: How the model asks to be sampled by default.
        matchers: Know which constraints its answers can keep.
        max_model_len: Maximum tokens of prompt and answer together.
        token_bytes: Bytes of KV cache per token.
        budget: Bytes available for the KV cache.
        max_num_seqs: Maximum sequences that run at once.
        max_num_batched_tokens: Maximum tokens in a step.
        can_fit: Whether a row of so many tokens fits the KV budget, if one was given.
        decode: Makes text of a prompt's tokens, special ones included.
        device: Where it is computed.
        dtype: In which type.
    """

    encode: Callable[[Mapping[str, Any]], tuple[int, ...]]
    encode_text: Callable[[str, Mapping[str, Any] | None], tuple[int, ...]]
    generation: Generation
    matchers: Matchers
    max_model_len: int
    token_bytes: int
    budget: int
    max_num_seqs: int
    max_num_batched_tokens: int
    can_fit: Callable[[int], bool]
    decode: Callable[[Sequence[int]], str]
    device: str
    dtype: str


@dataclass
class PlannedRows:
    """Stands in for the engine and the journal, and counts: tokens, unless noted."""

    info: ModelInfo
    measured: Measured
    reader: Reader
    share: bool
    slots: BatchModel
    completion: int = 0
    expected: float = 0.0
    shared: int = 0
    computed: int = 0
    requests: int = 0
    held: float = 0.0  # tokens times steps; shared tokens count once
    longest: float = 0.0  # tokens of all rows at their ends, less those they share
    problems: Counter[str] = field(default_factory=Counter)
    _previous: tuple[int, ...] = ()

    @property
    def full(self) -> bool:
        """Whether an engine that has computed nothing yet would take no more requests."""
        return self.requests >= QUEUED_REQUESTS + HANDED_REQUESTS

    def put(self, item: Request | Result | CopiedResult | RowDigests) -> None:
        """Take a request to compute, or a result in place of one."""
        if isinstance(item, Request):
            self._request(item)
        elif isinstance(item, Result):
            self.problems[item.error_kind or item.status] += 1

    def close(self) -> None:
        """Do nothing: no more will come."""

    def _request(self, request: Request) -> None:
        info, most = self.info, request.params.max_tokens
        limits = {"max_model_len": info.max_model_len, "max_num_seqs": sys.maxsize}
        refused = why_row_refused(request, **limits, can_fit=lambda _: True)
        most = min(most, info.max_model_len - len(request.prompt_ids)) if refused is None else 0
        result = Result(request.row, request.sample, "ok", completion_tokens=most)
        if refused is not None:
            result = result._replace(status="error")
            self.problems[refused[0]] += 1
        else:
            self._add(request, most)
        if self.reader.planner is not None:
            same = self.reader.settle(request, result)
            if refused is not None:
                self.problems[refused[0]] += len(same)

    def _add(self, request: Request, most: int) -> None:
        """Count a row to compute, with at most so many tokens to generate."""
        tokens, most_shared = Waiting.of(request).num_tokens
        common = _common(request.prompt_ids, self._previous) if self.share else 0
        shared = min(common, most_shared)
        stops = not request.params.ignore_eos
        answer = max(1.0, most * (self.measured.share if stops else 1.0)) if most else 0.0
        steps = max(1.0, answer * (1 - self.measured.accepted)) if most else 0.0
        self.requests += 1
        self.completion += most
        self.expected += answer
        self.shared += shared
        self.computed += tokens - shared
        self.held += steps * (tokens - shared + answer / 2)
        self.longest += tokens - shared + answer
        self.slots.add(tokens - shared, steps)
        self._previous = request.prompt_ids


def _common(ids: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Leading tokens that are computed already for `others`; no other planned row shares more."""
    return common_length(ids, others, BLOCK) if len(ids) > BLOCK else 0


def forecast(spec: JobSpec, log: Callable[[str], None], limit: PromptLimit) -> dict[str, Any]:
    """Read and plan the whole input; `limit` says how long a prompt may take.

    Returns:
        JSON-able figures for all rows: `rows`, `prompt_tokens` (those of scored texts included),
        `completion_tokens` (at most),
        `expected_tokens` (of completions, if they end as early as in earlier runs), `duplicates`
        (`rows` and, at most, completion `tokens`, taken from other rows), `shared_tokens` (of
        prompts), `saved` by planning (`prompt_tokens` and `steps`), `errors` by kind, `skipped`,
        `engines` (how many compute at the same time; what follows is of each of them),
        `kv` (`token_bytes`, `budget_bytes`, and how many `sequences` of these lengths fit),
        `max_num_seqs`, `steps`, `seconds` (`load`, `engine`; None if nothing was measured yet),
        `measured_runs`.

    Raises:
        JobError: An input can't be read.
        ModelError: The model would be refused.
        EngineError: The attention backend would be refused.
    """
    source = open_source(spec.parts, spec.input_format, noted=limit.note.reading)
    known = Measured.load(home(), spec)
    info = read_model_info(spec, log)
    _, engines = one_engine(spec.runtime)
    prompt_tokens = 0

    def encode(fields: Mapping[str, Any]) -> tuple[int, ...]:
        nonlocal prompt_tokens
        ids = info.encode(fields)
        prompt_tokens += len(ids) * spec.n
        return ids

    def encode_text(text: str, fields: Mapping[str, Any] | None) -> tuple[int, ...]:
        nonlocal prompt_tokens
        ids = info.encode_text(text, fields)
        prompt_tokens += len(ids) * spec.n if fields is not None else 0
        return ids

    prompts = replace(info, encode=encode, encode_text=encode_text)
    reader = Reader(spec, source, DoneSet(spec.n), prompts, log, limit=limit)
    planned = PlannedRows(
        info,
        known or Measured(),
        reader,
        spec.runtime.share_prefixes,
        BatchModel(info.max_num_seqs * engines, info.max_num_batched_tokens * engines),
    )
    reader.read(planned, planned)
    same, problems = reader.duplicates, dict(planned.problems)
    each = planned.longest / max(1, planned.requests) * info.token_bytes
    fit = int(max(0, info.budget) / each) if each else None
    crowded = 1.0 if fit is None else max(1.0, info.max_num_seqs / max(1, fit))
    steps = planned.slots.steps * crowded
    saved = reader.savings.saved()
    answered = planned.expected * (1 + planned.measured.rejected) / engines
    held = planned.held * info.token_bytes / engines
    amounts = (steps, planned.computed / engines, answered, held)
    return {
        "rows": (planned.requests + same.rows + sum(problems.values())) // spec.n,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": planned.completion + same.tokens,
        "expected_tokens": round(planned.expected),
        "duplicates": {"rows": same.rows, "tokens": same.tokens},
        "shared_tokens": planned.shared,
        "saved": {"prompt_tokens": saved.prompt_tokens, "steps": round(steps * saved.steps)},
        "skipped": problems.pop("skipped", 0),
        "errors": problems,
        "kv": {
            "token_bytes": info.token_bytes,
            "budget_bytes": info.budget,
            "sequences": fit,
        },
        "engines": engines,
        "max_num_seqs": info.max_num_seqs,
        "steps": max(round(steps), min(1, planned.requests)),
        "seconds": None
        if known is None
        else {"load": known.load_s, "engine": known.predict(amounts)},
        "measured_runs": 0 if known is None else known.runs,
    }


def read_model_info(spec: JobSpec, log: Callable[[str], None]) -> ModelInfo:
    """Read a job's model without its weights, and what it means on this machine.

    Whatever a run would refuse before it loads weights is refused here.

    Raises:
        ModelError: They can't be read, the architecture is refused, it has no chat template, or the
            KV budget holds no row.
        EngineError: An attention backend asked for by name can't be used.
    """
    import torch  # noqa: PLC0415
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    from batchrun.engine import settings as here  # noqa: PLC0415
    from batchrun.engine.model import gates  # noqa: PLC0415
    from batchrun.engine.model.draft import load_draft  # noqa: PLC0415
    from batchrun.engine.model.generation import (  # noqa: PLC0415
        read_generation,
        vocabulary_size,
    )

    transformers_logging.set_verbosity_error()
    runtime, engines = one_engine(spec.runtime)
    settings = engine_settings(replace(spec, runtime=runtime))
    device = here.choose_device(settings.device, log)
    loaded = here.load_model(settings, device, weights=False)
    draft = load_draft(settings, loaded, device, weights=False)
    loaded = here.fit_context(loaded, settings, device, draft)
    encode, encode_text = here.prompt_encoder(loaded, settings, prompt_options(spec), log)
    limits = settings.limits(device)
    here.check_backend(loaded, settings, device)
    layout = here.kv_layout(loaded, settings, draft, cuda=device != "cpu")
    given = budget = settings.kv_budget
    if budget is None:
        free = here.available_memory() // (engines if runtime.devices else 1)
        if device != "cpu":
            free = torch.cuda.mem_get_info(device)[0] - here.DEVICE_HEADROOM
        budget = free - loaded.weights_bytes - (draft.weights_bytes if draft else 0)

    def can_fit(tokens: int) -> bool:
        pages = layout.total_pages_for(tokens)
        return given is None or pages * layout.page_bytes <= given

    if not can_fit(gates.prompt_tokens(loaded)):
        raise gates.budget_too_small(gates.prompt_tokens(loaded))
    return ModelInfo(
        encode,
        encode_text,
        read_generation(loaded.model, loaded.tokenizer, loaded.max_model_len),
        Matchers(loaded.tokenizer, loaded.eos_ids, vocabulary_size(loaded.model)),
        loaded.max_model_len,
        layout.bytes_per_token,
        budget,
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        can_fit,
        lambda ids: str(loaded.tokenizer.decode(ids)),
        device,
        str(loaded.dtype).removeprefix("torch."),
    )
