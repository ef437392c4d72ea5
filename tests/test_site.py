"""The site of the documentation: it builds, needs nothing from elsewhere, and says what is true."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import batchrun

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOWHERE = "http://127.0.0.1:9"  # a proxy that isn't there


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with strict links, and without a network."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "docs/build.py", "--into", folder],
        cwd=ROOT,
        env={**os.environ, "http_proxy": NOWHERE, "https_proxy": NOWHERE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)", text)
        for tag in re.findall(r"<link\b[^>]*>", text):
            if not re.search(r"rel=[\"']?(?:canonical|prev|next)", tag):
                loaded += re.findall(r"\bhref=[\"']?([^\"'\s>]+)", tag)
        assert loaded, page
        assert not [url for url in loaded if re.match(r"(?:https?:)?//", url)], page
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not re.search(r"url\([\"']?(?:https?:)?//", "".join(styles))


def test_the_search_finds_words_of_the_pages(site: Path) -> None:
    """With the index as a script, which a browser also reads from a folder."""
    text = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    for words in ("Speculative decoding (prompt lookup)", "--max-num-seqs", "Llama-3-8B"):
        assert words in text


def test_the_python_api_is_there_with_its_docstrings(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in batchrun.__all__:
        found = getattr(batchrun, name)
        members = [m for m in vars(found) if not m.startswith("_")] if name[0].isupper() else []
        for path in (name, *(f"{name}.{member}" for member in members)):
            assert re.search(rf'id="?batchrun\.(?:api|llm)\.{re.escape(path)}[" >]', text), path
        assert found.__doc__.splitlines()[0].split(":")[0].rstrip(".") in re.sub("<.*?>", "", text)


def test_every_page_is_in_the_menu() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/-]+\.md", yaml.dump(yaml.safe_load(text)["nav"])))
    assert {page.name for page in DOCS.glob("*.md")} <= named
    assert {f"recipes/{page.parent.name}.md" for page in ROOT.glob("examples/*/README.md")} <= named


def test_a_dead_link_is_an_error(tmp_path: Path) -> None:
    check = "import build; build.relinked('docs/a.md', '[b](no.md)', {'docs/a.md': 'a.md'}, str)"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=DOCS, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "docs/a.md: no.md is no file" in done.stderr


def test_the_options_and_commands_are_those_of_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "docs/reference.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"run python docs/reference.py\n{done.stdout}{done.stderr}"
    options, commands = (
        (DOCS / f"{name}.md").read_text("utf-8") for name in ("options", "commands")
    )
    assert "Default: the model's, else 512" in options
    assert "by default JOB-report.html in this folder" in commands
    assert "Sentinel" not in options + commands  # what click has where there is no default


@cache
def messages() -> list[str]:
    """Every text in the code; what is put into it is an ellipsis."""
    found = []
    for folder in ("allocator", "batchrun", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(map(_part, node.values)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return [re.sub("…+", "…", text) for text in found]


def _part(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else "…"


TROUBLES = re.findall(
    r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
)


def test_troubleshooting_has_what_users_meet() -> None:
    assert len(TROUBLES) == len(set(TROUBLES)) > 50


@pytest.mark.parametrize("message", TROUBLES)
def test_a_message_in_troubleshooting_stands_in_the_code(message: str) -> None:
    said = re.sub("…+", "…", message).removesuffix("…")
    assert len(re.sub(r"\W", "", said)) > 6
    assert any(said in text for text in messages())
