"""README, changelog and examples say what is true: the commands run, the names exist."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest

from batchrun.cli.doctor import TESTED
from batchrun.cli.errors import ExitStatus
from batchrun.cli.run import resume_command, submit_command
from batchrun.jobs.spec import OPTIONS
from batchrun.report.text import render
from batchrun.runner.param_columns import OVERRIDES
from tests.jobs.adding import added_columns
from tests.parity.models import CONFIGS
from tests.report.test_text import SUMMARY

ROOT = Path(__file__).parent.parent
SUBMISSION = ("--wait", "--again", "--dry-run", "--json")  # what is said of it, not of the job
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def console_commands():
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_the_commands_of_the_readme_run(tmp_path, model_cache, smollm2):
    assert smollm2.path.parent == model_cache
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(model_cache)
    shown = {}
    for command in console_commands():
        words = shlex.split(command)
        if words[0] == ".venv/bin/batchrun":
            words = [sys.executable, "-m", "batchrun", *words[1:]]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env={**os.environ, "BATCHRUN_HOME": str(home), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        shown[command] = done.stdout
    assert len(shown) >= 5
    assert len(shown[".venv/bin/batchrun list"].splitlines()) == 4
    assert "KV memory" in shown[".venv/bin/batchrun stats"]
    first = pq.read_table(tmp_path / "demo" / "first.parquet")
    assert first.num_rows == 4
    assert first["error"].null_count == 4


def test_every_option_of_submit_is_in_the_readme_and_the_other_way_round():
    options = {
        name
        for param in submit_command.params
        if isinstance(param, click.Option)
        for name in param.opts
        if name.startswith("--")
    }
    assert set(re.findall(r"`(--[a-z-]+)`", section("Options of `submit`"))) == options
    others = {
        name for param in resume_command.params for name in (*param.opts, *param.secondary_opts)
    }
    installers = {"--no-deps", "--from"}
    known = options | others | installers | {"--partial", "--recompute", "--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= known


def test_each_option_of_a_job_stands_in_the_readme_in_its_section():
    rows = re.findall(r"^\| ([\w ]+) \| (`--.*) \|$", section("Options of `submit`"), re.MULTILINE)
    shown = {title: re.findall(r"`(--[a-z-]+)`", names) for title, names in rows}
    for title, named in shown.items():
        own = {o.flag for o in OPTIONS.values() if o.section.lower().startswith(title)}
        assert own
        assert own <= set(named)
    assert sum(map(len, shown.values())) == len(OPTIONS) + len(SUBMISSION)


def test_output_columns_and_exit_codes_are_those_of_the_readme():
    table = [line for line in section("Output").splitlines() if line.startswith("| `")]
    named = [name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    every = {"choices": ("a",), "choice_logprob": True, "logprobs": 1}
    every |= {"score": "text", "labels": ("a",), "perplexity": True}
    assert named == list(added_columns(token_ids=True, n=4, keep=2, **every))
    codes = re.findall(r"^\| (\d+) \|", section("Jobs run on their own"), re.MULTILINE)
    assert [int(code) for code in codes] == list(ExitStatus)


def test_columns_that_hold_a_rows_own_parameters_are_those_of_the_readme():
    sentence = section("Input").split("A column named like a sampling parameter (")[1].split(")")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(OVERRIDES)


def test_the_sample_of_stats_has_the_shape_of_the_real_report():
    sample = README.split("<!-- stats -->")[1].split("<!-- /stats -->")[0]
    labels = {line[:11].strip() for line in render(SUMMARY).splitlines()[1:]} - {""}
    assert labels <= {line[:11].strip() for line in sample.splitlines()}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CHANGELOG.md",
        "benchmarks/METHOD.md",
        "docs/architecture.md",
        "docs/configuration.md",
        "docs/docker.md",
        "docs/kernels.md",
        "docs/performance.md",
        "docs/platforms.md",
        "docs/python.md",
        "docs/recipes.md",
        *(str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("examples/*/README.md"))),
    ],
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_files_that_the_architecture_page_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:batchrun|allocator|jobs|tests)/[\w/.]+)`", text):
        found = (ROOT / name).exists() or (ROOT / "batchrun" / name).exists()
        assert found or not name.endswith(".py"), name


def promises():
    """Each line of the pages that promise something, with the tests that it names."""
    security = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!promise|-)(.+?) \| (.*) \|$", security, re.MULTILINE)
    durability = (ROOT / "docs" / "durability.md").read_text(encoding="utf-8")
    lines = durability.split("## Guarantees\n")[1].split("\nbatchrun does")[0]
    rows += [(line, line) for line in re.split(r"^\* ", lines, flags=re.MULTILINE)[1:]]
    return {promise: re.findall(r"`(tests/[\w/.]+)`", tests) for promise, tests in rows}


def test_every_promise_names_its_test():
    found = promises()
    assert len(found) > 25
    for promise, tests in found.items():
        assert tests, promise
        for name in tests:
            assert (ROOT / name).is_file(), f"{promise}: {name}"


def test_the_changelog_has_a_place_for_what_comes_next():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.index("## [Unreleased]") < text.index("### Added")


def test_doctor_lists_the_architectures_that_parity_tests_cover():
    assert set(TESTED) == {config.model_type for config in CONFIGS.values()}
    assert list(TESTED) == sorted(TESTED)


def test_the_example_file_is_what_its_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    prompts = importlib.import_module("make_prompts").PROMPTS
    table = pq.read_table(ROOT / "examples" / "prompts.parquet")
    assert table.num_rows == 64
    assert sorted(table["prompt"].to_pylist()) == sorted(chain(*prompts.values()))
    assert len(set(table["prompt"].to_pylist())) == 64


def test_make_has_its_four_targets_and_they_set_themselves_up():
    targets = {
        target: subprocess.run(
            ["make", "--dry-run", "--always-make", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for target in ("demo", "test", "lint", "bench")
    }
    for recipe in targets.values():
        assert "-m venv" in recipe
        assert "pip install" in recipe
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert tool in targets["test"]
    assert "examples/prompts.parquet" in targets["demo"]


MODULES = re.findall(r"-m (tests\.[a-z.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(set(MODULES)))
def test_what_make_runs_can_be_loaded(name):
    """Some of it is run by hand alone, once in a while."""
    package = importlib.util.find_spec(name).submodule_search_locations is not None
    importlib.import_module(f"{name}.__main__" if package else name)


def test_the_benchmark_tables_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, "benchmarks/report.py", "--check"], cwd=ROOT, check=False
    )
    assert done.returncode == 0, "run python benchmarks/report.py"
