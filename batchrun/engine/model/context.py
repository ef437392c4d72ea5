"""A model's context length: its positions, and how RoPE scaling changes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from batchrun.errors import ModelError
from batchrun.models.files import shown

# The names in configs; transformers maps most architectures to the first.
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_DEFAULT = 8192
_MOST = 1 << 40  # tokens, or a scaling factor
# Their frequencies depend on the longest sequence in the batch: beyond the original length one row
# would change another row's tokens.
_BY_LONGEST_ROW = {"longrope", "su", "dynamic"}


def context_length(config: Any, wanted: int | None) -> tuple[int, tuple[str, ...]]:
    """The context length to use, and notes on why it may differ from the model card's.

    Args:
        config: The text config of a transformers model.
        wanted: What the user asked for, in tokens.

    Raises:
        ModelError: The user asked for more than the model holds, or the config makes no sense.
    """
    given = next((n for name in _NAMES if isinstance(n := getattr(config, name, None), int)), None)
    if given is not None and given < 1:
        raise _unfit(f"a context of {given} tokens")
    limit, notes = given or wanted or _DEFAULT, []
    if given is None and wanted is None:
        notes.append(
            f"context of {limit} tokens: the model's config has none; set it with --max-model-len"
        )
    # A model's own code may know only the old name.
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    for rope, each_layer in _rope_settings(settings):
        factor = rope.get("factor") or 1.0
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        for number in (factor, original or 1):
            if not isinstance(number, int | float) or not 0 < number < _MOST:
                raise _unfit(f"RoPE scaling with a factor or length of {shown(number)}")
        kind = rope.get("rope_type") or rope.get("type")
        if kind in _BY_LONGEST_ROW and given:
            full = max(limit, int(limit * factor)) if kind == "dynamic" else limit
            original = limit if kind == "dynamic" else int(original or limit)
            if original < full:
                notes.append(
                    f"context limited to {original} of {full} tokens: beyond that, {kind} RoPE "
                    "would make each row depend on the longest row of its batch"
                )
                limit = original
        elif kind == "yarn" and original:
            # Most configs give the product; settings copied from a model card do not.
            limit = max(limit, int(original * factor))
        elif kind == "linear" and given and not each_layer:
            # Not if each type of layer has its own settings: Gemma 3's config gives the product.
            limit = int(limit * factor)
    if wanted is not None and wanted > limit:
        why = f" ({notes[0]})" if notes else ""
        raise ModelError(
            f"--max-model-len {wanted} is more than the {limit} tokens this model supports{why}",
            hint=f"use --max-model-len {limit} or less",
        )
    if wanted is not None:
        return wanted, ()
    return limit, tuple(notes)


def _unfit(what: str) -> ModelError:
    return ModelError(
        f"the model's config.json has {what}", hint="use the one that came with the weights"
    )


def _rope_settings(
    value: Any, *, each_layer: bool = False
) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Each RoPE setting in a config, and whether each type of layer has its own."""
    if isinstance(value, Mapping):
        if "rope_type" in value or "type" in value:
            yield value, each_layer
        for inner in value.values():
            yield from _rope_settings(inner, each_layer=True)
