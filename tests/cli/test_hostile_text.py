"""Whatever names, prompts and errors hold: what a command prints is lines of visible characters."""

import json
import os
import pty
import re
import shutil
import subprocess
import unicodedata
from contextlib import suppress

import pytest

from batchrun.cli.progress import View
from batchrun.runner.live import Progress
from tests.cli.conftest import CommandLine
from tests.tiny import edit_config

FORGED = "FORGED: 100 of 100 rows"
# For each a name must be possible: no slash, no NUL, 255 bytes at most.
EVIL = f"\x1b[2J\x1b]0;x\x07\r{FORGED}\n{FORGED}\x9b1m\x85\u202e\u2066\u2028{FORGED}\u200b\x7f\t"
NAME = f"n{EVIL}" + os.fsdecode(b"\xff")  # and what is no UTF-8
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def check(shown: bytes) -> str:
    """What was printed, of which no character does anything, and no line is data's."""
    text = shown.decode()
    for character in set(text) - {"\n"}:
        assert unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}, (character, text)
        assert unicodedata.bidirectional(character) not in TURNS, text
    assert "\u200b" not in text
    assert not [line for line in text.splitlines() if line.startswith(FORGED)], text
    return text


def run(batchrun, *arguments, code=None, **environment):
    done = subprocess.run(
        batchrun.argv(*arguments),
        cwd=batchrun.folder,
        env={**batchrun.environment(), **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )
    text = check(done.stdout + done.stderr)
    assert "Traceback" not in text
    assert "internal error" not in text, text
    if code is not None:
        assert done.returncode == code, text
    return text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, tiny_model):
    """A finished job, all of whose names and texts are hostile."""
    root = tmp_path_factory.mktemp("hostile")
    folder = root / "work"
    folder.mkdir()
    model = root / f"m{EVIL}"
    shutil.copytree(tiny_model, model)
    edit_config(model, **{f"odd{EVIL}": EVIL})
    batchrun = CommandLine(folder, root / "home", model)
    rows = [{f"c{EVIL}": f"p{EVIL}", "temperature": 0}, {f"c{EVIL}": "x", "temperature": EVIL}]
    (folder / f"{NAME}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = run(
        *(batchrun, "submit", f"{NAME}.jsonl", "--model", model, "--max-tokens", 2),
        *("--template", f"{{c{EVIL}}}", "--system", "s", "--stop", EVIL),
        *("-o", f"out{NAME}.jsonl"),
        code=3,
    )
    assert r"\x1b[2J" in text
    return batchrun


def test_data_stays_what_it_is(hostile):
    output = hostile.folder / f"out{NAME}.jsonl"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row[f"c{EVIL}"] for row in rows] == [f"p{EVIL}", "x"]
    assert EVIL.split("\n", maxsplit=1)[0] in rows[1]["error"] or "temperature" in rows[1]["error"]
    done = subprocess.run(
        hostile.argv("export", "-o", "-"),
        cwd=hostile.folder,
        env=hostile.environment(),
        capture_output=True,
        check=True,
    )
    assert done.stdout == output.read_bytes()


@pytest.mark.parametrize("command", ["list", "show", "stats", "logs", "peek", "verify"])
def test_a_finished_job(hostile, command):
    text = run(hostile, *command.split(), COLUMNS="400")  # so that `list` has room for all
    if command in {"list", "show", "stats", "peek", "logs"}:
        assert r"[2J" in text


def test_a_terminal_that_knows_ascii_alone(hostile):
    for command in ("list", "show"):
        text = run(hostile, command, code=0, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
        assert text.isascii()


@pytest.mark.parametrize(
    "arguments",
    [
        [EVIL],
        ["rm", EVIL],
        ["submit", f"{NAME}.jsonl", "--model", EVIL, "-o", "o.jsonl"],
        ["submit", f"{NAME}.jsonl", "--max-tokens", EVIL],
        ["submit", f"{NAME}.jsonl", "--template", f"{{{EVIL}}}", "-o", "o.jsonl"],
        ["submit", f"{NAME}.jsonl", "--prompt-column", f"c{EVIL}", "-o", f"{EVIL}/o.jsonl"],
        ["export", "-o", f"{EVIL}/o.jsonl"],
        ["verify", f"{EVIL}" * 500],
    ],
    ids=range(8),
)
def test_what_is_typed_comes_back_in_errors(hostile, arguments):
    model = ["--model", hostile.model] if arguments[0] == "submit" else []
    text = run(hostile, *arguments, *(model if "--model" not in arguments else []))
    assert "error: " in text
    assert max(map(len, text.splitlines())) < 12_000  # 2,000 characters, each escaped


@pytest.fixture
def from_afar(hostile, tmp_path):
    """A job's folder that somebody else has made."""
    [job] = [p for p in (hostile.home / "jobs").iterdir() if not p.name.startswith(".")]
    folder = tmp_path / NAME
    shutil.copytree(job, folder)
    return folder


def test_a_jobs_folder_from_afar(hostile, from_afar):
    line = json.dumps({"time": 0, "message": EVIL})
    (from_afar / "log.jsonl").write_text(line + "\n")
    state = json.loads((from_afar / "state.json").read_text())
    changed = {**state, "state": "failed", "reason": EVIL, "hint": EVIL, "model": EVIL}
    (from_afar / "state.json").write_text(json.dumps(changed))
    for command in ("logs", "show", "watch"):
        run(hostile, command, from_afar)
    (from_afar / "journal.db").write_bytes(EVIL.encode() * 100)
    run(hostile, "show", from_afar, code=1)


OURS = re.compile(rb"\x1b\[(\?25[lh]|[0-9;]*m|2K|[0-9]*A)")  # colours, and redrawing lines


def test_a_view_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    parent, child = pty.openpty()
    with os.fdopen(child, "w", encoding="utf-8") as stream:
        view = View(stream)
        view.update(Progress(9, 1, 1, phase=EVIL, reason=EVIL))
        view.message(EVIL)
        view.update(Progress(9, 3, 1, phase=EVIL, reason=EVIL))
        view.close()
    shown = b""
    with suppress(OSError), os.fdopen(parent, "rb", buffering=0) as master:  # whose end is EIO
        while more := master.read(1 << 16):
            shown += more
    text = check(OURS.sub(b"", shown).replace(b"\r", b"\n"))
    assert text.count(r"\x1b[2J") >= 3


def test_what_a_library_says_of_a_model(batchrun, tiny_model):
    model = batchrun.folder / "model"
    shutil.copytree(tiny_model, model)
    (model / "config.json").write_text(json.dumps({"model_type": f"m{EVIL}", "rope": EVIL}))
    source = batchrun.write("in.jsonl", ["x"])
    text = run(batchrun, "submit", source, "--model", model, "-o", "out.jsonl", code=1)
    assert "error: " in text
