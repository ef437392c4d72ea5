"""Whatever is wrong with input, options, model or disk: one clear message or one error row."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.cli.conftest import limit_files, obey_permissions
from tests.tiny import CONTEXT, edit_config, write_tiny_model

# --- rows: the others finish, the exit code is 3 -------------------------------------------------


def test_bad_rows_become_error_rows_and_the_others_finish(batchrun):
    lines = [
        b'{"id": 0, "prompt": "fine"}',
        b'{"id": 1, "prompt": ""}',
        b'{"id": 2, "prompt": null}',
        b'{"id": 3, "prompt": 17}',
        json.dumps({"id": 4, "prompt": "x" * 10_000_000}).encode(),
        json.dumps({"id": 5, "prompt": "y" * (CONTEXT + 1)}).encode(),
        b'{"id": 6, "prompt": "brok',  # line 7
        b'{"id": 7, "prompt": "\xff\xfe"}',
        b'{"id": 8}',
        b'{"id": 9, "prompt": "too hot", "temperature": -1}',
        b'{"id": 10, "prompt": "fine"}',
    ]
    source = batchrun.folder / "in.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    shown = batchrun.submit(source, "--max-tokens", 3, "-o", "out.jsonl")
    assert shown.code == 3
    assert "11 of 11 rows" in shown.out
    assert "9 failed (the column `error` says why)" in shown.out

    rows = batchrun.read("out.jsonl")
    assert len(rows) == 11
    assert [i for i, row in enumerate(rows) if row["error"] is None] == [0, 10]
    assert rows[0]["completion"] == rows[10]["completion"] is not None
    for number, said in {
        1: "empty",
        2: "null",
        3: "a number",
        4: "10,000,000 characters",
        5: f"{CONTEXT + 1} tokens",
        6: "line 7",
        7: "UTF-8",
        8: "prompt",
        9: "temperature",
    }.items():
        assert said in rows[number]["error"], rows[number]["error"]
        assert rows[number]["completion"] is None
    failures = batchrun("stats", "--json").json["rows"]["failed_by_reason"]
    assert sum(failures.values()) == 9
    assert len(failures) >= 5


def test_null_and_empty_prompts_in_parquet(batchrun):
    source = batchrun.write("in.parquet", ["fine", None, "", "fine"])
    assert batchrun.submit(source, "--max-tokens", 3, "-o", "out.parquet").code == 3
    errors = [row["error"] for row in batchrun.read("out.parquet")]
    assert [error is None for error in errors] == [True, False, False, True]


def test_a_row_that_no_budget_can_hold_is_that_rows_error(batchrun):
    source = batchrun.write("in.jsonl", ["fine", "z" * 200])
    # Two layers of two KV heads of eight float32: 256 bytes a token, 128 tokens in eight pages.
    asked = ("--max-tokens", 3, "--dtype", "float32", "-o", "out.jsonl")
    pages = ("--page-size", 4096, "--layers-per-slab", 2)
    shown = batchrun.submit(source, *asked, *pages, "--kv-budget", "32KiB")
    assert shown.code == 3
    fine, big = batchrun.read("out.jsonl")
    assert (fine["error"], big["completion"]) == (None, None)
    assert "200" in big["error"]

    limits = ("--kv-budget", "1MiB", "--max-num-seqs", 2)
    refused = batchrun.submit(source, *asked, "--overwrite", *limits)
    [job] = batchrun("list", "--json").json
    told = f"resume {job['job']} --retry-failed --max-num-seqs 2 --kv-budget 1048576"
    assert refused.hint == f"batchrun {told}, or submit with --again to start over"
    assert batchrun("resume", "--retry-failed", *limits).code == 0
    assert [row["error"] for row in batchrun.read("out.jsonl")] == [None, None]
    runtime = batchrun("show", "--json").json["runtime"]
    assert (runtime["max_num_seqs"], runtime["kv_budget"]) == (2, 1 << 20)


# --- files: nothing starts, the exit code is 1 ---------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        ((), "no column 'prompt'; its columns: id, promt", "'promt'"),
        (("--prompt-column", "txet"), "no column 'txet'", "--prompt-column promt"),
        (("--template", "Say {promtt}"), "no column 'promtt'", "'promt'"),
        (("--prompt-column", "id"), "the column 'id' holds int64, not text", "--template '{id}'"),
    ],
)
def test_a_column_that_is_missing_or_of_the_wrong_type(batchrun, arguments, error, hint):
    pq.write_table(pa.table({"id": [1], "promt": ["x"]}), batchrun.folder / "in.parquet")
    shown = batchrun.submit("in.parquet", *arguments)
    assert shown.code == 1
    assert error in shown.error
    assert hint in shown.hint


def test_an_input_column_that_the_output_adds(batchrun):
    source = batchrun.write("in.parquet", ["x"], completion=["old"])
    shown = batchrun.submit(source)
    assert (shown.code, "'completion'" in shown.error) == (1, True)
    assert "rename" in shown.hint


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "damage", "error"),
    [
        ("in.parquet", cut, "in.parquet is damaged or cut short"),
        ("in.parquet", lambda path: path.write_bytes(b""), "in.parquet"),
        ("in.jsonl", lambda path: path.write_bytes(b""), "in.jsonl"),
        ("in.jsonl", lambda path: path.unlink(), "in.jsonl: there is no such file"),
        ("in.xls", lambda path: path.write_text("a sheet"), "in.xls: its name does not say which"),
    ],
)
def test_a_file_that_is_damaged_empty_absent_or_of_no_known_kind(batchrun, name, damage, error):
    path = batchrun.write(name, ["one", "two"])
    damage(path)
    shown = batchrun.submit(path)
    assert shown.code == 1
    assert error in shown.error
    assert shown.hint


def test_an_unreadable_file(batchrun):
    path = batchrun.write("in.jsonl", ["one"])
    path.chmod(0)
    shown = batchrun.submit(path, before=obey_permissions)
    assert (shown.code, f"{path} can't be read: Permission denied" in shown.error) == (1, True)


# --- the output ----------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept_unless_told(batchrun):
    source = batchrun.write("in.jsonl", ["one"])
    old = batchrun.folder / "out.jsonl"
    old.write_text("precious")
    shown = batchrun.submit(source, "-o", "out.jsonl")
    assert (shown.code, "out.jsonl already exists" in shown.error) == (1, True)
    assert "--overwrite" in shown.hint
    assert old.read_text() == "precious"
    assert batchrun.submit(source, "-o", "out.jsonl", "--overwrite", "--dry-run").code == 0
    assert old.read_text() == "precious"


def test_an_output_is_never_the_input(batchrun):
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(source, "-o", source, "--overwrite")
    assert (shown.code, "is an input of this job" in shown.error) == (1, True)


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("no/such/folder/out.jsonl", "there is no folder"),
        ("locked/out.jsonl", "can't be written: Permission denied"),
        ("folder.jsonl", "is a folder"),
        ("out.txt", "does not say which format"),
    ],
)
def test_an_output_that_cannot_be_written(batchrun, output, error):
    (batchrun.folder / "locked").mkdir(mode=0o500)
    (batchrun.folder / "folder.jsonl").mkdir()
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(source, "-o", output, before=obey_permissions)
    assert shown.code == 1
    assert error in shown.error
    assert shown.hint


def test_a_home_that_cannot_be_written(batchrun):
    batchrun.home.mkdir(mode=0o500)
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(source, before=obey_permissions)
    assert (shown.code, str(batchrun.home) in shown.error) == (1, True)
    assert "BATCHRUN_HOME" in shown.hint


def test_a_full_disk_leaves_no_half_output_and_a_job_that_can_be_exported(batchrun):
    # Incompressible columns make the output larger than any other file of the job.
    noise = [os.urandom(1 << 20).hex() for _ in range(3)]
    source = batchrun.write("in.parquet", ["one", "two", "three"], noise=noise)
    full = limit_files(1 << 20)  # which the address space of all slots counts against too
    few = ("--max-num-seqs", 4, "--max-model-len", 64, "--page-size", 4096)
    shown = batchrun.submit(source, "--max-tokens", 2, *few, "-o", "out.parquet", before=full)
    assert shown.code == 1
    assert "out.parquet can't be written: File too large" in shown.error
    assert "batchrun export" in shown.hint
    assert [path.name for path in batchrun.folder.iterdir()] == ["in.parquet"]
    assert batchrun("export").code == 0
    assert [row["error"] for row in batchrun.read("out.parquet")] == [None] * 3


# --- models --------------------------------------------------------------------------------------


def test_an_unknown_model(batchrun):
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(source, "--model", "./nowhere")
    assert (shown.code, "no model './nowhere'" in shown.error) == (1, True)
    assert shown.hint


def test_an_architecture_that_is_refused_before_any_row(batchrun, tmp_path):
    model = write_tiny_model(tmp_path / "strange")
    edit_config(model, model_type="of-its-own", architectures=["StrangeForCausalLM"])
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(source, "--model", model, "-o", "out.jsonl")
    assert shown.code == 1
    assert "of-its-own" in shown.error
    assert not (batchrun.folder / "out.jsonl").exists()


# --- devices: nothing is begun that cannot run ---------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_a_gpu_that_is_not_there(batchrun):
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(source, "--device", "cuda", "-o", "out.jsonl")
    assert (shown.code, shown.hint) == (1, "use --device cpu")
    assert "the device cuda can't be used: torch" in shown.error
    assert batchrun("list").out.count("\n") <= 1


def test_an_attention_kernel_that_cannot_be_used_here(batchrun):
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(source, "--attention", "torch-flash", "--device", "cpu")
    assert shown.code == 1
    assert "the attention backend torch-flash can't be used: " in shown.error
    assert "--attention auto" in shown.hint


# --- options: the exit code is 2 -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ("--max-tokens", -5),
            "--max-tokens must be at least 1 (0 only where known text is scored), not -5",
        ),
        (("--temperature", -1), "--temperature must be 0 or more, not -1.0"),
        (("--top-p", 1.5), "--top-p must be above 0 and at most 1, not 1.5"),
        (("--top-k", -1), "--top-k must be 0 (off) or more"),
        (("--max-tokens", 2, "--min-tokens", 3), "--min-tokens must be"),
        (("--stop", ""), "--stop must not be empty"),
        (("--template", "no columns"), "--template: the template 'no columns' names no column"),
        (("--template", "{}"), "--template: template field {} at character 1: write {column}"),
        (("--template", "{"), "--template: the template field that begins at character 1 is never"),
        (("--template", "{prompt}}"), "--template: there is a lone } in the template"),
        (("--template", '{"a": {prompt}}'), "there is a lone { in the template field"),
        (("--template", "{a}", "--prompt-column", "b"), "can't be combined"),
        (("--kv-budget", "much"), "'much' is not a size"),
        (("--kv-budget", 0), "not a positive multiple of 1 bytes"),
        (("--page-size", 1000), "not a positive multiple of 4096 bytes"),
        (("--seed", 2**63), "does not fit in 64 bits"),
        (("--stop-token-id", -1), "--stop-token-id"),
        (("--temperature", "nan"), "--temperature must be 0 or more, not nan"),
        (("--n", 0), "--n"),
        (("--device", "tpu"), "'tpu' is not a device; write auto, cpu, cuda or cuda:N"),
        (("--attention", "paged"), "--attention"),
        (("--nonsense",), "--nonsense"),
        (("--max-tokens", "many"), "--max-tokens"),
    ],
)
def test_values_that_cannot_be_are_usage_errors(batchrun, arguments, error):
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(source, *arguments)
    assert shown.code == 2
    assert error in shown.error
    assert shown.hint == "batchrun submit --help"


def test_no_input_at_all_is_a_usage_error(batchrun):
    assert batchrun("submit").code == 2
    assert batchrun("no-such-command").code == 2
