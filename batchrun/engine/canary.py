"""The third gate: before a job starts, the engine's logits must be the model's own."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from batchrun.engine.core import Request, SamplingParams, Segment, Sequence
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.model import HOOK, LoadedModel
from batchrun.models import ModelError

_TOLERANCE = {torch.float32: 2e-3}  # of the largest logit; half precision differs by rounding
_HALF_TOLERANCE = 0.06
_TIMES_ROUNDING = 3  # as often as the model itself is off in its dtype; at most so much:
_MOST_TOLERANCE = 0.5  # what attends to other tokens differs by more
_COMPARED = 4  # the last chunk's end, and the decodes behind it


@dataclass(frozen=True)
class Reference:
    """The model's own logits for the test sequences.

    Args:
        logits: Of each, the last few, `[n, V]`, by eager attention.
        rounding: How far they are from float32's, as a share of the largest: what many layers of
            half precision make of rounding. 0 in float32, and where that can't be had.
    """

    logits: tuple[torch.Tensor, ...]
    rounding: float


def reference(loaded: LoadedModel) -> Reference:
    """Compute it; to be done before `optimize` puts other attention into the model's modules."""
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            logits, rounding = _own_logits(loaded), 0.0
            if loaded.dtype.itemsize < 4:
                with suppress(RuntimeError, TypeError, ValueError), _in_float32(loaded.model):
                    pairs = zip(logits, _own_logits(loaded), strict=True)
                    rounding = max(_difference(*pair) for pair in pairs)
    finally:
        loaded.model.set_attn_implementation(HOOK)
    return Reference(logits, rounding)


def _own_logits(loaded: LoadedModel) -> tuple[torch.Tensor, ...]:
    found = []
    for sequence in _sequences(loaded):
        ids = torch.tensor([sequence.request.prompt_ids], device=loaded.device)
        keep = torch.arange(ids.shape[1], device=loaded.device)[-_COMPARED:]
        output = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=keep)
        found.append(output.logits[0].float())
    return tuple(found)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Each module computes in float32; no more than one has its weights twice at a time."""
    halves: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                halves[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in halves:
                parameter.data = halves.pop(parameter)

    hooks = [m.register_forward_pre_hook(widen) for m in model.modules()]
    hooks += [m.register_forward_hook(restore) for m in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, half in halves.items():  # of a forward that failed
            parameter.data = half


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number wanted."""
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))


def verify(
    loaded: LoadedModel,
    executor: TorchExecutor,
    space: KVSpace,
    chunk: int,
    want: Reference | None = None,
) -> float:
    """Compare packed, chunked logits over slots with the model's eager attention.

    Two sequences of different lengths, the longer one longer than any window and than two chunks,
    go through the slots interleaved in uneven chunks and end in single tokens.

    Args:
        loaded: The model.
        executor: The executor to judge.
        space: An idle KV space; idle again afterwards.
        chunk: Tokens computed in a step at most.
        want: Its `reference`; None to compute it now.

    Returns:
        The largest difference, as a share of the largest logit.

    Raises:
        ModelError: They differ; the message names the architecture and by how much.
    """
    sequences = _sequences(loaded)
    longest = sequences[0].num_tokens
    want = reference(loaded) if want is None else want
    worst = 0.0
    with torch.inference_mode():
        chunk = max(1, min(chunk // 2, longest // 3))
        for sequence, logits in _through_slots(sequences, executor, space, chunk):
            wanted = want.logits[sequence.request.row][-len(logits) :]
            worst = max(worst, _difference(logits.float(), wanted))
    tolerance = max(
        _TOLERANCE.get(loaded.dtype, _HALF_TOLERANCE),
        min(_MOST_TOLERANCE, _TIMES_ROUNDING * want.rounding),
    )
    if not worst <= tolerance:  # also refuses NaN
        raise ModelError(
            f"the architecture {loaded.architecture} is refused: on a test prompt of {longest} "
            f"tokens its logits over contiguous slots differ from its own by {worst:.2g} of the "
            f"largest logit, more than {tolerance:.2g}",
            hint="its attention does something that this version does not know",
        )
    return worst


def seen(loaded: LoadedModel, fingerprint: str, cache: Path) -> bool:
    """Whether the model has passed with any kernels; arguments as of `verify_once`."""
    return any(cache.glob(f"{_key(loaded, fingerprint)}-*"))


def verify_once(
    loaded: LoadedModel, fingerprint: str, cache: Path, kernels: str, check: Callable[[], float]
) -> float | None:
    """Run `check` unless this model passed it before with the same versions, dtype and kernels.

    Args:
        loaded: The model.
        fingerprint: Identifies its weights and config.
        cache: Folder of remembered verdicts.
        kernels: Names what computes.
        check: Calls `verify`.

    Returns:
        What `check` returned, or None where the verdict was remembered.
    """
    path = cache / f"{_key(loaded, fingerprint)}-{kernels.replace('/', '_')}.json"
    if path.exists():
        return None
    worst = check()
    cache.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=cache)
    with os.fdopen(handle, "w") as file:
        json.dump({"architecture": loaded.architecture, "difference": worst}, file)
    Path(name).replace(path)
    return worst


def _key(loaded: LoadedModel, fingerprint: str) -> str:
    versions = [_version(name) for name in ("batchrun", "torch", "transformers")]
    return "-".join([fingerprint, str(loaded.dtype), str(loaded.device), *versions])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # it runs from a checkout
        return "uninstalled"


def prompt_tokens(loaded: LoadedModel) -> int:
    """Tokens of the longer test prompt: beyond a window, where there is one."""
    return min(loaded.max_model_len, max(loaded.max_window + 19, 48))


def budget_too_small(tokens: int) -> ModelError:
    """The error for KV memory that does not hold a test prompt of so many tokens."""
    return ModelError(
        f"the KV budget can't hold a test prompt of {tokens} tokens", hint="raise --kv-budget"
    )


def _sequences(loaded: LoadedModel) -> list[Sequence]:
    longest = prompt_tokens(loaded)
    vocab = int(loaded.model.config.get_text_config().vocab_size)
    rng = random.Random(0)
    return [
        Sequence(Request(i, 0, tuple(rng.randrange(vocab) for _ in range(n)), SamplingParams(), 0))
        for i, n in enumerate([longest, max(2, longest * 2 // 3)])
    ]


def _through_slots(
    sequences: list[Sequence], executor: TorchExecutor, space: KVSpace, chunk: int
) -> list[tuple[Sequence, torch.Tensor]]:
    """Each sequence, and the logits `[n, V]` after its last tokens."""
    for sequence in sequences:
        sequence.slot = space.open(sequence.num_tokens)
    # With a single slot there is no second sequence to mix in.
    sequences = [s for s in sequences if s.slot is not None]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(s.num_computed_tokens < s.num_tokens for s in sequences):
        segments = []
        for sequence in sequences:
            start = sequence.num_computed_tokens
            # The last three tokens one by one, as decodes.
            length = min(max(1, sequence.num_tokens - 3 - start), chunk)
            if start < sequence.num_tokens and sequence.slot is not None:
                if not space.ensure(sequence.slot, start + length):
                    raise budget_too_small(sequence.num_tokens)
                segments.append(Segment(sequence, sequence.slot, start, length, sampled=True))
        rows = executor.logits(segments)
        for segment, row in zip(segments, rows, strict=True):
            segment.sequence.num_computed_tokens += segment.length
            logits[segment.sequence.request.row].append(row)
    for sequence in sequences:
        if sequence.slot is not None:
            space.close(sequence.slot, 0)
    space.retire(0)
    return [(s, torch.stack(r[-_COMPARED:])) for s, r in zip(sequences, logits, strict=False)]
