"""Checks every text-generating model type of the installed transformers: same tokens, or refused.

`python -m tests.parity.sweep [TYPE ...] [--write docs/models.md]` builds a tiny random model of
each type, runs prompts longer than every window and chunk, and compares with eager `generate`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty
from typing import NamedTuple

import torch
import transformers as tf

from batchrun.engine.core import SamplingParams
from batchrun.engine.model import gates
from batchrun.engine.model.prepare import prepare
from batchrun.errors import ModelError
from tests.parity import zoo
from tests.parity.runner import generate, outputs, rig, run

_SECONDS = 500  # a tiny model that takes longer hangs, however busy the machine is
_LENGTHS = (1, 5, 24, 33, 60, 97, 150)  # windows are of 23 tokens, chunks of 32
_TOKENS = 12
WHAT = ("same", "refused", "not built", "not compared", "wrong")
_BEGIN, _END = "<!-- the sweep's table -->", "<!-- its end -->"


class Verdict(NamedTuple):
    """What became of a type, one of `WHAT`, and why."""

    kind: str
    what: str
    why: str = ""


def cases(kinds: Sequence[str] = ()) -> Iterator[tuple[str, bool]]:
    """Each type as its config has it, and those with windows that are off, with them on."""
    for kind in kinds or (*zoo.TYPES, *zoo.WITH_IMAGES):
        yield kind, False
        try:
            zoo.config_of(kind, window=True)
        except Exception:  # there is none, or no config at all
            continue
        yield kind, True


def judge(kind: str, *, window: bool = False) -> Verdict:
    """Build a type's model, put it through the gates, and compare with `generate`."""
    name = f"{kind} (window)" if window else kind
    try:
        model = zoo.build(kind, window=window)
    except Exception as error:  # whatever a config class makes of small numbers
        return Verdict(name, "not built", _line(error))
    rng = random.Random(5)
    try:
        loaded = prepare(model)
        vocab = model.config.get_text_config().vocab_size
        prompts = [[rng.randrange(3, vocab) for _ in range(length)] for length in _LENGTHS]
        with rig(loaded, max_num_batched_tokens=50) as r:
            gates.verify(loaded, r.executor, r.arena, 50)
            got = outputs(run(r, prompts, SamplingParams(max_tokens=_TOKENS)))
    except ModelError as error:
        return Verdict(name, "refused", _line(error).partition(" is refused: ")[2])
    stops = {"eos_token_id": sorted(loaded.eos_ids)} if loaded.eos_ids else {}
    try:
        want = [generate(loaded.model, prompt, _TOKENS, **stops) for prompt in prompts]
    except (AttributeError, ValueError) as error:
        return Verdict(name, "not compared", f"its own `generate` fails: {_line(error)}")
    wrong = sum(g != w for g, w in zip(got, want, strict=True))
    return Verdict(name, "wrong" if wrong else "same", f"{wrong} of {len(want)} rows" * bool(wrong))


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else repr(error))[:200]


def _apart(kind: str, window: bool, found: multiprocessing.Queue[Verdict]) -> None:
    warnings.simplefilter("ignore")
    tf.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        found.put(judge(kind, window=window))
    except Exception as error:
        found.put(Verdict(kind, "wrong", f"{type(error).__name__}: {_line(error)}"))


def judged_apart(kind: str, window: bool = False) -> Verdict:
    """The same in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("fork")
    found: multiprocessing.Queue[Verdict] = context.Queue()
    process = context.Process(target=_apart, args=(kind, window, found))
    process.start()
    try:
        return found.get(timeout=_SECONDS)
    except Empty:
        return Verdict(kind, "wrong", f"no answer within {_SECONDS} s")
    finally:
        process.kill()
        process.join()


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as Markdown, with their counts."""
    counts = Counter(v.what for v in verdicts)
    summary = ", ".join(f"{counts[what]} {what}" for what in WHAT)
    rows = (f"| {v.kind} | {v.what} | {v.why.replace('|', '/')} |" for v in verdicts)
    head = "| type | verdict | reason |\n|---|---|---|"
    return f"transformers {tf.__version__}: {summary}.\n\n{head}\n" + "\n".join(rows)


def written(page: str, verdicts: Sequence[Verdict]) -> str:
    """A page with its table replaced."""
    before, after = page.partition(_BEGIN)[0], page.partition(_END)[2]
    return f"{before}{_BEGIN}\n{table(verdicts)}\n{_END}{after}"


def listed(page: str) -> list[Verdict]:
    """The verdicts that a page lists."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", page.partition(_BEGIN)[2], re.MULTILINE)
    return [Verdict(*row) for row in rows if row[1] in WHAT]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="by default all")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    options = parser.parse_args(arguments)
    verdicts = []
    for kind, window in cases(options.types):
        verdicts.append(judged_apart(kind, window))
        print(*verdicts[-1], sep=" | ", flush=True)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(written(page, verdicts), encoding="utf-8")
    counts = Counter(v.what for v in verdicts)
    print(json.dumps({"transformers": tf.__version__, **{what: counts[what] for what in WHAT}}))
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
