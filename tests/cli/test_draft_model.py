"""Jobs with a draft model: same answers; what can't be its draft model is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchrun import LLM
from batchrun.errors import ModelError
from batchrun.jobs.errors import OptionError
from tests.cli.conftest import CommandLine
from tests.tiny import edit_config, edit_weights, write_tiny_model

PROMPTS = ["one", "a second row", "three"]
SAMPLED = ("--temperature", 1.0, "--max-tokens", 20, "--dtype", "float32")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "small", layers=1, seed=9)


def with_other_tokens(folder: Path) -> Path:
    """Swaps two tokens of a model's tokenizer."""
    path = write_tiny_model(folder, layers=1) / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(found))
    return folder


def test_a_draft_model_changes_no_answer_and_is_counted(
    batchrun: CommandLine, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = batchrun.write("in.jsonl", PROMPTS)
    drafted = ("--draft-model", small, "--draft-tokens", 3)
    assert batchrun.submit(source, *SAMPLED, *drafted, "-o", "out.jsonl").code == 0
    counted = batchrun("stats", "--json").json["drafts"]
    assert len(counted["right"]) <= len(counted["guessed"]) <= 15
    found = [row["completion"] for row in batchrun.read("out.jsonl")]
    plan = "plan", source, "--model", batchrun.model, "--json"
    sizes = [batchrun(*plan, *more).json["kv"]["token_bytes"] for more in ((), drafted)]
    assert sizes[1] > sizes[0]

    monkeypatch.setenv("BATCHRUN_HOME", str(batchrun.home))
    options = {"dtype": "float32", "max_tokens": 20, "temperature": 1.0}
    for more in ({"drafts": False}, {"draft_model": small}):
        with LLM(str(batchrun.model), **options, **more) as llm:
            assert [result.text for result in llm.generate(PROMPTS)] == found


def test_what_can_not_be_the_draft_model_is_refused(
    batchrun: CommandLine, small: Path, tmp_path: Path
) -> None:
    source = batchrun.write("in.jsonl", PROMPTS)

    def dry(*options: object) -> str:
        shown = batchrun("submit", source, "--model", batchrun.model, "--dry-run", *options)
        assert shown.code != 0
        return shown.error

    assert dry("--draft-model", small, "--no-drafts") == (
        "--draft-model with --drafts off: the draft model would be unused"
    )
    assert dry("--draft-tokens", 2).startswith("--draft-tokens needs --draft-model")
    assert "no model" in dry("--draft-model", tmp_path / "none")
    other = with_other_tokens(tmp_path / "other")
    assert dry("--draft-model", other) == (
        f"the draft model {other} can't draft for {batchrun.model}: their tokens differ: "
        f"token 67 is 'b' in {other} and 'a' in {batchrun.model}"
    )
    odd = write_tiny_model(tmp_path / "odd", layers=1)
    edit_config(odd, model_type="unheard-of")
    assert dry("--draft-model", odd).startswith(f"the draft model {odd} can't be used: the model ")


def test_it_goes_through_the_same_gates(small: Path, tmp_path: Path, batchrun: CommandLine) -> None:
    broken = write_tiny_model(tmp_path / "broken", layers=1)
    edit_weights(broken, lambda found: {n: w * float("nan") for n, w in found.items()})
    with pytest.raises(ModelError, match=r"the draft model .*broken can't be used: .*finite"):
        LLM(str(batchrun.model), draft_model=str(broken), dtype="float32")
    with pytest.raises(OptionError, match="draft_model with drafts off"):
        LLM(str(batchrun.model), draft_model=str(small), drafts=False)
