"""`-` is stdin and stdout, of jobs that can be killed and resumed like others."""

import csv
import io
import json
import os
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

FLAGS = ("--max-tokens", 3, "--ignore-eos")


@pytest.fixture
def piped(batchrun):
    """Runs a command with bytes as its stdin."""

    def run(data, *arguments):
        model = ("--model", batchrun.model) if arguments[0] in ("submit", "plan") else ()
        return subprocess.run(
            batchrun.argv(*arguments, *model),
            cwd=batchrun.folder,
            env=batchrun.environment(),
            input=data,
            capture_output=True,
            check=False,
        )

    return run


def test_csv_goes_through_as_a_filter(piped, batchrun):
    done = piped(b'id,prompt\n007,one\n1.10,"two, ""2"""\n', "submit", "-", "-o", "-", *FLAGS)
    assert done.returncode == 0, done.stderr.decode()
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode(), newline="")))
    assert [(row["id"], row["prompt"]) for row in rows] == [("007", "one"), ("1.10", 'two, "2"')]
    assert {row["completion_tokens"] for row in rows} == {"3"}
    assert b"2 of 2 rows" in done.stderr
    assert batchrun("verify").out.strip().endswith("is sound: 2 rows")


@pytest.mark.parametrize(
    "kind", ["array", pytest.param("jsonl", marks=pytest.mark.long), "parquet"]
)
def test_other_formats_come_out_as_json_lines(piped, kind):
    rows = [{"prompt": "one", "v": 1.5}, {"prompt": "two", "v": None}]
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue()
    elif kind == "array":
        data = json.dumps(rows, indent=2).encode()
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    done = piped(data, "submit", "-", "-o", "-", *FLAGS)
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{name: row[name] for name in ("prompt", "v")} for row in found] == rows


def test_what_came_in_is_kept_with_the_job_and_goes_with_it(piped, batchrun):
    data = b'{"prompt": "one"}\n{"prompt": 7}\n'
    done = piped(data, "submit", "-", *FLAGS)
    assert done.returncode == 3, done.stderr.decode()
    assert len(batchrun.read("stdin-completions.jsonl")) == 2
    again = piped(data, "submit", "-", "-o", "other.jsonl", *FLAGS)
    assert again.returncode == 1
    assert b"is the same work" in again.stderr
    [job] = (batchrun.home / "jobs").glob("stdin-*")
    assert (job / "stdin.jsonl").read_bytes() == data
    assert batchrun("resume", "--retry-failed").code == 3
    assert batchrun("verify").code == 0
    assert batchrun("rm", job.name).code == 0
    assert not [path for path in (batchrun.home / "jobs").iterdir() if "stdin" in path.name]


def test_a_detached_job_outlives_its_pipe(piped, batchrun):
    assert piped(b"prompt\none\n", "submit", "-", "--detach", *FLAGS).returncode == 0
    assert batchrun("watch").code == 0
    assert (batchrun.folder / "stdin-completions.csv").read_text().startswith("prompt,completion,")


def test_a_resumed_job_hands_out_what_was_asked_for(piped, batchrun):
    data = b'{"prompt": "one"}\n{"prompt": 7}\n'
    assert piped(data, "submit", "-", "-o", "-", *FLAGS).returncode == 3
    (batchrun.folder / "output.jsonl").write_text("somebody's own")  # as ours is called inside
    again = batchrun("resume", "--retry-failed")
    assert [json.loads(line)["prompt"] for line in again.out.splitlines()] == ["one", 7]
    assert batchrun("resume", "--retry-failed", "-o", "file.jsonl").code == 3
    assert len(batchrun.read("file.jsonl")) == 2
    assert (batchrun.folder / "output.jsonl").read_text() == "somebody's own"


def test_export_to_stdout(piped, batchrun):
    assert piped(b"prompt\none\n", "submit", "-", *FLAGS).returncode == 0
    shown = batchrun("export", "-o", "-")
    assert shown.out.splitlines()[1].startswith("one,")
    assert "1 row in stdout" in shown.err


def test_export_of_a_job_to_stdout_goes_there_again(piped, batchrun):
    done = piped(b'{"prompt": "one"}\n', "submit", "-", "-o", "-", *FLAGS)
    assert batchrun("export").out.encode() == done.stdout


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "stdin is empty"),
        (b"just some text\n", "neither JSON nor Parquet nor CSV"),
        (b"%PDF-1.7", "is a PDF"),
        (b'[{"prompt": "a"}', "cut short"),
    ],
)
def test_what_can_be_no_input_leaves_nothing_behind(piped, batchrun, data, why):
    done = piped(data, "submit", "-", "-o", "-", *FLAGS)
    assert done.returncode == 1
    assert why in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert b".stdin-" not in done.stderr  # a file that nobody else knows
    assert not done.stdout
    left = [path.name for path in (batchrun.home / "jobs").iterdir()]
    assert left in ([], [".submitting"])


@pytest.mark.parametrize("flag", ["--json", "--detach"])
def test_stdout_can_have_one_content(piped, flag):
    done = piped(b"prompt\na\n", "submit", "-", "-o", "-", flag)
    assert done.returncode == 2
    assert b"the answers go to stdout" in done.stderr


def test_a_terminal_is_no_input(batchrun):
    leader, follower = os.openpty()
    done = subprocess.run(
        batchrun.argv("submit", "-", "--model", batchrun.model),
        cwd=batchrun.folder,
        env=batchrun.environment(),
        stdin=follower,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(leader)
    os.close(follower)
    assert done.returncode == 1
    assert "nothing is piped in" in done.stderr


def test_one_jobs_output_is_the_next_ones_input(batchrun):
    path = batchrun.write("in.jsonl", ["one", "two"], id=[1, 2])
    assert batchrun.submit(path, "-o", "a.jsonl", *FLAGS).code == 0
    judge = ("a.jsonl", "--template", "True? {completion}", *FLAGS)
    refused = batchrun.submit(*judge, "-o", "b.jsonl")
    assert "--output-prefix" in refused.hint
    assert batchrun.submit(*judge, "--output-prefix", "judge_", "-o", "b.jsonl").code == 0
    answers, judged = batchrun.read("a.jsonl"), batchrun.read("b.jsonl")
    assert [{k: v for k, v in row.items() if k in answers[0]} for row in judged] == answers
    assert {row["judge_completion_tokens"] for row in judged} == {3}
    assert set(judged[0]) - set(answers[0]) == {
        f"judge_{name}" for name in answers[0] if name not in ("prompt", "id")
    }
    assert batchrun("verify").code == 0


def test_plan_takes_a_pipe_and_an_output_as_they_are(piped):
    done = piped(b'{"prompt": "a", "completion": "b"}\n', "plan", "-", "--json", *FLAGS)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["rows"] == 1
