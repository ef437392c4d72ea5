"""README, docs, changelog and examples say what is true: the commands run, the names exist."""

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

from batchrun.cli import COMMANDS, cli
from batchrun.cli.doctor import TESTED
from batchrun.cli.errors import ExitStatus
from batchrun.jobs.spec import OPTIONS
from batchrun.report.text import render
from batchrun.runner.param_columns import OVERRIDES
from tests.jobs.adding import added_columns
from tests.parity.models import CONFIGS
from tests.report.test_text import SUMMARY

ROOT = Path(__file__).parent.parent
SUBMISSION = ("--wait", "--again", "--dry-run", "--json")  # what is said of it, not of the job
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {page.name: page.read_text(encoding="utf-8") for page in ROOT.glob("docs/*.md")}
INSIDE = {"architecture.md", "durability.md", "kernels.md", "memory.md", "performance.md"}
FOR_USERS = "\n".join([README, *(text for name, text in DOCS.items() if name not in INSIDE)])


def section(page, title):
    return DOCS[page].split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text, *languages):
    """The lines of the code blocks of a text, each command on one line."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    shown = "".join(block for language, block in found if language in languages)
    return shown.replace("\\\n", " ").splitlines()


def console_commands():
    lines = blocks(README + "\n" + DOCS["index.md"], "console")
    return list(dict.fromkeys(line[2:] for line in lines if line.startswith("$ ")))


def test_the_commands_of_the_readme_and_the_start_page_run(tmp_path, model_cache, smollm2):
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


def options_of(*names):
    """The options of commands, by default of all."""
    group = click.Context(cli)
    commands = [cli.get_command(group, name) for name in names or COMMANDS]
    params = [param for command in commands for param in command.params]
    assert all(
        isinstance(param, click.Option) or not param.opts[0].startswith("-") for param in params
    )
    return {name for p in params for name in (*p.opts, *p.secondary_opts) if name.startswith("--")}


def test_every_option_is_in_the_docs_and_the_other_way_round():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", FOR_USERS))
    assert options_of() <= named
    # Options of pip and uvx, and on the pages about clusters, containers and other systems.
    others = {"--no-deps", "--from", "--help", "--write"}
    for page in ("scale.md", "docker.md", "platforms.md"):
        others |= set(re.findall(r"--[a-z-]+", DOCS.get(page, "")))
    assert named <= options_of() | others


def test_each_option_of_a_job_stands_in_its_section():
    text = DOCS["options.md"].split("<!-- generated -->")[1]
    sections = {
        part.split("\n")[0]: re.findall(r"^\| .*?`(--[a-z-]+)`", part, re.MULTILINE)
        for part in text.split("\n## ")[1:]
    }
    for title, named in sections.items():
        own = {o.flag for o in OPTIONS.values() if o.section.partition(" (")[0] == title}
        assert own
        assert own <= set(named)
    assert sum(map(len, sections.values())) == len(OPTIONS) + len(SUBMISSION)


def test_every_command_is_documented():
    for name in COMMANDS:
        assert f"batchrun {name}" in FOR_USERS
    assert re.findall(r"^## (\w+)$", DOCS["commands.md"], re.MULTILINE) == [
        name for name in COMMANDS if name != "submit"
    ]


def batchrun_lines():
    """Every command of batchrun in a code block."""
    lines = {
        line.removeprefix("$ ").removeprefix(".venv/bin/")
        for line in blocks(FOR_USERS, "", "sh", "console")
    }
    return sorted(
        line for line in lines if line.startswith("batchrun ") and "[OPTIONS]" not in line
    )


def test_there_are_many_commands_to_copy():
    assert len(batchrun_lines()) > 30


@pytest.mark.parametrize("line", batchrun_lines())
def test_a_command_to_copy_has_the_options_that_the_command_has(line):
    name, *arguments = shlex.split(line, comments=True)[1:]
    params = cli.get_command(click.Context(cli), name).params
    known = {option for param in params for option in (*param.opts, *param.secondary_opts)}
    assert {word for word in arguments if re.match("--?[a-z]", word)} <= known | {"--help"}


def test_output_columns_and_exit_codes_are_those_of_the_docs():
    table = [
        line for line in section("outputs.md", "Columns").splitlines() if line.startswith("| `")
    ]
    named = [name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    every = {"choices": ("a",), "choice_logprob": True, "logprobs": 1}
    every |= {"score": "text", "labels": ("a",), "perplexity": True}
    assert named == list(added_columns(token_ids=True, n=4, keep=2, **every))
    codes = re.findall(r"^\| (\d+) \|", section("running.md", "Exit codes"), re.MULTILINE)
    assert [int(code) for code in codes] == list(ExitStatus)


def test_columns_that_hold_a_rows_own_parameters_are_those_of_the_docs():
    text = section("inputs.md", "A row's own parameters")
    sentence = text.split("A column named like a sampling parameter (")[1].split(")")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(OVERRIDES)


def test_the_sample_of_stats_has_the_shape_of_the_real_report():
    sample = DOCS["performance.md"].split("<!-- stats -->")[1].split("<!-- /stats -->")[0]
    labels = {line[:11].strip() for line in render(SUMMARY).splitlines()[1:]} - {""}
    assert labels <= {line[:11].strip() for line in sample.splitlines()}


def test_what_the_readme_claims_was_measured_where_it_says():
    why = README.split("\n## Why\n")[1].split("\n## ")[0]
    claims = re.findall(r"^\*\*(\w+)\.\*\* (.*?)\n\n", why, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in claims] == ["Speed", "Durability", "Memory"]
    for name, claim in claims:
        pages = re.findall(r"\]\(docs/([\w-]+\.md)", claim)
        measured = re.findall(r"(?<![\w.-])\d[\d,.]*\d%?", re.sub(r"\(docs/.*?\)", "", claim))
        assert measured, name
        for figure in measured:
            assert any(figure in DOCS[page] for page in pages), (name, figure)


def test_the_trials_of_durability_add_up():
    rows = re.findall(r"^\| .* \| ([\d,]+) \| (\d+) \|$", DOCS["durability.md"], re.MULTILINE)
    assert {lost for _, lost in rows} == {"0"}
    total = sum(int(trials.replace(",", "")) for trials, _ in rows)
    assert f"{total:,} trials" in DOCS["durability.md"]


@pytest.mark.parametrize(
    "page",
    [
        "benchmarks/METHOD.md",
        "benchmarks/README.md",
        *(page.name for page in sorted(ROOT.glob("*.md"))),
        *(str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/**/*.md"))),
        *(str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("examples/*/README.md"))),
    ],
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)
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


def test_the_targets_of_make_set_themselves_up():
    targets = {
        target: subprocess.run(
            ["make", "--dry-run", "--always-make", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for target in ("demo", "test", "lint", "bench", "docs", "recording")
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
