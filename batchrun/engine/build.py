"""Builds the engine for one device: model, memory, kernels, executor and scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from batchrun.allocator.accounting import UsageIntegral
from batchrun.allocator.arena import KVArena
from batchrun.allocator.cuda import CudaMemory
from batchrun.allocator.host import HostMemory
from batchrun.allocator.vmm import AllocatorError, VirtualMemory
from batchrun.engine import invariance
from batchrun.engine.constraints import Constraints
from batchrun.engine.core import EngineError
from batchrun.engine.cpu.compile import guard_caches
from batchrun.engine.engine import Engine
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.executors import make_executor, make_fast
from batchrun.engine.model.draft import as_draft, load_draft
from batchrun.engine.model.generation import read_generation, vocabulary_size
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.model.verdicts import Gate
from batchrun.engine.scheduler import Scheduler
from batchrun.engine.settings import (
    DEVICE_HEADROOM,
    Encode,
    EncodeText,
    Settings,
    available_memory,
    choose_device,
    fit_context,
    kv_layout,
    load_model,
    logits_bytes,
    num_slots,
    prompt_encoder,
)
from batchrun.engine.shortage import device_errors
from batchrun.engine.speculation.build import GPU_DRAFTS, make_speculator, takes_drafts
from batchrun.engine.transfers import CudaTransfers, Transfers
from batchrun.engine.warmup import WarmUp
from batchrun.grammars.matchers import Matchers
from batchrun.machine import keep_freed_memory, return_freed_memory

_LOOKAHEAD = 4  # steps
_MEASURED_S = 0.05  # between two measurements of free memory, each of up to 0.4 ms
_GIVE_BACK = 16  # pages per step: about 45 us each in the driver; a short step takes 2 ms
_DEVICE_SLACK, _HOST_SLACK = 0.02, 0.05  # unused pages to keep, as a fraction of the claimed ones
# Bytes of a step's logits for which known tokens are scored; `sampling.score` takes as much again.
_CPU_LOGITS, _GPU_LOGITS = 48 << 20, 256 << 20


def build(
    settings: Settings,
    prompt: Mapping[str, Any],
    log: Callable[[str], None] = lambda _: None,
    phase: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Assembly:
    """Load a model, then build its engine and check it.

    Args:
        settings: What to run, and how.
        prompt: Keyword arguments of `PromptBuilder`.
        log: Called with each line that the user should see.
        phase: Called with what is being done: `load`, and how many bytes of weights are loaded of
            how many; `compile`; `check`.

    Raises:
        ModelError: The model can't be loaded, or is refused.
        EngineError: See `Assembly`.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return_freed_memory()  # loading and packing leave hundreds of MiB behind
    with device_errors("the weights", None):
        device = choose_device(settings.device, log)
        loaded = load_model(settings, device, told=lambda done, of: phase("load", done, of))
        draft = load_draft(settings, loaded, str(loaded.device))
    if loaded.device.type == "cuda":
        guard_caches(log)
    loaded = fit_context(loaded, settings, str(loaded.device), draft)
    for note in (*loaded.notes, *(draft.notes if draft else ())):
        log(note)
    encode, encode_text = prompt_encoder(loaded, settings, prompt, log)
    gate = Gate(loaded, f"{settings.fingerprint}-{settings.quantize or 'whole'}", settings.cache)
    drafts_gate = None
    if draft is not None:
        with as_draft(settings.draft_model):
            drafts_gate = Gate(draft, f"{settings.draft_fingerprint}-whole", settings.cache)
    phase("compile", 0, 0)
    assembly = Assembly(loaded, settings, log, draft)
    assembly.encode, assembly.encode_text = encode, encode_text
    if ignored := ", ".join(assembly.generation.ignored):
        log(f"the model's generation config sets {ignored}, which batchrun does not support")
    space = assembly.arena, assembly.max_num_batched_tokens
    kernels = "-".join(assembly.kernels).replace(" ", "-")
    phase("check", 0, 0)
    try:
        gate.verify(assembly.executor, *space, kernels)
        if assembly.varies is None:
            once = f"{kernels}-invariant-{torch.get_num_threads()}"
            try:
                gate.once(once, lambda: invariance.check(loaded, assembly.executor, *space))
            except invariance.VariesError as error:
                assembly.note_varies(str(error))
        if drafts_gate is not None and assembly.drafter is not None:
            with as_draft(settings.draft_model):
                drafts_gate.verify(assembly.drafter, *space, kernels)
    except BaseException:
        assembly.close()
        raise
    keep_freed_memory()
    return assembly


class Assembly:
    """A model's engine with its memory and kernels. Close it to release the memory.

    Args:
        loaded: The model, on its device; optimized in place if the settings say so.
        settings: How to run it.
        log: Called with each line that the user should see.
        draft: The model that proposes draft tokens, on the same device; treated likewise.

    Attributes:
        encode: Turns a row's fields into prompt tokens; set only by `build`.
        encode_text: Turns a text behind a row's prompt into tokens; likewise.
        drafter: Computes the draft model's steps; None without one.
        kernels: What computes: the attention backend, and what `optimize` replaced.
        varies: Why answers may depend on the batch, in one clause; None if they don't.
        arithmetic: What computes the numbers. Only answers of the same arithmetic are promised to
            be equal.
        generation: How the model wants to be sampled.
        matchers: Know which constraints its answers can keep.

    Raises:
        EngineError: There is not enough memory, a backend requested by name can't be used, or
            answers must not depend on the batch but do.
    """

    encode: Encode
    encode_text: EncodeText

    def __init__(
        self,
        loaded: LoadedModel,
        settings: Settings,
        log: Callable[[str], None] = lambda _: None,
        draft: LoadedModel | None = None,
    ) -> None:
        self.loaded, self.draft = loaded, draft
        self.settings = settings
        self.limits = settings.limits(str(loaded.device))
        self.max_num_seqs = self.limits.max_num_seqs
        self.max_num_batched_tokens = self.limits.max_num_batched_tokens
        self.generation = read_generation(loaded.model, loaded.tokenizer, loaded.max_model_len)
        vocabulary = vocabulary_size(loaded.model)
        self.matchers = Matchers(loaded.tokenizer, loaded.eos_ids, vocabulary)
        self._constraints = Constraints(self.matchers)
        self.usage = UsageIntegral()
        self._log = log
        self._cuda = loaded.device.type == "cuda"
        made = make_fast(loaded, settings, log)
        if draft is not None:
            with as_draft(settings.draft_model):
                make_fast(draft, settings, log)
        models = (loaded,) if draft is None else (loaded, draft)
        self._weights_bytes = sum(model.weights_bytes for model in models)
        self._resources = ExitStack()
        try:
            self.arena = self._make_arena()
            self.executor, self.drafter = self._make_executors()
            most = self.max_num_seqs + (GPU_DRAFTS if takes_drafts(settings, self.executor) else 0)
            # The model's steps are larger: theirs is the memory that torch should keep at the end.
            for executor in filter(None, (self.drafter, self.executor)) if self._cuda else ():
                warmup = WarmUp(executor, self.arena, self.limits, most, log)
                warmup.run(graphs=settings.graphs)
        except AllocatorError as error:
            self.close()
            fits = fit_context(
                loaded, replace(settings, max_model_len=None), loaded.device.type, draft
            )
            less = f"use --max-model-len {fits.max_model_len} or less, or a lower --max-num-seqs"
            raise EngineError(
                f"cannot set up KV memory for {self.max_num_seqs} sequences of "
                f"{loaded.max_model_len} tokens: {error}",
                hint="lower --max-num-seqs or --max-model-len" if fits is loaded else less,
            ) from error
        except BaseException:
            self.close()
            raise
        recorded = ("recorded pieces",) * (self.executor.pieces is not None)
        self.kernels = (self.executor.backend.name, *made, *recorded)
        self.arithmetic = invariance.arithmetic(loaded)
        self.note_varies(invariance.varies(loaded, self.executor.backend))
        proposer = make_speculator(
            *(self.executor, self.arena, settings),
            drafter=self.drafter,
            constraints=self._constraints,
            log=log,
        )
        self.scheduler = Scheduler(
            self.arena,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=loaded.max_model_len,
            max_scored_tokens=self._most_scored(),
            share=settings.share_prefixes,
            proposer=proposer,
            overlap=self.executor.lag > 0,
            lookahead=_LOOKAHEAD if self.executor.lag else 0,
        )
        self.engine = Engine(
            self.executor,
            self.scheduler,
            loaded.tokenizer,
            loaded.eos_ids,
            specials=self.generation.specials,
            constraints=self._constraints,
            observe=lambda seconds: self.usage.add(self.arena.usage(), seconds),
            mapping_seconds=lambda: self.arena.work_seconds,
        )

    def note_varies(self, reason: str | None) -> None:
        """Set `varies`; raises EngineError, and closes this, if answers must not depend on it."""
        self.varies = reason
        if self.settings.deterministic and reason:
            self.close()
            raise EngineError(
                f"--deterministic can't be guaranteed: {reason}",
                hint="leave out --deterministic, and add --again",
            )

    def recall(self, answers: Iterable[Sequence[int]], constraint: str | None) -> None:
        """Guess from the tokens of answers under a constraint that an earlier run has computed."""
        if (proposer := self.scheduler.stays.proposer) is not None:
            for token_ids in answers:
                proposer.learn((), constraint, token_ids)

    def measurements(self) -> dict[str, float | str]:
        """The engine's figures so far, named as in `batchrun.jobs.metrics`."""
        return {
            **asdict(self.engine.stats),
            **self.usage.as_dict(),
            "shared_tokens": self.scheduler.stays.num_shared_tokens,
            **(proposer.measurements() if (proposer := self.scheduler.stays.proposer) else {}),
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "max_num_seqs": self.max_num_seqs,
            "kv_budget": self.arena.pool.known_budget or 0,
            "preemptions": self.scheduler.num_preemptions,
            "weights_bytes": self._weights_bytes,
            "peak_activations": self._peak_activations(),
            "device": str(self.loaded.device),
            "attention": self.executor.backend.name,
            "arithmetic": self.arithmetic,
            "varies": self.varies or "",
            "model": self.settings.model_name,
        }

    def close(self) -> None:
        """Wait for the device, then release slots, pages and addresses."""
        self._resources.close()

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_memory(self) -> tuple[VirtualMemory, Callable[[], int]]:
        """The device's memory, and a function for how many more bytes the KV cache may take.

        The result is negative if another program took more than was left; the cache then gives
        pages back.
        """
        layout = kv_layout(self.loaded, self.settings, self.draft, cuda=self._cuda)
        if not self._cuda:
            return HostMemory(layout.page_size, planes=layout.planes, guard=False), available_memory
        memory = CudaMemory(
            self.loaded.device.index or 0, page_size=layout.page_size, planes=layout.planes
        )
        return memory, lambda: memory.memory_info()[0] - DEVICE_HEADROOM

    def _make_arena(self) -> KVArena:
        memory, free = self._make_memory()
        self._resources.callback(memory.close)
        wanted = kv_layout(self.loaded, self.settings, self.draft, cuda=self._cuda)
        layout = replace(wanted, page_size=memory.granularity, planes=memory.planes)
        at, found = -_MEASURED_S, 0

        def measured() -> int:
            """What the pool may hold: what it already has, plus what is free."""
            nonlocal at, found
            if time.monotonic() - at >= _MEASURED_S:
                at, found = time.monotonic(), arena.pool.created * layout.page_bytes + free()
            return found

        arena = KVArena(
            memory,
            layout,
            num_slots=num_slots(self.limits, 1 + (self.draft is not None), cuda=self._cuda),
            budget=measured if self.settings.kv_budget is None else self.settings.kv_budget,
            slack=_DEVICE_SLACK if self._cuda else _HOST_SLACK,
            give_back=_GIVE_BACK if self._cuda else None,
        )
        self._resources.callback(arena.release)
        return arena

    def _make_executors(self) -> tuple[TorchExecutor, TorchExecutor | None]:
        """The model's executor, and the draft model's, whose layers follow the model's."""
        transfers, lag = Transfers(), 0
        if self._cuda:
            lag = int(self.settings.overlap and not self._waits_for_tokens())
            transfers = CudaTransfers(self.loaded.device, lag)
        self._resources.callback(transfers.drain)
        over = self.arena, self.settings, transfers, self._log
        options: dict[str, Any] = {"relieve": self._relieve, "config": self.generation.logits}
        options["drafts"] = GPU_DRAFTS if self._cuda and self.settings.drafts else 0
        executor = make_executor(self.loaded, *over, lag=lag, **options)
        if self.draft is None:
            return executor, None
        first = len(self.loaded.layers)
        return executor, make_executor(self.draft, *over, first_layer=first, **options)

    def _waits_for_tokens(self) -> bool:
        """Whether a step's tokens must be known before the next step is planned or sampled."""
        names = self.generation.logits.reads_tokens
        if names:
            self._log(
                "each step waits for the one before it: the model's generation config sets "
                f"{' and '.join(names)}, and that depends on the tokens so far"
            )
        return bool(names) or self.draft is not None

    def _most_scored(self) -> int:
        """Tokens of a step after which known tokens are scored; at least one."""
        return max(1, (_GPU_LOGITS if self._cuda else _CPU_LOGITS) // logits_bytes(self.loaded))

    def _relieve(self) -> None:
        """Free unused KV pages on the device, and the memory that torch caches."""
        self._log("the device has no memory left for a step: freeing unused memory")
        torch.cuda.synchronize(self.loaded.device)
        self.arena.trim()
        torch.cuda.empty_cache()

    def _peak_activations(self) -> int:
        """Peak bytes that torch held on the GPU beyond the weights; 0 on a CPU."""
        if not self._cuda:
            return 0
        held = torch.cuda.max_memory_reserved(self.loaded.device)
        return max(0, held - self._weights_bytes)
