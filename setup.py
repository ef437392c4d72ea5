"""The README as PyPI shows it, where no file lies beside it.

Links to files lead to the repository that `project.urls` names. As long as it names none, they
are plain text, and pictures are left out.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
_LINK = re.compile(r"(!?)\[([^\]\[]*)\]\((?!\w+:|#)([^)\s]+)\)")


def described(text: str, repository: str | None) -> str:
    """A README whose links lead somewhere from everywhere.

    Args:
        text: Its Markdown, with links relative to the root of the repository.
        repository: The repository's address, such as `https://forge/owner/name`.
    """

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if repository is None:
            return "" if picture else words
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({repository.rstrip('/')}/{kind}/main/{target})"

    return _LINK.sub(link, text)


if __name__ == "__main__":
    from setuptools import setup

    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=described(
            (HERE / "README.md").read_text(encoding="utf-8"),
            project.get("urls", {}).get("Repository"),
        ),
        long_description_content_type="text/markdown",
    )
