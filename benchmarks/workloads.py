"""Seeded workloads: the same name, rows and seed give the same file on every machine.

    python -m benchmarks.workloads mixed --rows 160 --out mixed.jsonl

Every row has a prompt, and in columns of its own how many tokens to make (`max_tokens`) and to make
all of them (`ignore_eos`), so that every engine does the same work. Prompts are common English
words, each of which is one token in the vocabularies of SmolLM2, GPT-2 and their relatives: as many
words as tokens are wanted. They mean nothing, which no engine's speed depends on.

Rows are drawn one by one and written as they are drawn: a million of them need no more memory.
By default there are so many that two cores are busy with SmolLM2-135M for some twenty seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.ads import TASK, ads

_TEXT = """
the of and to in is that for it was on are as with they be at one have this from by hot but some
what there we can out other were all your when up use word how said an each she which do their time
if will way about many then them would write like so these her long make thing see him two has look
more day could go come did my sound no most number who over know water than call first people may
down side been now find any new work part take get place made live where after back little only
round man year came show every good me give our under name very through just form much great think
say help low line before turn cause same mean differ move right boy old too does tell set three want
air well also play small end put home read hand port large spell add even land here must big high
such follow act why ask men change went light kind off need house picture try us again animal point
mother world near build self earth father head stand own page should country found answer school
grow study still learn plant cover food sun four thought let keep eye never last door between city
tree cross since hard start might story saw far sea draw left late run don press close night real
life few stop open seem together next white children begin got walk example ease paper often always
music those both mark book letter until mile river car feet care second group carry took rain eat
room friend began idea fish mountain north once base hear horse cut sure watch color face wood main
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class Row:
    """A row of the file.

    Attributes:
        prompt: Text of about as many tokens as words.
        max_tokens: Tokens to make.
        ignore_eos: Make all of them, whatever they say.
    """

    prompt: str
    max_tokens: int
    ignore_eos: bool = True


class Draw:
    """Words and lengths, drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def words(self, count: int) -> str:
        """Text of `count` words."""
        return " ".join(WORDS[i] for i in self.rng.integers(len(WORDS), size=count))

    def uniform(self, least: int, most: int) -> int:
        """A length between two bounds, both included."""
        return int(self.rng.integers(least, most + 1))

    def lognormal(self, median: int, sigma: float, least: int, most: int) -> int:
        """A length as those of chats are: many short, few long."""
        return int(np.clip(self.rng.lognormal(np.log(median), sigma), least, most))

    def order(self, rows: int) -> Iterator[int]:
        """The numbers below `rows`, shuffled."""
        return map(int, self.rng.permutation(rows))


def mixed(draw: Draw, rows: int) -> Iterator[Row]:
    """Chat-like lengths: prompts of 20 to 400 tokens, answers of 16 to 256, mostly short."""
    for _ in range(rows):
        prompt = draw.words(draw.lognormal(90, 0.75, 20, 400))
        yield Row(prompt, draw.lognormal(80, 0.7, 16, 256))


def decode_heavy(draw: Draw, rows: int) -> Iterator[Row]:
    """Short prompts (16 to 32 tokens), long answers (128 to 256)."""
    for _ in range(rows):
        yield Row(draw.words(draw.uniform(16, 32)), draw.uniform(128, 256))


def prefill_heavy(draw: Draw, rows: int) -> Iterator[Row]:
    """Long prompts (300 to 900 tokens), short answers (4 to 16)."""
    for _ in range(rows):
        yield Row(draw.words(draw.uniform(300, 900)), draw.uniform(4, 16))


def shared_prefix(draw: Draw, rows: int) -> Iterator[Row]:
    """Half the rows after one 150-token system prompt, a quarter after one 600-token document."""
    system, document = draw.words(150), draw.words(600)
    for number in draw.order(rows):
        own = draw.words(draw.uniform(20, 60))
        if 4 * number < 2 * rows:
            own = f"{system} {own}"
        elif 4 * number < 3 * rows:
            own = f"{document} {own}"
        yield Row(own, draw.uniform(32, 96))


def documents(draw: Draw, rows: int, *, questions: int = 8) -> Iterator[Row]:
    """Documents of 300 tokens with 8 questions each, which lie anywhere in the file."""
    many = -(-rows // questions)
    seeds = draw.rng.integers(2**63, size=many)
    for number in draw.order(rows):
        document = Draw(int(seeds[number % many])).words(300)  # drawn again: memory stays flat
        yield Row(f"{document} {draw.words(draw.uniform(10, 30))}", draw.uniform(16, 48))


def long_tail(draw: Draw, rows: int) -> Iterator[Row]:
    """One row in a hundred has a prompt and an answer ten times as long as the others'."""
    long = -(-rows // 100)
    for number in draw.order(rows):
        times = 10 if number < long else 1
        prompt = draw.words(times * draw.uniform(20, 100))
        yield Row(prompt, times * draw.uniform(32, 64))


def extract(draw: Draw, rows: int) -> Iterator[Row]:
    """Advertisements to be read into JSON, after two examples: text that means something."""
    found = ads(draw.rng)

    def shown(text: str, said: dict[str, str | int]) -> str:
        return f"Advertisement: {text}\nJSON: {json.dumps(said)}\n\n"

    examples = "".join(shown(*next(found)) for _ in range(2))
    for text, _ in islice(found, rows):
        yield Row(f"{TASK}\n\n{examples}Advertisement: {text}\nJSON:", 48)


Generator = Callable[[Draw, int], Iterator[Row]]

# Each with the rows that it has by default.
WORKLOADS: dict[str, tuple[Generator, int]] = {
    "mixed": (mixed, 160),
    "decode-heavy": (decode_heavy, 128),
    "prefill-heavy": (prefill_heavy, 48),
    "shared-prefix": (shared_prefix, 256),
    "documents": (documents, 384),
    "long-tail": (long_tail, 200),
    "extract": (extract, 192),
}


def generate(name: str, rows: int | None = None, seed: int = 0) -> Iterator[Row]:
    """The rows of a workload.

    Args:
        name: One of `WORKLOADS`.
        rows: How many, instead of so many as the workload has by default.
        seed: Another one gives other words and lengths of the same kinds.
    """
    generator, default = WORKLOADS[name]
    return generator(Draw(seed), default if rows is None else rows)


def write(path: Path, rows: Iterator[Row]) -> None:
    """Write rows as JSON Lines."""
    with path.open("w") as file:
        file.writelines(f"{json.dumps(asdict(row))}\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("--rows", type=int, help="default: about 20 seconds of work on 2 cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    args = parser.parse_args()
    write(args.out, generate(args.name, args.rows, args.seed))


if __name__ == "__main__":
    main()
