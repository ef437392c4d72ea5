"""A shell completes commands, options, files and jobs, and loads next to nothing for it."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from batchrun.cli import COMMANDS, cli
from batchrun.cli.completion import SHELLS, VARIABLE
from batchrun.jobs.about import AboutSpec
from batchrun.jobs.folder import create
from tests.jobs.conftest import home, prompts, spec  # noqa: F401 - fixtures

COMMAND = Path(sys.executable).with_name("batchrun")


@pytest.fixture
def jobs(home, spec, monkeypatch):  # noqa: F811
    monkeypatch.setenv("BATCHRUN_HOME", str(home))
    found = [create(home, replace(spec, about=AboutSpec(name))) for name in ("alpha", "beta")]
    for number, job in enumerate(found):
        os.utime(job.path / "job.json", (1000 + number, 1000 + number))
    return found


def offered(*words):
    """What is offered for the last of these words."""
    *before, last = words
    complete = ShellComplete(cli, {}, "batchrun", VARIABLE)
    return [(item.type, item.value) for item in complete.get_completions(before, last)]


def values(*words):
    return [value for _, value in offered(*words)]


def test_commands_and_options():
    assert values("") == list(COMMANDS)
    assert values("pr") == ["prune"]
    assert "--max-tokens" in values("submit", "--max")
    assert values("list", "--st") == ["--state"]
    assert values("submit", "--dtype", "bf") == ["bfloat16"]
    assert values("completion", "") == list(SHELLS)


@pytest.mark.parametrize(
    "words",
    [["submit", "p"], ["plan", "p"], ["submit", "--output", "p"], ["submit", "-m", "p"]],
)
def test_files(words):
    assert offered(*words) == [("file", "p")]


def test_jobs(jobs):
    alpha, beta = (job.id for job in jobs)
    for command in ("show", "peek", "watch", "resume", "rm", "logs", "stats", "export", "report"):
        assert values(command, "") == [beta, alpha], command
    assert values("show", "al") == [alpha]
    assert values("show", alpha[-4:]) == [alpha]
    assert values("rm", beta, "") == [alpha]
    assert values("show", "zzz") == []


def test_a_home_that_cannot_be_read_offers_nothing(monkeypatch, tmp_path):
    (tmp_path / "jobs").write_text("no folder")
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))
    assert values("show", "") == []


@pytest.mark.parametrize("words", ["batchrun submit --max", "batchrun resume al", "batchrun "])
def test_completing_loads_neither_torch_nor_arrow(jobs, words):
    code = (
        "import atexit, sys, batchrun.cli\n"
        "heavy = {'torch', 'pyarrow', 'numpy', 'transformers'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "batchrun.cli.main([])"
    )
    count = str(len(words.split(" ")) - 1)
    asked = {VARIABLE: "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "[]\n"
    assert done.stdout.startswith("plain,")


def test_the_scripts(monkeypatch):
    for shell in SHELLS:
        shown = CliRunner().invoke(cli, ["completion", shell])
        assert shown.exit_code == 0
        assert f"{VARIABLE}={shell}_complete" in shown.output
    assert CliRunner().invoke(cli, ["completion", "tcsh"]).exit_code == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_itself(jobs, tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(
        subprocess.run(
            [COMMAND, "completion", "bash"], capture_output=True, text=True, check=True
        ).stdout
    )
    typed = (
        f"source {script}; complete -p batchrun; COMP_WORDS=(batchrun show al); COMP_CWORD=2; "
        f"_batchrun_completion {COMMAND}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", typed], capture_output=True, text=True, check=True
    )
    registered, reply = done.stdout.splitlines()
    assert "-F _batchrun_completion batchrun" in registered
    assert "-o default" in registered
    assert reply == jobs[0].id
