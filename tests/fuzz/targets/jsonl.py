"""JSON as input: lines, an array, objects over several lines; packed and encoded."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from batchrun.jobs.errors import InputError
from tests.fuzz.inputs import PACKERS, deep, opened, plain, rows_of, text_in
from tests.fuzz.mutate import damaged, json_damaged
from tests.fuzz.trial import Target, Wrong

ROWS: list[dict[str, Any]] = [
    {"prompt": f"row {i}", "id": i, "of": {"a": [i, None, 1.5e3], "text": "é\u2028\n" * (i % 9)}}
    for i in range(40)
]
_DEEPEST = 64
_SAMPLE = 100


def seeds(scratch: Path) -> dict[str, bytes]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    more = [{"n": 10**i, "x": float(f"1e-{i}"), "t": ["\ud83d\ude00", True]} for i in range(30)]
    text = "".join(
        json.dumps(row, ensure_ascii=i % 2 == 0) + "\r\n\n" for i, row in enumerate(more)
    )
    return {
        "lines": lines,
        "numbers": text.encode(errors="replace"),
        "array": json.dumps(ROWS, indent=1).encode(),
        "several": "".join(json.dumps(row, indent=2) + "\n" for row in ROWS).encode(),
        "utf16": lines.decode().encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + lines,
        **{name: pack(lines) for name, pack in PACKERS.items()},
        "members": b"".join(PACKERS["gz"](piece) for piece in (lines[:900], lines[900:])),
        "streams": b"".join(PACKERS["bz2"](piece) for piece in (lines[:900], lines[900:])),
    }


def mutate(sound: bytes, rng: Random) -> bytes:
    if sound.startswith(b'{"prompt') and rng.random() < 0.4:
        lines = sound.splitlines(keepends=True)
        for _ in range(rng.choice([1, 1, 5])):
            at = rng.randrange(len(lines))
            lines[at] = json_damaged(lines[at], rng) + b"\n" * rng.choice([0, 1, 1, 1, 1, 300])
        return b"".join(lines)
    return damaged(sound, rng)


def check(name: str, data: bytes, scratch: Path) -> str:
    """Each line that Python reads as an object is the row of its number, others errors of theirs.

    So is each item of an array that Python reads. A file is not refused for some of its lines.
    """
    path = scratch / "rows.jsonl"
    path.write_bytes(data)
    text = text_in(data)
    wanted = None if text is None else _wanted(text)
    try:
        rows = rows_of(opened(path))
    except InputError:
        lines = data.startswith((b'{"', b"\xef\xbb\xbf{"))
        if lines and any(item is not None for item in (wanted or ())[:_SAMPLE]):
            raise Wrong("it is refused, and has rows") from None
        raise
    if text is None:
        raise Wrong("it can't be unpacked, and has rows")
    if wanted is None:
        return "rows"
    found = [None if row.error is not None else plain(row.fields) for row in rows]
    if found != wanted:
        pairs = zip(found, wanted, strict=False)
        first = next((i for i, (is_, was) in enumerate(pairs) if is_ != was), "the end")
        raise Wrong(f"{len(found)} rows, not {len(wanted)}; they differ from {first} on")
    return "rows"


def _wanted(text: str) -> list[Any] | None:
    """Each row, None for a bad one; None where Python does not say what the rows are."""
    if text.startswith('{"'):
        pieces = [line.removeprefix("\ufeff") for line in text.split("\n")]
        return [_object(piece) for piece in pieces if piece.strip(" \t\n\r\x0b\x0c")]
    if text.startswith("[\n {"):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return None if _lone(text) else [_row(item) for item in items]
    return None


def _lone(text: str) -> bool:
    """Whether bytes are not UTF-8, which Python's strings hide."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def _object(line: str) -> Any:
    try:
        return None if _lone(line) else _row(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _row(value: Any) -> Any:
    return plain(value) if isinstance(value, dict) and not deep(value, _DEEPEST - 1) else None


TARGETS = [Target("jsonl", seeds, check, (InputError,), mutate)]
