"""Loads a draft model, and refuses one with other tokens than the model that it drafts for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from batchrun.engine.model import loading
from batchrun.engine.model.generation import vocabulary_size
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.settings import Settings
from batchrun.errors import ModelError

_HINT = "use a smaller model of the same family, or leave out --draft-model"


@contextmanager
def as_draft(name: str | None) -> Iterator[None]:
    """Say in errors about a model that it is the draft model of that name."""
    try:
        yield
    except ModelError as error:
        said = f"the draft model {name} can't be used: {error}"
        raise ModelError(said, hint=error.hint) from error


def load_draft(
    settings: Settings, target: LoadedModel, device: str, *, weights: bool = True
) -> LoadedModel | None:
    """Load the draft model of these settings beside a model, in its dtype and on its device.

    Args:
        settings: They may name one.
        target: The model that it drafts for.
        device: The device that both are for.
        weights: See `loading.load`.

    Returns:
        The draft model, with the model's end tokens and at most its context; None if there is none.

    Raises:
        ModelError: It can't be loaded, is refused, or has other tokens.
    """
    name = settings.draft_model
    if name is None or not settings.drafts:
        return None
    with as_draft(name):
        draft = loading.load(
            settings.draft_path,
            name=name,
            dtype=str(target.dtype).removeprefix("torch."),
            device=device,
            trust_remote_code=settings.trust_remote_code,
            weights=weights,
        )
    check_tokens(draft, target, (name, settings.model_name))
    longest = min(draft.max_model_len, target.max_model_len)
    notes = tuple(f"draft model: {note}" for note in draft.notes)
    return replace(draft, max_model_len=longest, eos_ids=target.eos_ids, notes=notes)


def check_tokens(draft: LoadedModel, target: LoadedModel, names: tuple[str, str]) -> None:
    """Refuse a draft model whose tokens have other numbers than the model's, called by `names`.

    Models without tokenizers must have equally many tokens. Others may differ in how many rows
    their embeddings have beyond the tokenizer's tokens.

    Raises:
        ModelError: Its tokens differ; the message says where first.
    """
    draft_name, name = names
    difference = None
    if draft.tokenizer is None or target.tokenizer is None:
        theirs, ours = vocabulary_size(draft.model), vocabulary_size(target.model)
        if theirs != ours:
            difference = f"{draft_name} has {theirs:,}, and {name} has {ours:,}"
    elif found := first_difference(draft.tokenizer, target.tokenizer):
        id_, its, other = found
        difference = f"token {id_} is {_shown(its)} in {draft_name} and {_shown(other)} in {name}"
    if difference is not None:
        raise ModelError(
            f"the draft model {draft_name} can't draft for {name}: their tokens differ: "
            f"{difference}",
            hint=_HINT,
        )


def first_difference(one: Any, other: Any) -> tuple[int, str | None, str | None] | None:
    """The first token number for which two tokenizers have different tokens, and these.

    None stands for no such token; None as a result for no difference.
    """
    ours, theirs = ({id_: token for token, id_ in t.get_vocab().items()} for t in (one, other))
    different = (id_ for id_ in sorted(ours | theirs) if ours.get(id_) != theirs.get(id_))
    return next(((id_, ours.get(id_), theirs.get(id_)) for id_ in different), None)


def _shown(token: str | None) -> str:
    return "unknown" if token is None else repr(token)
