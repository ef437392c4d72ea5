"""An engine ready to run: model, memory, kernels and scheduler put together for one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from allocator.accounting import UsageIntegral
from allocator.arena import KVArena
from allocator.host import HostMemory
from allocator.layout import KVLayout, LayerKV
from allocator.tensor import layer_views
from allocator.vmm import AllocatorError
from batchrun.engine import attention, canary
from batchrun.engine import model as models
from batchrun.engine.core import EngineError
from batchrun.engine.engine import Engine
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.model import LoadedModel
from batchrun.engine.scheduler import Scheduler
from batchrun.engine.text import PromptBuilder
from batchrun.models import ModelError

DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_MAX_NUM_BATCHED_TOKENS = 512
DEFAULT_PAGE_SIZE = 256 << 10
_HEADROOM = 512 << 20  # bytes of memory that the KV cache leaves to everybody else


@dataclass(frozen=True)
class Settings:
    """How to run a model: nothing here changes what comes out.

    Args:
        model_path: Folder with config, tokenizer and safetensors.
        model_name: What to call it in messages.
        fingerprint: Of the model's content, for remembered verdicts.
        cache: Folder of remembered verdicts.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: `auto` or `cpu`.
        attention: Name of the attention backend.
        max_num_seqs: Sequences that run at once.
        max_num_batched_tokens: Tokens computed in one step at most.
        max_model_len: Context length; None for the model's own.
        kv_budget: Bytes of KV pages at most; None for what the machine has.
        page_size: Bytes of a KV page.
        layers_per_slab: Layers whose keys and values lie together; None for all.
        trust_remote_code: Whether the model's own Python code may run.
    """

    model_path: str
    model_name: str
    fingerprint: str
    cache: Path
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS
    max_model_len: int | None = None
    kv_budget: int | None = None
    page_size: int = DEFAULT_PAGE_SIZE
    layers_per_slab: int | None = None
    trust_remote_code: bool = False


class Runtime:
    """A loaded model and the engine around it. Close it to give the memory back.

    Args:
        settings: What to run, and how.
        prompt: Keyword arguments of `PromptBuilder`.
        log: Told, a line each, what the user should know.

    Raises:
        ModelError: The model can't be loaded, or is refused.
    """

    def __init__(
        self, settings: Settings, prompt: Mapping[str, Any], log: Callable[[str], None]
    ) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if settings.device not in {"auto", "cpu"}:
            raise ModelError(
                f"the device {settings.device} is not supported by this version",
                hint="use --device cpu",
            )
        self.settings = settings
        self._resources = ExitStack()
        self.loaded = models.load(
            settings.model_path,
            name=settings.model_name,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            max_model_len=settings.max_model_len,
        )
        for note in self.loaded.notes:
            log(note)
        tokenizer = self.loaded.tokenizer
        longest = max(map(len, tokenizer.get_vocab()))
        self.encode = PromptBuilder(
            tokenizer, **prompt, max_chars=longest * self.loaded.max_model_len
        )
        needs_template = self.encode.chat or self.encode.system or self.encode.column == "messages"
        if needs_template and not tokenizer.chat_template:
            raise ModelError(
                f"the model {settings.model_name} has no chat template",
                hint="give plain prompts without --chat and --system, or use an instruct model",
            )
        self.sampling_defaults = models.sampling_defaults(self.loaded.model)
        self.usage = UsageIntegral()
        try:
            self.arena = self._make_arena()
        except AllocatorError as error:
            self.close()
            raise EngineError(
                f"no KV memory can be set up for {settings.max_num_seqs} sequences of "
                f"{self.loaded.max_model_len} tokens: {error}",
                hint="lower --max-num-seqs or --max-model-len, or lift the limit (ulimit -v)",
            ) from error
        executor = self._make_executor()
        self.scheduler = Scheduler(
            self.arena,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=self.loaded.max_model_len,
        )
        chunk = settings.max_num_batched_tokens
        difference = canary.verify_once(
            self.loaded,
            settings.fingerprint,
            settings.cache,
            lambda: canary.verify(self.loaded, executor, self.arena, chunk),
        )
        if difference is not None:
            log(f"checked {self.loaded.architecture} against eager attention: {difference:.1g}")
        self.engine = Engine(
            executor,
            self.scheduler,
            tokenizer,
            self.loaded.eos_ids,
            observe=lambda seconds: self.usage.add(self.arena.usage(), seconds),
        )

    def measurements(self) -> dict[str, float | str]:
        """The engine's figures so far, by the names of `jobs.stats.RunStats`."""
        stats = self.engine.stats
        return {
            "steps": stats.steps,
            "prefill_tokens": stats.prefill_tokens,
            "decode_tokens": stats.decode_tokens,
            "recomputed_tokens": stats.recomputed_tokens,
            "prefill_s": stats.prefill_seconds,
            "decode_s": stats.decode_seconds,
            "sequence_s": stats.sequence_seconds,
            "max_num_seqs": self.settings.max_num_seqs,
            "preemptions": self.scheduler.num_preemptions,
            "weights_bytes": self.loaded.weights_bytes,
            "device": str(self.loaded.device),
            "model": self.settings.model_name,
            **self.usage.as_dict(),
        }

    def close(self) -> None:
        """Give slots, pages and addresses back."""
        self._resources.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_arena(self) -> KVArena:
        settings = self.settings
        memory = HostMemory(settings.page_size)
        self._resources.callback(memory.close)
        layout = _layout(self.loaded, settings.page_size, settings.layers_per_slab)

        def measured() -> int:
            """What the pool may hold: what it has and what is free beside it."""
            held = self.arena.pool.created if hasattr(self, "arena") else 0
            return held * layout.page_size + available_memory()

        arena = KVArena(
            memory,
            layout,
            num_slots=settings.max_num_seqs,
            budget=measured if settings.kv_budget is None else settings.kv_budget,
        )
        self._resources.callback(arena.release)
        return arena

    def _make_executor(self) -> TorchExecutor:
        layers = range(len(self.loaded.layers))
        views = [layer_views(self.arena, layer, self.loaded.dtype) for layer in layers]
        backend = attention.create(self.settings.attention)
        return TorchExecutor(self.loaded, views, backend)


def _layout(loaded: LoadedModel, page_size: int, layers_per_slab: int | None) -> KVLayout:
    layers = tuple(LayerKV(s.kv_heads, s.k_dim, s.v_dim) for s in loaded.layers)
    return KVLayout(
        layers,
        loaded.dtype.itemsize,
        page_size,
        loaded.max_model_len,
        min(layers_per_slab or len(layers), len(layers)),
    )


def available_memory() -> int:
    """Bytes that the KV cache may still take: what is free here and now, less some headroom.

    The tighter one of the machine's `MemAvailable` and this control group's limit.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except FileNotFoundError:
        pass  # the root group, or a machine without control groups: no limit
    return max(0, free - _HEADROOM)
