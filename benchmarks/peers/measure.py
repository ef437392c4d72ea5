"""What every peer's adapter does alike; it runs in the peer's environment, beside nothing of ours.

An adapter is a script that gives `main` a class whose constructor loads the model. It is started as
`PYTHON ADAPTER --model FOLDER --input FILE.jsonl --out FILE.json`: loads, warms up on prompts that
share nothing with the workload's, then takes the time from the first prompt, as text, until the
last answer. It fails when a row has not exactly the tokens that it asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

_WARM = ["Once upon a midnight dreary", "Call me Ishmael. Some years ago", "It is a truth"] * 8


class Peer(Protocol):
    """An engine with a model loaded.

    Attributes:
        settings: What it was told that differs from its defaults, and what it says of itself.
    """

    settings: dict[str, Any]

    def run(self, prompts: Sequence[str], counts: Sequence[int]) -> list[int]:
        """Answer every prompt greedily with as many tokens as asked, whatever they are.

        Returns:
            How many tokens each answer has.
        """

    def close(self) -> None:
        """Give everything back."""


def main(
    load: Callable[[Path, str, dict[str, Any]], Peer],
    packages: Sequence[str],
    program: Callable[[dict[str, Any]], Mapping[str, str]] | None = None,
) -> None:
    """Measure one peer on one file.

    Args:
        load: Loads a model's folder for a device ("cpu" or "cuda"), with options.
        packages: Those whose versions are noted.
        program: Tells the versions of what is no package, from the options.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--options", type=json.loads, default={}, help="of the peer, as JSON")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.input.read_text().splitlines()]
    prompts, counts = [row["prompt"] for row in rows], [row["max_tokens"] for row in rows]
    versions = {name: version(name) for name in packages}
    versions |= program(args.options) if program else {}
    began = time.perf_counter()
    peer = load(args.model, args.device, args.options)
    try:
        loaded = time.perf_counter()
        peer.run(_WARM, [8] * len(_WARM))
        warm = time.perf_counter()
        made = peer.run(prompts, counts)
        ended = time.perf_counter()
    finally:
        peer.close()
    if made != counts:
        wrong = sum(a != b for a, b in zip(made, counts, strict=True))
        sys.exit(f"{wrong} of {len(counts)} rows have not the tokens that they ask for")
    result = {
        "seconds": ended - warm,
        "load_s": loaded - began,
        "warm_up_s": warm - loaded,
        "completion_tokens": sum(made),
        "settings": peer.settings,
        "versions": versions,
    }
    args.out.write_text(json.dumps(result))


def with_environment(wanted: Mapping[str, str]) -> None:
    """Start this script again with environment variables that libraries read as they are loaded."""
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
