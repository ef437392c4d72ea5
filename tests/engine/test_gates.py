"""Masks that attention is not told of, numbers that are none, routers that rounding sways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import masking_utils as masking

from batchrun.engine.attention import LayerAttention
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import SamplingParams
from batchrun.engine.model import gates
from batchrun.engine.model.judge import difference
from batchrun.engine.model.layers import check_linear
from batchrun.engine.model.masks import Seen, _read, named_windows
from batchrun.engine.model.optimize import optimize
from batchrun.engine.model.prepare import LoadedModel, has_experts, prepare
from batchrun.errors import ModelError
from tests.allocator.invariants import check_arena
from tests.parity.models import _SMALL, CONFIGS, build, seeded
from tests.parity.runner import generate, outputs, rig, run

CONTEXT = 200


def rows_of(mask_function: Callable[..., Any]) -> Callable[[int], torch.Tensor]:
    keys, none = torch.arange(CONTEXT), torch.zeros(1, dtype=torch.int64)
    return lambda position: mask_function(none, none, none + position, keys).expand(CONTEXT)


NOTHING_PADDED = torch.zeros(1, dtype=torch.int64)
WINDOW, CHUNK = masking.sliding_window_causal_mask_function, masking.chunked_causal_mask_function


@pytest.mark.parametrize(
    ("mask_function", "seen"),
    [
        (masking.causal_mask_function, Seen()),
        *((WINDOW(size), Seen(window=size)) for size in (1, 2, 23, 100, CONTEXT - 1)),
        *((CHUNK(size, NOTHING_PADDED), Seen(chunk=size)) for size in (2, 23, 64, 100, 150)),
        (WINDOW(CONTEXT), Seen()),
        (CHUNK(CONTEXT, NOTHING_PADDED), Seen()),
        (masking.bidirectional_mask_function, None),
        (masking.and_masks(WINDOW(40), CHUNK(16, NOTHING_PADDED)), Seen(chunk=16)),
        (masking.and_masks(WINDOW(10), CHUNK(16, NOTHING_PADDED)), None),
        (masking.or_masks(WINDOW(10), lambda _b, _h, _q, key: key < 4), None),  # kept sinks
    ],
)
def test_a_mask_function_says_what_a_query_sees(mask_function: Any, seen: Seen | None) -> None:
    got = _read(rows_of(mask_function), CONTEXT)
    assert got == seen
    for position in range(CONTEXT) if got is not None else ():
        row = rows_of(mask_function)(position).nonzero()[:, 0].tolist()
        assert row == list(range(got.first(position), position + 1))


def specs(loaded: LoadedModel) -> list[tuple[int | None, int | None]]:
    return [(layer.window, layer.chunk) for layer in loaded.layers]


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", [(None, None)] * 3),
        ("mistral-window", [(11, None)] * 3),
        ("gemma3", [(9, None), (None, None), (9, None)]),
        ("qwen2-moe-window", [(11, None), (None, None), (11, None)]),
        ("phimoe-window", [(11, None)] * 3),
        ("llama4-chunks", [(None, 11), (None, None), (None, 11)]),
        ("gpt-neo-window", [(None, None), (11, None)] * 2),
    ],
)
def test_layers_see_what_their_masks_let_them(name: str, windows: list[Any]) -> None:
    loaded = prepare(build(name))
    assert specs(loaded) == windows
    longest = max((n for pair in windows for n in pair if n), default=0)
    assert gates.prompt_tokens(loaded) >= longest + 19
    # What is longer than any row can be is no window at all.
    assert specs(prepare(build(name), max_model_len=9)) == [(None, None)] * len(windows)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_told_before_it_has_weights(name: str) -> None:
    """As `--dry-run` and `plan` look at it."""
    with torch.device("meta"):
        empty = tf.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    want, got = prepare(build(name)), prepare(empty)
    assert got.layers == want.layers
    assert (got.max_window, got.max_model_len) == (want.max_window, want.max_model_len)


def test_windows_that_a_config_names_and_no_layer_has_are_gone_beyond() -> None:
    config = tf.LlamaConfig(**_SMALL, attention_window_size=70, local_attention=[3, 90])
    assert sorted(named_windows(config)) == [3, 70, 90]
    assert gates.prompt_tokens(prepare(seeded(config))) == 90 + 19
    unused = tf.Qwen2Config(**_SMALL, use_sliding_window=False, sliding_window=80)
    assert list(named_windows(unused)) == []


def test_a_cache_that_forgets_what_masks_show_is_refused() -> None:
    config = tf.MoshiConfig(
        **{**_SMALL, "num_key_value_heads": 4}, head_dim=16, sliding_window=23, ffn_dim=96
    )
    model = seeded(config)
    with pytest.raises(ModelError, match=r"MoshiForCausalLM is refused: .* the last 23 in an"):
        prepare(model)
    assert specs(prepare(model, max_model_len=23)) == [(None, None)] * 3  # where it forgets nothing


class _Unchunked(SDPA):
    """Chunks forgotten: right within the first one."""

    def run(self, layer: LayerAttention, *tensors: torch.Tensor) -> torch.Tensor:
        return super().run(replace(layer, chunk=None), *tensors)


def test_the_canary_looks_beyond_a_chunk() -> None:
    loaded = prepare(build("llama4-chunks"))
    with rig(loaded) as r:
        r.executor.backend = _Unchunked()
        with pytest.raises(ModelError, match="Llama4ForCausalLM is refused"):
            gates.verify(loaded, r.executor, r.arena, 64)


def test_a_model_of_images_is_run_as_text() -> None:
    """Its layers that look at images, as of Llama 3.2, are none without one."""
    text = {**_SMALL, "cross_attention_layers": [1], "pad_token_id": 0}
    model = tf.MllamaForCausalLM(tf.models.mllama.configuration_mllama.MllamaTextConfig(**text))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    loaded = prepare(model.eval())
    assert len(loaded.layers) == 2
    prompts = [[5, 9, 33, 7], list(range(3, 60))]
    with rig(loaded) as r:
        gates.verify(loaded, r.executor, r.arena, 64)
        got = outputs(run(r, prompts, SamplingParams(max_tokens=8)))
    assert got == [generate(model, prompt, 8) for prompt in prompts]


# --- numbers that are none ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_logits_are_no_numbers_is_refused(value: float, dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = value
    with pytest.raises(ModelError, match=r"logits on a test prompt are not finite in \w+16|32"):
        gates.reference(prepare(model))


class _Broken(SDPA):
    """Attention of one head is no number."""

    def run(self, layer: LayerAttention, *tensors: torch.Tensor) -> torch.Tensor:
        out = super().run(layer, *tensors)
        out[-1, 0] = torch.nan
        return out


def test_an_engine_whose_logits_are_no_numbers_is_refused() -> None:
    loaded = prepare(build("llama"))
    with rig(loaded) as r:
        r.executor.backend = _Broken()
        with pytest.raises(ModelError, match="not finite, but its own are"):
            gates.verify(loaded, r.executor, r.arena, 64)


# --- mixtures of experts in half precision ---


def mixture(seed: int, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """Many layers of many experts: rounding is sure to send some token to another one."""
    sizes = {**_SMALL, "num_hidden_layers": 12}
    torch.manual_seed(seed)
    config = tf.PhimoeConfig(**sizes, num_local_experts=16, sliding_window=11)
    model = tf.PhimoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return prepare(model.to(dtype))


@pytest.mark.parametrize("attention", ["sdpa", "auto"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_routers_that_rounding_sways_are_no_reason_to_refuse(seed: int, attention: str) -> None:
    loaded = mixture(seed)
    want = gates.reference(loaded)
    assert want.rounding > 0.1  # the model's own two precisions disagree as much
    assert want.hooked is not None
    assert want.hooked < 1e-4
    lines: list[str] = []
    optimize(loaded.model, compile=False, log=lines.append)
    with rig(loaded, attention=attention) as r:
        assert gates.verify(loaded, r.executor, r.arena, 64, want) < 0.06
        check_arena(r.arena)


class _Wider(SDPA):
    """A window of one token too many."""

    def run(self, layer: LayerAttention, *tensors: torch.Tensor) -> torch.Tensor:
        return super().run(replace(layer, window=(layer.window or 0) + 1), *tensors)


class _Louder(SDPA):
    """One head in one layer a tenth too loud."""

    def run(self, layer: LayerAttention, *tensors: torch.Tensor) -> torch.Tensor:
        out = super().run(layer, *tensors)
        out[:, 0] *= 1.1
        return out


@pytest.mark.parametrize("backend", [_Wider, _Louder, _Broken])
def test_attention_that_is_wrong_is_told_from_routers_that_sway(backend: type[SDPA]) -> None:
    loaded = mixture(1)
    want = gates.reference(loaded)
    with rig(loaded) as r:
        r.executor.backend = backend()
        with pytest.raises(ModelError, match="PhimoeForCausalLM is refused"):
            gates.verify(loaded, r.executor, r.arena, 64, want)


def test_a_hooked_model_that_is_not_itself_is_not_excused_by_its_routers() -> None:
    loaded = mixture(1)
    want = replace(gates.reference(loaded), hooked=0.1)
    with rig(loaded) as r, pytest.raises(ModelError, match="is refused"):
        gates.verify(loaded, r.executor, r.arena, 64, want)


def test_mixtures_of_experts_are_known_as_such() -> None:
    found = {name: has_experts(seeded(config)) for name, config in CONFIGS.items()}
    mixtures = {"mixtral", "qwen3-moe", "qwen2-moe", "gpt-oss", "phimoe", "llama4", "deepseek"}
    for name, experts in found.items():
        assert experts == any(name.startswith(kind) for kind in mixtures), name


def test_a_long_reference_takes_no_scores_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = prepare(seeded(tf.MistralConfig(**_SMALL, sliding_window=11)))
    eager = gates.reference(loaded)
    asked: list[str] = []
    own = gates.set_attention
    monkeypatch.setattr(gates, "set_attention", lambda m, name: (asked.append(name), own(m, name)))
    monkeypatch.setattr(gates, "_EAGER_SCORES", 100)
    fused = gates.reference(loaded)
    assert asked == ["sdpa", "batchrun"]
    for one, other in zip(eager.logits, fused.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    asked.clear()  # transformers' SDPA knows no cap
    gates.reference(prepare(build("gemma2-softcap")))
    assert asked == ["eager", "batchrun"]


# --- one way to judge ---


def test_differences_are_shares_of_the_largest_number() -> None:
    want = torch.tensor([1.0, -4.0])
    assert difference(want.bfloat16(), want) == 0
    assert difference(torch.tensor([1.0, -3.0]), want) == 0.25
    for number in (torch.nan, torch.inf):
        assert difference(torch.tensor([1.0, number]), want) == torch.inf
    assert difference(torch.zeros(2), torch.zeros(2)) == 0


class _Off(torch.nn.Linear):
    """One number of a result is off by a share of the largest."""

    share = 0.05

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        out[3, 2] += self.share * out.abs().max()
        return out


def test_a_linear_layer_with_one_wrong_number_is_refused() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96).bfloat16()
    off = _Off(64, 96).bfloat16()
    off.load_state_dict(linear.state_dict())
    check_linear(linear, copy.deepcopy(linear), torch.bfloat16)
    with pytest.raises(ValueError, match=r"off by 0\.0(49|5\d*) of its largest"):
        check_linear(linear, off, torch.bfloat16)
    off.share = float("nan")
    with pytest.raises(ValueError, match="off by inf"):
        check_linear(linear, off, torch.bfloat16)
