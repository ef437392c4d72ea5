"""The third gate: before a job starts, the engine's logits must be the model's own."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from batchrun.engine.core import Request, SamplingParams, Segment, Sequence
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.model import HOOK, LoadedModel
from batchrun.models import ModelError

_TOLERANCE = {torch.float32: 2e-3}  # of the largest logit; half precision differs by rounding
_HALF_TOLERANCE = 0.06


def verify(loaded: LoadedModel, executor: TorchExecutor, space: KVSpace, chunk: int) -> float:
    """Compare packed, chunked logits over slots with the model's eager attention.

    Two sequences of different lengths, the longer one longer than any window and than two chunks,
    go through the slots interleaved in uneven chunks and end in single tokens.

    Args:
        loaded: The model.
        executor: The executor to judge.
        space: An idle KV space; idle again afterwards.
        chunk: Tokens computed in a step at most.

    Returns:
        The largest difference, as a share of the largest logit.

    Raises:
        ModelError: They differ; the message names the architecture and by how much.
    """
    longest = min(loaded.max_model_len, max(loaded.max_window + 19, 48))
    lengths = [longest, max(2, longest * 2 // 3)]
    vocab = int(loaded.model.config.get_text_config().vocab_size)
    rng = random.Random(0)
    sequences = [
        _sequence(i, [rng.randrange(vocab) for _ in range(n)]) for i, n in enumerate(lengths)
    ]
    with torch.inference_mode():
        got = _through_slots(sequences, executor, space, max(1, min(chunk // 2, longest // 3)))
        worst = 0.0
        loaded.model.set_attn_implementation("eager")
        try:
            for sequence, ends, logits in got:
                ids = torch.tensor([sequence.request.prompt_ids], device=loaded.device)
                keep = torch.tensor(ends, device=loaded.device) - 1
                want = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
                scale = want.float().abs().max().clamp_min(1e-6)
                worst = max(worst, float((logits.float() - want.float()).abs().max() / scale))
        finally:
            loaded.model.set_attn_implementation(HOOK)
    tolerance = _TOLERANCE.get(loaded.dtype, _HALF_TOLERANCE)
    if not worst <= tolerance:  # also refuses NaN
        raise ModelError(
            f"the architecture {loaded.architecture} is refused: on a test prompt of {longest} "
            f"tokens its logits over contiguous slots differ from its own by {worst:.2g} of the "
            f"largest logit, more than {tolerance:.2g}",
            hint="its attention does something that this version does not know",
        )
    return worst


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
    versions = [version(name) for name in ("batchrun", "torch", "transformers")]
    key = "-".join([fingerprint, str(loaded.dtype), str(loaded.device), kernels, *versions])
    path = cache / f"{key.replace('/', '_')}.json"
    if path.exists():
        return None
    worst = check()
    cache.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=cache)
    with os.fdopen(handle, "w") as file:
        json.dump({"architecture": loaded.architecture, "difference": worst}, file)
    Path(name).replace(path)
    return worst


def _sequence(row: int, ids: list[int]) -> Sequence:
    return Sequence(Request(row, 0, tuple(ids), SamplingParams(), 0))


def _through_slots(
    sequences: list[Sequence], executor: TorchExecutor, space: KVSpace, chunk: int
) -> list[tuple[Sequence, list[int], torch.Tensor]]:
    """Each sequence, its sampled ends (token counts) and the logits `[len(ends), V]` after them."""
    for sequence in sequences:
        sequence.slot = space.open(sequence.num_tokens)
    # With a single slot there is no second sequence to mix in.
    sequences = [s for s in sequences if s.slot is not None]
    ends: list[list[int]] = [[] for _ in sequences]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(s.num_computed_tokens < s.num_tokens for s in sequences):
        segments = []
        for sequence in sequences:
            start = sequence.num_computed_tokens
            # The last three tokens one by one, as decodes.
            length = min(max(1, sequence.num_tokens - 3 - start), chunk)
            if start < sequence.num_tokens and sequence.slot is not None:
                if not space.ensure(sequence.slot, start + length):
                    raise ModelError(
                        f"the KV budget can't hold a test prompt of {sequence.num_tokens} tokens",
                        hint="raise --kv-budget",
                    )
                segments.append(Segment(sequence, sequence.slot, start, length, sampled=True))
        rows = executor.logits(segments)
        for segment, row in zip(segments, rows, strict=True):
            segment.sequence.num_computed_tokens += segment.length
            ends[segment.sequence.request.row].append(segment.sequence.num_computed_tokens)
            logits[segment.sequence.request.row].append(row)
    for sequence in sequences:
        if sequence.slot is not None:
            space.close(sequence.slot, 0)
    space.retire(0)
    return [(s, e, torch.stack(r)) for s, e, r in zip(sequences, ends, logits, strict=False)]
