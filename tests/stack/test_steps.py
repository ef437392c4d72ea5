"""Whole steps on fake CUDA tensors, which know their device and shape but hold no numbers.

They refuse operands on different devices, and whatever would wait for the device to know a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch._subclasses import FakeTensorMode

from batchrun.engine.attention import Geometry
from batchrun.engine.attention.torch_flash import TorchFlash
from batchrun.engine.core import Request, SamplingParams, Segment
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.engine.plan import NewSequence, StepPlan
from batchrun.engine.transfers import Download, Transfers
from tests.parity.models import CONFIGS

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
CUDA = torch.device("cuda:0")
SLOTS, SLOT_TOKENS = 6, 64


class Unread:
    """A download that nobody waits for."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.tensors = tensors

    def get(self) -> list[list[Any]]:
        raise NotImplementedError


class ToFakes(Transfers):
    """Uploads to the fake device."""

    def upload(self, array: np.ndarray[Any, Any], to: torch.Tensor | None = None) -> torch.Tensor:
        source = torch.from_numpy(np.ascontiguousarray(array))
        if to is not None:
            assert (to.dtype, to.device) == (source.dtype, CUDA)
            return to.view(-1)[: source.numel()].view(source.shape)
        return torch.empty(source.shape, dtype=source.dtype, device=CUDA)

    def download(self, *tensors: torch.Tensor) -> Download:
        return Unread(tensors)


@contextmanager
def executor(name: str) -> Iterator[tuple[TorchExecutor, LoadedModel]]:
    with FakeTensorMode():
        with CUDA:
            model = tf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
        loaded = prepare(model)
        geometry = Geometry(loaded.layers, SLOT_TOKENS, SLOTS, SLOTS, 128, torch.bfloat16, CUDA)
        transfers = ToFakes()
        kernel = torch.ops.aten._flash_attention_forward
        views = [
            tuple(
                torch.empty(SLOTS, SLOT_TOKENS, s.kv_heads, dim, dtype=torch.bfloat16, device=CUDA)
                for dim in (s.k_dim, s.v_dim)
            )
            for s in loaded.layers
        ]
        backend = TorchFlash(geometry, transfers.upload, kernel)
        yield TorchExecutor(loaded, views, [], backend, transfers, lag=1), loaded  # type: ignore[arg-type]


PROMPT = tuple(range(3, 23))


def segment(slot: int, length: int) -> Segment:
    """A whole prompt, or with a length of 1 a decode of it whose token is on the device."""
    return Segment(slot, 20 - length, length, True, PROMPT if length > 1 else ())


def launch(
    made: TorchExecutor, segments: Sequence[Segment], *params: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Of rows with these parameters."""
    each = zip_longest((s.slot for s in segments), params, fillvalue={})
    new = [
        NewSequence(slot, Request(slot, 0, PROMPT, SamplingParams(**asked), 0))
        for slot, asked in each
    ]
    ticket = made.launch(StepPlan(0, tuple(segments), tuple(new)))
    made.sample(ticket)
    tokens = ticket.tokens
    assert isinstance(tokens, Unread)
    return tokens.tensors


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", "gemma3"])
def test_steps_of_decodes_and_prompts_stay_on_the_device(name: str) -> None:
    with executor(name) as (made, _):
        for lengths in ([1, 1, 20, 20], [1, 1], [20]):
            (tokens,) = launch(made, [segment(i, n) for i, n in enumerate(lengths)])
            assert tokens.shape == (len(lengths),)
            assert tokens.device == CUDA


def test_a_recorded_step_stays_on_the_device() -> None:
    with executor("llama") as (made, _):
        made.capture([1, 2, 4], SLOTS - 1, lambda step: (lambda: None, step()))
        (tokens,) = launch(made, [segment(i, 1) for i in range(3)])
        assert tokens.shape == (3,)


def unrecorded(step: Any) -> Any:
    raise AssertionError("a size was met for the second time")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_in_pieces_stays_on_the_device(name: str) -> None:
    with executor(name) as (made, _):
        made.record_pieces(SLOTS - 1, most=128, sampled=4, record=unrecorded)
        for lengths in ([1, 20, 20], [1, 1, 1], [20]):
            (tokens,) = launch(made, [segment(i, n) for i, n in enumerate(lengths)])
            assert tokens.shape == (len(lengths),)
            assert tokens.device == CUDA


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "min_tokens": 2},
        {"presence_penalty": 1.0, "scored": True},
        {"num_beams": 2},
    ],
    ids=" ".join,
)
def test_no_way_to_sample_waits_for_the_device(params: dict[str, Any]) -> None:
    with executor("llama") as (made, _):
        for few in ([params], [params, {}, params]):
            tensors = launch(made, [segment(i, 20) for i in range(len(few))], *few)
            assert {tensor.device for tensor in tensors} == {CUDA}
            assert tensors[0].shape == (len(few),)
