"""Builds the site of the documentation into build/site: `make docs`.

Pages lie where a forge shows them: in docs/, and beside what they describe (the changelog, the
recipes, the benchmarks). Their links lead from file to file. This script copies them into one
folder, in which each link leads to a page of the site or to a copy of the file, and calls mkdocs.
Nothing is fetched. A link that leads nowhere is an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
STAGE = ROOT / "build" / "docs"
# Pages outside of docs/, and their names on the site.
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "benchmarks/METHOD.md": "benchmarks/method.md",
}
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


class DeadLinkError(Exception):
    """A link leads to no file."""


def pages() -> dict[str, str]:
    """The pages, as paths from the root, and their names on the site."""
    found = {f"docs/{name}": name for name in _names(ROOT / "docs", "**/*.md")}
    for name in _names(ROOT / "examples", "*/README.md"):
        found[f"examples/{name}"] = f"recipes/{PurePosixPath(name).parent}.md"
    return found | ELSEWHERE


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))


def decisions() -> str:
    """The page that lists the decisions."""
    lines = ["# Decisions", "", "One page each: the context, the decision, what it costs.", ""]
    for name in _names(ROOT / "docs" / "decisions", "[0-9]*.md"):
        text = (ROOT / "docs" / "decisions" / name).read_text(encoding="utf-8")
        title = re.sub(r"^# (\d+\. )?", "", text.splitlines()[0])
        lines.append(f"* {int(name[:4])}: [{title}]({name})")
    return "\n".join(lines) + "\n"


def relinked(page: str, text: str, named: dict[str, str], copied: Callable[[str], str]) -> str:
    """A page's text with the site's links.

    Args:
        page: Its path from the root.
        text: Its Markdown.
        named: See `pages`.
        copied: Takes the path of another file, and says what it is called on the site.

    Raises:
        DeadLinkError: A link leads to no file.
    """
    here = str(PurePosixPath(named[page]).parent)

    def link(found: re.Match[str]) -> str:
        target = os.path.normpath(PurePosixPath(page).parent / found[1])
        if target == "README.md":
            name = "index.md"  # which says what the README says, and more
        elif target in named:
            name = named[target]
        elif target == "docs/decisions":
            name = "decisions/index.md"
        elif (ROOT / target).is_file():
            name = copied(target)
        else:
            raise DeadLinkError(f"{page}: {found[1]} is no file")
        return f"]({os.path.relpath(name, here)}{found[2] or ''})"

    done, at = [], 0
    for code in _CODE.finditer(text):
        done += [_LINK.sub(link, text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*done, _LINK.sub(link, text[at:])])


def stage(folder: Path = STAGE) -> None:
    """Write all that mkdocs reads into a folder, which is replaced.

    Raises:
        DeadLinkError: A link leads to no file.
    """
    shutil.rmtree(folder, ignore_errors=True)
    named = pages()

    def copied(path: str) -> str:
        name = path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / name)
        return name

    for page, name in named.items():
        text = relinked(page, (ROOT / page).read_text(encoding="utf-8"), named, copied)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "decisions" / "index.md").write_text(decisions(), encoding="utf-8")
    for path in (ROOT / "docs" / "site").iterdir():
        copied(path.relative_to(ROOT).as_posix())


def main() -> int:
    """Build the site, or serve it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="serve it on this machine instead")
    parser.add_argument("--into", metavar="FOLDER", help="where to; default: build/site")
    options = parser.parse_args()
    try:
        stage()
    except DeadLinkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "mkdocs", "serve" if options.serve else "build", "--strict"]
    if options.into:
        command += ["--site-dir", os.path.abspath(options.into)]
    # What mkdocs says is shown if it fails. `--quiet` would make it overlook its own warnings.
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stderr=None if options.serve else subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode and done.stderr:
        print(done.stderr, file=sys.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
