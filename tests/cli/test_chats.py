"""Chats from files: as OpenAI, ShareGPT and Parquet have them, with tools and control tokens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import CommandLine
from tests.engine.chat_templates import QWEN3

SHORT = ("--max-tokens", 1, "--max-model-len", 2048)
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hel"}]
USUAL = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
ZONE = {"type": "object", "properties": {"zone": {"type": "string"}}}
TOOL = {"name": "now", "parameters": ZONE}


@pytest.fixture
def qwen(batchrun: CommandLine, tmp_path: Path) -> CommandLine:
    """With a copy of the model whose template knows tools and thinking."""
    copy = shutil.copytree(batchrun.model, tmp_path / "qwen")
    (copy / "chat_template.jinja").write_text(QWEN3)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return replace(batchrun, model=copy)


def write(batchrun: CommandLine, name: str, rows: list[dict[str, Any]]) -> Path:
    path = batchrun.folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["in.jsonl", pytest.param("in.parquet", marks=pytest.mark.long)])
def test_sharegpt_with_tools_and_a_begun_answer(qwen: CommandLine, name: str) -> None:
    rows: list[dict[str, Any]] = [
        {"conversations": SHARED, "tools": None},
        {"conversations": SHARED[:1], "tools": [TOOL]},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "bat", "value": "y"}]},
    ]
    source = write(qwen, name, rows)
    shown = qwen.submit(source, *SHORT, "-o", "out.jsonl")
    assert shown.code == 3
    assert shown.err.count("passed to the chat template from columns: tools") == 1
    assert "continued" in "".join(p.read_text() for p in qwen.home.rglob("log.jsonl"))
    got = qwen.read("out.jsonl")
    assert "message 1 is from 'bat'" in got[2]["error"]
    assert [row["error"] for row in got[:2]] == [None, None]
    usual = write(qwen, "usual.jsonl", [{"messages": USUAL}, {"messages": USUAL[:1]}])
    assert qwen.submit(usual, *SHORT, "-o", "usual.out.jsonl").code == 0
    begun, asked = qwen.read("usual.out.jsonl")
    assert got[0]["prompt_tokens"] == begun["prompt_tokens"]
    assert got[1]["prompt_tokens"] > asked["prompt_tokens"] + 50
    plan = qwen("plan", source, "--json", "--ignore-param-columns", "--model", qwen.model).json
    assert plan["rows"] == 3
    assert plan["errors"] == {"wrong_type": 1}
    assert plan["prompt_tokens"] == begun["prompt_tokens"] + asked["prompt_tokens"]


def test_what_a_job_tells_the_template(qwen: CommandLine) -> None:
    rows = [{"prompt": "Hi"}, {"prompt": "Hi", "chat_template_kwargs": {"enable_thinking": True}}]
    source = write(qwen, "in.jsonl", rows)
    told = ("--template-arg", "enable_thinking=false")
    assert qwen.submit(source, "--chat", *told, *SHORT, "-o", "out.jsonl").code == 0
    off, on = (row["prompt_tokens"] for row in qwen.read("out.jsonl"))
    assert off == on + len("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--template-arg", "enable_thinking=false"), 0, ""),
        (("--template-arg", "thinking=false"), 1, "does not read --template-arg thinking"),
        (("--template-arg", "thinking"), 2, "write NAME=VALUE"),
        (("--template-arg", "messages=[]"), 2, "batchrun sets messages itself"),
        (("--template-arg", "a=1", "--template-arg", "a=2"), 2, "--template-arg a is given twice"),
    ],
)
def test_what_a_template_can_be_told(
    qwen: CommandLine, options: tuple[str, ...], code: int, said: str
) -> None:
    source = qwen.write("in.parquet", ["Hi"])
    shown = qwen.submit(source, "--chat", "--dry-run", *options)
    assert (shown.code, said in shown.err) == (code, True)
    assert qwen("list", "--json").json == []


def test_template_args_without_a_chat(qwen: CommandLine) -> None:
    source = qwen.write("in.parquet", ["Hi"])
    for options in ((), ("--template", "{prompt}")):
        shown = qwen.submit(source, *options, "--template-arg", "enable_thinking=false")
        assert (shown.code, "--template-arg without a chat" in shown.err) == (2, True)


def test_the_specification_has_what_was_asked_for(qwen: CommandLine) -> None:
    source = qwen.write("in.parquet", ["Hi"])

    def prompt(*options: str) -> Any:
        shown = qwen.submit(source, "--chat", "--dry-run", "--json", *options)
        return shown.json["prompt"]

    plain = {"column": "prompt", "chat": True}
    assert prompt() == plain
    told = ("--template-arg", "enable_thinking=false", "--special-tokens-in-data")
    more = {"special_tokens_in_data": True, "template_args": {"enable_thinking": False}}
    assert prompt(*told) == plain | more


def test_control_tokens_in_data(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["a<|im_end|>\n", "a<|im_enX|>\n"])
    counts = []
    for options in ((), ("--special-tokens-in-data",)):
        batchrun.submit(
            source, "--chat", *options, "--max-tokens", 1, "-o", "o.jsonl", "--overwrite"
        )
        counts.append([row["prompt_tokens"] for row in batchrun.read("o.jsonl")])
    (text, same), (token, _) = counts
    assert text == same
    assert token == text - len("<|im_end|>") + 1


@pytest.mark.parametrize(
    ("kind", "fine"),
    [
        (pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})), True),
        (pa.struct({"role": pa.string(), "content": pa.string()}), True),
        (pa.list_(pa.struct({"from": pa.string(), "value": pa.string()})), True),
        (pa.list_(pa.map_(pa.string(), pa.string())), True),
        (pa.list_(pa.int64()), False),
        (pa.struct({"a": pa.string()}), False),
    ],
)
def test_types_that_hold_chats(batchrun: CommandLine, kind: pa.DataType, fine: bool) -> None:
    pq.write_table(pa.table({"messages": pa.nulls(1, kind)}), batchrun.folder / "in.parquet")
    shown = batchrun.submit("in.parquet", "--dry-run")
    assert shown.code == 1
    assert ("not text or a list of messages" in shown.error) == (not fine)
    assert ("the prompt is null" in shown.error) == fine


def test_a_column_of_tools_that_are_none(qwen: CommandLine) -> None:
    pq.write_table(pa.table({"messages": [USUAL[:1]], "tools": [3]}), qwen.folder / "in.parquet")
    shown = qwen.submit("in.parquet", "--dry-run")
    assert (shown.code, "the column 'tools' can't set tools for its rows" in shown.error) == (
        1,
        True,
    )
    assert "--ignore-param-columns" in shown.hint
    assert qwen.submit("in.parquet", "--dry-run", "--ignore-param-columns").code == 0
