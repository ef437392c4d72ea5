"""Models that see images are run as text, from the folders that people have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from batchrun.engine.core import SamplingParams
from batchrun.engine.model.loading import load
from tests import tiny
from tests.parity import zoo
from tests.parity.runner import generate, outputs, rig, run

PROMPTS = [[5, 9, 33, 7], list(range(3, 60))]


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3", "llama4", "mllama", "mistral3"])
def test_a_folder_of_one_gives_generates_tokens(kind: str, tmp_path: Path) -> None:
    """Some are read by a class for text alone, which leaves what sees images in the file."""
    config = zoo.config_of(kind)
    torch.manual_seed(3)
    whole = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    whole.save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    loaded = load(str(tmp_path), dtype="float32")
    with rig(loaded, max_num_batched_tokens=20) as r:
        got = outputs(run(r, PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True)))
    assert got == [generate(whole, prompt, 8, eos_token_id=[]) for prompt in PROMPTS]
