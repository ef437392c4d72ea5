from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from batchrun.models.resolve import ModelRef
from batchrun.runner.param_columns import OVERRIDES
from benchmarks.workloads import WORKLOADS, Row, generate

ROOT = Path(__file__).parents[2]


def words(row: Row) -> int:
    return len(row.prompt.split())


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(name: str) -> None:
    rows = list(generate(name, 40))
    assert len(rows) == 40
    assert rows == list(generate(name, 40))
    assert rows != list(generate(name, 40, seed=1))
    assert all(row.max_tokens > 0 and row.ignore_eos for row in rows)


@pytest.mark.parametrize("name", [*WORKLOADS][:-1])
def test_as_many_tokens_as_words(name: str, smollm2: ModelRef) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2.path / "tokenizer.json"))
    for row in generate(name, 24):
        assert len(tokenizer.encode(row.prompt).ids) == pytest.approx(words(row), abs=2)


def test_lengths_are_within_their_bounds() -> None:
    bounds = {
        "mixed": ((20, 400), (16, 256)),
        "decode-heavy": ((16, 32), (128, 256)),
        "prefill-heavy": ((300, 900), (4, 16)),
    }
    for name, ((least, most), (least_made, most_made)) in bounds.items():
        rows = list(generate(name, 300))
        assert all(least <= words(row) <= most for row in rows)
        assert all(least_made <= row.max_tokens <= most_made for row in rows)


def test_half_the_rows_share_a_system_prompt_and_a_quarter_a_document() -> None:
    rows = list(generate("shared-prefix", 100))
    found = {
        length: max(
            sum(row.prompt.split()[:length] == other.prompt.split()[:length] for row in rows)
            for other in rows
            if words(other) > length
        )
        for length in (150, 600)
    }
    assert found == {150: 50, 600: 25}


def test_the_questions_of_a_document_lie_all_over_the_file() -> None:
    rows = list(generate("documents", 200))
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(" ".join(row.prompt.split()[:300]), []).append(place)
    assert len(places) == 25
    assert {len(found) for found in places.values()} == {8}
    assert sum(max(found) - min(found) > 100 for found in places.values()) > 20


def test_advertisements_are_alike_and_differ() -> None:
    prompts = [row.prompt for row in generate("extract", 100)]
    assert len({*prompts}) > 95
    assert len({prompt[:400] for prompt in prompts}) == 1


def test_one_row_in_a_hundred_is_ten_times_as_long() -> None:
    rows = list(generate("long-tail", 300))
    assert sum(row.max_tokens > 64 for row in rows) == 3
    assert sum(words(row) > 100 for row in rows) == 3


def test_the_command_writes_rows_whose_columns_batchrun_takes(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.workloads", "mixed", "--rows", "5", "--out", out]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5
    assert set(rows[0]) - {"prompt"} <= set(OVERRIDES)
