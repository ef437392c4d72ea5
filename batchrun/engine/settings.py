"""How a model is to run, and what that means on this machine: known before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import log2
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import torch

from batchrun import machine
from batchrun.allocator.cuda import Driver
from batchrun.allocator.layout import KVLayout, LayerKV, planes_of
from batchrun.allocator.vmm import AllocatorError
from batchrun.engine import attention
from batchrun.engine.attention import Geometry
from batchrun.engine.core import EngineError
from batchrun.engine.model import loading
from batchrun.engine.model.generation import vocabulary_size, within_vocabulary
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.prefixes import KEPT
from batchrun.errors import ModelError
from batchrun.prompts.builder import prompt_builder

Encode = Callable[[Mapping[str, Any]], tuple[int, ...]]
EncodeText = Callable[[str, Mapping[str, Any] | None], tuple[int, ...]]

_HOST_PAGE = 256 << 10  # bytes, of all slabs of a slot together
_LEAST_HOST_PAGE = 8 << 10  # bytes: smaller pages take longer to map than to fill
# The driver takes as long to map an allocation of 128 MiB as one of 2 MiB (docs/memory.md).
_DEVICE_PAGE_TOKENS = 32
_LEAST_DEVICE_PAGE = 2 << 20  # bytes
_MOST_ADDRESSES = 1 << 46  # bytes of slots; a process has less than twice as many addresses
_HOST_HEADROOM = 512 << 20  # bytes of memory that the KV cache leaves to everything else
DEVICE_HEADROOM = 512 << 20  # the same on a GPU, for other processes
_STEP_SHARE = 0.1  # the part of a step's time that its fixed cost should take


@dataclass(frozen=True)
class Limits:
    """The limits of a step."""

    max_num_seqs: int
    max_num_batched_tokens: int

    def step_tokens(self, step_cost: float | None) -> int:
        """Tokens per step, so that a step's fixed cost is a tenth of its time.

        Between a quarter of the default and twice the default; the default if the cost is unknown.
        """
        if not step_cost:
            return self.max_num_batched_tokens
        wanted = 1 << max(0, round(log2(step_cost / _STEP_SHARE)))
        least = max(self.max_num_seqs, self.max_num_batched_tokens // 4)
        return max(least, min(wanted, 2 * self.max_num_batched_tokens))


_CPU, _GPU, _LARGE_GPU = Limits(256, 1024), Limits(256, 8192), Limits(512, 8192)
_LARGE = 40 << 30  # bytes: a smaller GPU has no room for the KV cache and logits of so many


@dataclass(frozen=True)
class Settings:
    """How to run a model. Nothing here changes the results.

    Args:
        model_path: Folder with config, tokenizer and safetensors.
        model_name: What to call it in messages.
        fingerprint: Of the model's content, for cached verdicts.
        cache: Folder of cached verdicts.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        quantize: `int8` for 8-bit weights, or None.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        attention: Name of the attention backend.
        max_num_seqs: Maximum number of running sequences; None for the device's default.
        max_num_batched_tokens: Maximum number of tokens computed in one step; None for the device's
            default, adjusted by `step_cost`.
        step_cost: The fixed cost of a step, in units of the time of one token, as measured in
            earlier runs; None if there were none.
        max_model_len: Context length; None for the model's own.
        kv_budget: Maximum bytes of KV pages; None for what the device has.
        page_size: Bytes of a KV page. None on a CPU: 8 to 256 KiB, larger with fewer slabs. None on
            a GPU: enough for about 32 tokens, but at least the driver's minimum.
        layers_per_slab: Layers whose keys and values are stored together. None: all on a GPU; on a
            CPU, one if a layer's part of a token is smaller than a page of the system, else all.
        share_prefixes: Whether rows with a common prefix compute and store it once.
        drafts: Whether draft tokens are proposed; only where attention takes several tokens of each
            row in one call.
        draft_model: What to call the model that proposes them; None for the row's own text.
        draft_path: Its folder.
        draft_fingerprint: Of its content.
        draft_tokens: Draft tokens of a draft model, per sequence and step; None for as many as pay.
        overlap: Whether the host prepares the next step while the device computes one.
        graphs: Whether steps are recorded as CUDA graphs, those with prompts in pieces.
        optimize: Whether the model's modules are fused, and compiled on a GPU.
        deterministic: Whether an answer must not depend on the batch, even if that is slower.
        trust_remote_code: Whether the model's own Python code may run.
    """

    model_path: str
    model_name: str
    fingerprint: str
    cache: Path
    dtype: str = "auto"
    quantize: str | None = None
    device: str = "auto"
    attention: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    step_cost: float | None = None
    max_model_len: int | None = None
    kv_budget: int | None = None
    page_size: int | None = None
    layers_per_slab: int | None = None
    share_prefixes: bool = True
    drafts: bool = True
    draft_model: str | None = None
    draft_path: str = ""
    draft_fingerprint: str = ""
    draft_tokens: int | None = None
    overlap: bool = True
    graphs: bool = True
    optimize: bool = True
    deterministic: bool = False
    trust_remote_code: bool = False

    def limits(self, device: str) -> Limits:
        """The limits of a step: as requested, or the device's default."""
        default = _CPU if device == "cpu" else _gpu_limits(device)
        tokens = self.max_num_batched_tokens or default.step_tokens(self.step_cost)
        return Limits(self.max_num_seqs or default.max_num_seqs, tokens)


def _gpu_limits(device: str) -> Limits:
    """Twice the sequences on a large GPU: it made an H100 a seventh faster (decision 28)."""
    if not torch.cuda.is_available():
        return _GPU
    has = torch.cuda.get_device_properties(device).total_memory
    return _LARGE_GPU if has >= _LARGE else _GPU


def choose_device(name: str, log: Callable[[str], None] = lambda _: None) -> str:
    """The torch device that `--device` means.

    Raises:
        ModelError: There is no such device here; the message says what is missing.
    """
    if name == "cpu":
        return "cpu"
    problem = _why_no_cuda(name)
    if problem is None:
        return "cuda:0" if name in {"auto", "cuda"} else name
    if name != "auto":
        raise ModelError(f"the device {name} can't be used: {problem}", hint="use --device cpu")
    if torch.cuda.is_available():
        log(f"computing on the CPU, because the GPU can't be used: {problem}")
    return "cpu"


def _why_no_cuda(name: str) -> str | None:
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device"
            if torch.version.cuda
            else f"torch {torch.__version__} is built without CUDA"
        )
    if name not in {"auto", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}:
        return f"the devices are cuda:0 to cuda:{torch.cuda.device_count() - 1}"
    try:
        Driver()
    except AllocatorError as error:
        return str(error)
    return None


def kv_layout(
    loaded: LoadedModel, settings: Settings, draft: LoadedModel | None = None, *, cuda: bool
) -> KVLayout:
    """The layout of a model's KV memory. A device's driver may make its pages larger.

    The layers of a draft model follow the model's: what holds a token for one holds it for both.
    """
    specs = (*loaded.layers, *(() if draft is None else draft.layers))
    layers = tuple(LayerKV(s.kv_heads, s.k_dim, s.v_dim) for s in specs)
    element, per_slab = loaded.dtype.itemsize, settings.layers_per_slab
    if per_slab is None:
        dense = not cuda and max(layer.width for layer in layers) * element < PAGESIZE
        per_slab = 1 if dense else len(layers)
    per_slab = min(per_slab, len(layers))
    page_size = settings.page_size
    if page_size is None and cuda:
        slab = sum(layer.width for layer in layers) * element * per_slab / len(layers)
        page_size = max(_LEAST_DEVICE_PAGE, 1 << round(log2(_DEVICE_PAGE_TOKENS * slab)))
    elif page_size is None:
        fair = 1 << (_HOST_PAGE // -(-len(layers) // per_slab)).bit_length() - 1
        page_size = max(_LEAST_HOST_PAGE, fair)
    planes = planes_of(layers, per_slab)
    return KVLayout(layers, element, page_size, loaded.max_model_len, per_slab, planes)


def load_model(
    settings: Settings,
    device: str,
    *,
    weights: bool = True,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> LoadedModel:
    """The model that a job names: see `batchrun.engine.model.loading.load`."""
    return loading.load(
        settings.model_path,
        name=settings.model_name,
        dtype=settings.dtype,
        quantize=settings.quantize,
        device=device,
        trust_remote_code=settings.trust_remote_code,
        max_model_len=settings.max_model_len,
        weights=weights,
        told=told,
    )


def fit_context(
    loaded: LoadedModel, settings: Settings, device: str, draft: LoadedModel | None = None
) -> LoadedModel:
    """Shorten the context if slots would exceed the address space, unless a length was given.

    Each sequence reserves addresses for the whole context, and a process has only 2^47.
    """
    seqs = settings.limits(device).max_num_seqs
    layout = kv_layout(loaded, settings, draft, cuda=device != "cpu")
    most = _MOST_ADDRESSES // ((seqs + KEPT + 1) * layout.bytes_per_token)
    if settings.max_model_len is not None or layout.slot_tokens <= most:
        return loaded
    limit = 1 << most.bit_length() - 1
    note = (
        f"context limited to {limit:,} of {loaded.max_model_len:,} tokens: more for each of {seqs} "
        "sequences would exceed the address space; for a longer one, set --max-model-len and a "
        "lower --max-num-seqs"
    )
    return replace(loaded, max_model_len=limit, notes=(*loaded.notes, note))


def prompt_encoder(
    loaded: LoadedModel, settings: Settings, prompt: Mapping[str, Any], log: Callable[[str], None]
) -> tuple[Encode, EncodeText]:
    """Functions from a row's fields to its prompt's tokens, and from a text to those behind it.

    See `PromptBuilder`, whose arguments `prompt` has, and its `continuation`.
    """
    builder = prompt_builder(
        loaded.tokenizer,
        prompt,
        max_model_len=loaded.max_model_len,
        model=settings.model_name,
        log=log,
    )
    known = loaded.tokenizer, vocabulary_size(loaded.model)
    text = within_vocabulary(builder.continuation, *known, "text to score")
    return within_vocabulary(builder, *known), text


def check_backend(loaded: LoadedModel, settings: Settings, device: str) -> None:
    """Refuse, before weights are loaded, an attention backend requested by name that can't be used.

    Raises:
        EngineError: It can't serve this model on this device.
    """
    cuda = device != "cpu"
    layout, limits = kv_layout(loaded, settings, cuda=cuda), settings.limits(device)
    geometry = geometry_of(loaded, limits, layout.slot_tokens, num_slots(limits, cuda=cuda))
    there = replace(geometry, device=torch.device(device), deterministic=settings.deterministic)
    try:
        attention.check(settings.attention, there)
    except ValueError as error:
        raise no_backend(error) from error


def num_slots(limits: Limits, models: int = 1, *, cuda: bool) -> int:
    """Slots for running sequences, for kept prefixes, and for fillers of each model's graphs."""
    return limits.max_num_seqs + KEPT + models * cuda


def geometry_of(loaded: LoadedModel, limits: Limits, slot_tokens: int, slots: int) -> Geometry:
    """The geometry that attention is made for, on the model's device."""
    return Geometry(
        layers=loaded.layers,
        slot_tokens=slot_tokens,
        num_slots=slots,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        dtype=loaded.dtype,
        device=loaded.device,
    )


def logits_bytes(loaded: LoadedModel) -> int:
    """Bytes of the logits of one token."""
    vocabulary: int = loaded.model.config.get_text_config().vocab_size
    return vocabulary * loaded.dtype.itemsize


def no_backend(error: ValueError) -> EngineError:
    """The error for an attention backend requested by name that can't be used."""
    return EngineError(
        str(error), hint="use --attention auto; `batchrun doctor` lists what works here"
    )


def available_memory() -> int:
    """Bytes that the KV cache may still take: free memory less some headroom."""
    return machine.available_memory() - _HOST_HEADROOM
