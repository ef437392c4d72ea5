"""`submit --dry-run` fails where the run would, and starts nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.specs import OPTIONS
from tests.cli.conftest import CommandLine
from tests.tiny import CHAT_TEMPLATE, edit_config

FINE = "all checks passed; nothing was started (--dry-run)"


@pytest.fixture
def plain(batchrun: CommandLine, tmp_path: Path) -> CommandLine:
    """With a copy of the model, without a chat template."""
    copy = shutil.copytree(batchrun.model, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    return replace(batchrun, model=copy)


LONG = ("--template", "{prompt}" * 80)


def edit_tokenizer(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("options", [("--chat",), ("--system", "Be brief."), ("--system", "")])
def test_chats_for_a_model_without_a_template_are_refused_at_once(
    plain: CommandLine, options: tuple[str, ...], dry: tuple[str, ...]
) -> None:
    source = plain.write("in.jsonl", ["one"])
    shown = plain.submit(source, *options, *dry)
    assert (shown.code, shown.error) == (1, f"the model {plain.model} has no chat template")
    assert "instruct model" in shown.hint
    assert plain("list", "--json").json == []
    assert plain.submit(source, "--dry-run").out.endswith(FINE + "\n")


@pytest.mark.parametrize("column", ["messages", "talk"])
def test_columns_of_chats_are_refused_at_once_too(plain: CommandLine, column: str) -> None:
    chats = [[{"role": "user", "content": "hello"}]]
    source = plain.write("in.parquet", ["one"], **{column: chats})
    shown = plain.submit(source, "--prompt-column", column)
    assert (shown.code, "has no chat template" in shown.error) == (1, True)


def test_a_template_in_the_tokenizers_config_is_one(plain: CommandLine) -> None:
    edit_tokenizer(plain.model, chat_template=CHAT_TEMPLATE)
    source = plain.write("in.jsonl", ["one"])
    assert plain.submit(source, "--chat", "--dry-run").out.endswith(FINE + "\n")


def test_what_the_files_leave_open_the_dry_run_finds(plain: CommandLine) -> None:
    (plain.model / "tokenizer_config.json").unlink()
    source = plain.write("in.jsonl", ["one"])
    dry = plain.submit(source, "--chat", "--dry-run")
    assert (dry.code, "has no chat template" in dry.error) == (1, True)
    run = plain.submit(source, "--chat")
    assert (run.code, run.error) == (dry.code, dry.error)


def test_submitting_reads_the_template_without_torch(plain: CommandLine) -> None:
    source = plain.write("in.jsonl", ["one"])
    code = (
        "import sys, batchrun.cli\n"
        "try: batchrun.cli.main(sys.argv[1:])\n"
        "finally: print({'torch', 'transformers'} & set(sys.modules))"
    )
    arguments = ["submit", str(source), "--chat", "--model", str(plain.model)]
    shown = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=plain.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "has no chat template" in shown.stderr
    assert shown.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--attention", "torch-flash", "--device", "cpu"), "torch-flash can't be used: it needs"),
        pytest.param(
            ("--attention", "native", "--dtype", "float16"),
            "not in float16",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ("--max-model-len", 10_000),
            "--max-model-len 10000 is more than the 256 tokens",
            marks=pytest.mark.long,
        ),
        (("--kv-budget", "4KiB", "--page-size", "8KiB"), "can't hold a test prompt of 48 tokens"),
        (
            ("--kv-budget", "32KiB", "--page-size", "4KiB", "--dtype", "float32", *LONG),
            "the prompt has 240 tokens, whose keys and values exceed the KV budget",
        ),
        (("--num-beams", 8, "--max-num-seqs", 4), "the row has 8 beams, but only 4 sequences run"),
        (
            ("--template", "{prompt}" * 300),
            "and the context holds 256, of which the answer needs at least one",
        ),
    ],
)
def test_what_the_run_refuses_the_dry_run_does(
    batchrun: CommandLine, options: tuple[object, ...], error: str
) -> None:
    source = batchrun.write("in.jsonl", ["one", "two"])
    dry = batchrun.submit(source, *options, "--max-tokens", 2, "-o", "out.jsonl", "--dry-run")
    assert (dry.code, error in dry.error, FINE in dry.out) == (1, True, False)
    assert dry.hint
    run = batchrun.submit(source, *options, "--max-tokens", 2, "-o", "out.jsonl")
    if run.code == 1:
        assert run.error == dry.error
    else:  # each row has that error
        assert run.code == 3
        errors = {row["error"] for row in batchrun.read("out.jsonl")}
        assert [said in dry.error for said in errors] == [True]


def test_an_architecture_that_is_refused(batchrun: CommandLine, tmp_path: Path) -> None:
    batchrun = replace(batchrun, model=shutil.copytree(batchrun.model, tmp_path / "strange"))
    edit_config(batchrun.model, model_type="of-its-own", architectures=["StrangeForCausalLM"])
    source = batchrun.write("in.jsonl", ["one"])
    dry, run = batchrun.submit(source, "--dry-run"), batchrun.submit(source)
    assert (dry.code, "of-its-own" in dry.error) == (1, True)
    assert (dry.error, dry.hint) == (run.error, run.hint)


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def shard(weights: Path) -> None:
    """As if of two files only the first had been downloaded."""
    first = "model-00001-of-00002.safetensors"
    weights.rename(weights.with_name(first))
    where = {"a": first, "b": "model-00002-of-00002.safetensors"}
    weights.with_name("model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )


@pytest.mark.parametrize(("harm", "said"), [(cut, "incomplete"), (shard, "00002-of-00002")])
def test_weights_that_are_not_all_there(
    batchrun: CommandLine, tmp_path: Path, harm: object, said: str
) -> None:
    batchrun = replace(batchrun, model=shutil.copytree(batchrun.model, tmp_path / "cut"))
    assert callable(harm)
    harm(batchrun.model / "model.safetensors")
    shown = batchrun.submit(batchrun.write("in.jsonl", ["one"]), "--dry-run")
    assert shown.code == 1
    assert str(batchrun.model) in shown.error
    assert said in shown.error


def test_rows_of_which_none_makes_a_prompt(batchrun: CommandLine) -> None:
    source = batchrun.write("in.parquet", [None] * 20 + ["late"])
    dry = batchrun.submit(source, "--dry-run")
    assert (dry.code, FINE in dry.out) == (1, False)
    assert dry.error == (
        "none of the first 20 rows can be computed; row 0: the prompt is null, not text"
    )
    assert batchrun.submit(source, "--dry-run", "--skip-empty").code == 0


def test_rows_of_which_some_make_none(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["fine", 7, "fine", None])
    dry = batchrun.submit(source, "--dry-run", "--n", 2, "--temperature", 1)
    assert (dry.code, dry.out.endswith(FINE + "\n")) == (0, True)
    assert dry.err == "2 of the first 4 rows will fail; row 1: the prompt is a number, not text\n"
    limited = batchrun.submit(source, "--dry-run", "--limit", 1)
    assert (limited.code, limited.err) == (0, "")


def test_it_shows_the_rows_the_first_prompt_and_every_parameter_in_force(
    batchrun: CommandLine,
) -> None:
    source = batchrun.write("in.jsonl", [None, "Hello", "there"])
    options = (source, "--chat", "--top-k", 0, "--seed", 0, "--limit", 2, "--dry-run")
    shown = batchrun.submit(*options)
    lines = [" ".join(line.split()) for line in shown.out.splitlines()]
    assert lines[:2] == [f"inputs {source}", "rows 2"]
    found = batchrun.submit(*options, "--json").json
    prompt = found["first_prompt"]
    assert (found["rows"], prompt["row"]) == (2, 1)
    assert f"the first prompt, of row 1, has {prompt['tokens']} tokens:" in lines
    assert "Hello" in prompt["text"]
    for line in ("top-k: 0 (set)", "seed: 0 (set)", "temperature: 0.0", "prompt-column: prompt"):
        assert any(line in text for text in lines), line
    assert any(text.endswith("(the model's)") for text in lines)
    every = {name: said for part in found["parameters"].values() for name, said in part.items()}
    assert every.keys() == OPTIONS.keys()
    assert every["limit"] == {"value": 2, "from": "command line"}
    assert every["max_tokens"] == {"value": 512, "from": "default"}
    assert every["max_model_len"]["from"] == "model"
    assert every["dtype"]["value"] in ("float32", "bfloat16")


def test_what_the_models_generation_config_sets_is_shown_as_the_models(
    plain: CommandLine,
) -> None:
    config = {"do_sample": True, "temperature": 0.3, "top_p": 0.9, "max_new_tokens": 7}
    (plain.model / "generation_config.json").write_text(json.dumps(config))
    source = plain.write("in.jsonl", ["Hello"])
    found = plain.submit(source, "--top-p", 0.5, "--dry-run", "--json").json["parameters"]
    sampling = found["Sampling"]
    assert sampling["temperature"] == {"value": 0.3, "from": "model"}
    assert sampling["max_tokens"] == {"value": 7, "from": "model"}
    assert sampling["top_p"] == {"value": 0.5, "from": "command line"}
