"""What a reader needs from a model whose weights are in other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from batchrun import machine
from batchrun.fleet.messages import Limits
from batchrun.jobs.spec import JobSpec
from batchrun.runner.opening import engine_settings
from batchrun.runner.reader import prompt_options

if TYPE_CHECKING:  # they import torch
    from batchrun.engine.model.generation import Generation
    from batchrun.engine.model.prepare import LoadedModel
    from batchrun.engine.settings import Encode, EncodeText
    from batchrun.grammars.matchers import Matchers


@dataclass(frozen=True)
class ModelPrompts:
    """Makes prompts: see `batchrun.runner.reader.Prompts`."""

    encode: Encode
    encode_text: EncodeText
    generation: Generation
    matchers: Matchers
    max_num_seqs: int
    max_num_batched_tokens: int


def read_model(spec: JobSpec) -> LoadedModel:
    """A job's model without its weights.

    Raises:
        ModelError: It can't be read.
    """
    with machine.importing():
        from transformers.utils import logging  # noqa: PLC0415

        from batchrun.engine.settings import load_model  # noqa: PLC0415

    logging.set_verbosity_error()
    return load_model(engine_settings(spec), "cpu", weights=False)


def model_prompts(
    loaded: LoadedModel, spec: JobSpec, limits: Limits, workers: int, log: Callable[[str], None]
) -> ModelPrompts:
    """Makes prompts for so many workers with these limits; their sequences are counted together.

    Raises:
        ModelError: The model has no chat template, and the job needs one.
    """
    from batchrun.engine.model.generation import (  # noqa: PLC0415
        read_generation,
        vocabulary_size,
    )
    from batchrun.engine.settings import prompt_encoder  # noqa: PLC0415
    from batchrun.grammars.matchers import Matchers  # noqa: PLC0415

    loaded = replace(loaded, max_model_len=limits.max_model_len)
    options: Mapping[str, Any] = prompt_options(spec)
    encode, encode_text = prompt_encoder(loaded, engine_settings(spec), options, log)
    return ModelPrompts(
        encode,
        encode_text,
        read_generation(loaded.model, loaded.tokenizer, loaded.max_model_len),
        Matchers(loaded.tokenizer, loaded.eos_ids, vocabulary_size(loaded.model)),
        limits.max_num_seqs * workers,
        limits.max_num_batched_tokens * workers,
    )
