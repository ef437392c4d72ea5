"""Which columns are sampling parameters, what they can hold, and what is data after all."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.row import Source
from batchrun.jobs.rows.source import open_source
from batchrun.runner.param_columns import (
    OVERRIDES,
    BadParameterError,
    param_columns,
    read_parameter,
)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("max_tokens", 5, 5),
        ("max_tokens", 5.0, 5),
        ("max_tokens", "5", 5),
        ("max_tokens", " 5.0 ", 5),
        ("max_tokens", Decimal("5.00"), 5),
        ("max_tokens", np.float32(5), 5),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("seed", str(2**63 - 1), 2**63 - 1),
        ("seed", -(2**63), -(2**63)),
        ("temperature", "0.7", 0.7),
        ("temperature", Decimal("0.5"), 0.5),
        ("temperature", 0, 0.0),
        ("top_p", "1e-1", 0.1),
        ("ignore_eos", "true", True),
        ("ignore_eos", "False", False),
        ("ignore_eos", 1.0, True),
        ("ignore_eos", "0", False),
        ("stop", "nan", ("nan",)),
        ("stop", "\n", ("\n",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", ["", "a", None, " "], ("a", " ")),
        ("stop_token_ids", [1, 2.0], (1, 2)),
        ("stop_token_ids", 7, (7,)),
        ("stop_token_ids", "[1, 23]", (1, 23)),
        ("stop_token_ids", "12", (12,)),
    ],
)
def test_what_a_column_says(name: str, value: Any, found: Any) -> None:
    got = read_parameter(name, value)
    assert got == found
    assert type(got) is type(found)


@pytest.mark.parametrize("name", OVERRIDES)
def test_null_nan_and_empty_text_leave_the_jobs_value(name: str) -> None:
    for nothing in (None, float("nan"), Decimal("nan"), ""):
        assert read_parameter(name, nothing) is None
    for nothing in ([], [""], [None], ["", None]):
        assert read_parameter("stop", nothing) is None
    if name != "stop":
        assert [read_parameter(name, text) for text in (" ", "NaN")] == [None, None]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("temperature", 25.0, "holds 25.0, and temperature must be between 0 and 5"),
        ("temperature", -3.5, "holds -3.5"),
        ("temperature", True, "holds True"),
        ("temperature", float("inf"), "holds inf"),
        ("max_tokens", 5.5, "max_tokens must be a whole number, at least 1"),
        ("max_tokens", -1, "at least 1, or 0 with scores"),
        ("max_tokens", True, "at least 1"),
        ("max_tokens", float("inf"), "holds inf"),
        ("max_tokens", 10**400, "must be a whole number"),
        ("max_tokens", "1e999999999", "must be a whole number"),
        ("max_tokens", "1_0", "holds '1_0'"),
        ("max_tokens", b"5", "must be a whole number"),
        ("max_tokens", [5], "must be a whole number"),
        ("max_tokens", datetime(2024, 1, 1), "holds 2024-01-01 00:00:00"),
        ("seed", "tomato", "holds 'tomato', and seed must be a whole number"),
        ("seed", 2**63, "of 64 bits"),
        ("top_k", 2**31, "0 (off) or more"),
        ("top_p", 0, "above 0 and at most 1"),
        ("min_p", 1.1, "between 0 and 1"),
        ("repetition_penalty", 0, "above 0"),
        ("presence_penalty", float("-inf"), "a finite number"),
        ("stop", 17, "text, or a list of texts"),
        ("stop", ["a", 7], "text, or a list of texts"),
        ("stop", [["a"]], "text, or a list of texts"),
        ("stop", {"a": "b"}, "text, or a list of texts"),
        ("repetition_penalty", 1e-7, "above 0"),
        ("stop_token_ids", [-1], "a list of whole numbers"),
        ("stop_token_ids", "1 2", "a list of whole numbers"),
        ("stop_token_ids", "[" * 100_000, "holds '[[["),
        ("ignore_eos", "maybe", "true or false"),
        ("ignore_eos", 2, "true or false"),
    ],
)
def test_what_can_be_no_parameter_says_what_could_and_how_to_keep_it_as_data(
    name: str, value: Any, says: str
) -> None:
    with pytest.raises(BadParameterError) as caught:
        read_parameter(name, value)
    assert says in str(caught.value)
    assert str(caught.value).endswith("--ignore-param-columns treats such columns as data")
    assert len(str(caught.value)) < 250


def parquet(folder: Path, **columns: Any) -> Source:
    pq.write_table(pa.table(columns), folder / "in.parquet")
    return open_source([folder / "in.parquet"], "parquet")


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> Source:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source([folder / "in.jsonl"], "jsonl")


def test_parameters_are_found_in_order_and_other_columns_are_not_looked_at(tmp_path: Path) -> None:
    source = parquet(tmp_path, weather=["hot"], seed=[1], max_tokens=["7"], Temperature=[30.0])
    assert param_columns(source, {}) == ["max_tokens", "seed"]
    assert param_columns(parquet(tmp_path, prompt=["x"]), {}) == []


@pytest.mark.parametrize("write", ["parquet", "jsonl"])
def test_a_column_of_which_half_can_be_no_parameter_is_refused(tmp_path: Path, write: str) -> None:
    def source(temperatures: list[Any]) -> Source:
        if write == "parquet":
            return parquet(tmp_path, temperature=temperatures)
        return jsonl(tmp_path, [{"temperature": value} for value in temperatures])

    with pytest.raises(InputError, match=r"row 1 has 25\.0, and .* and 5 \(2 of its first 4"):
        param_columns(source([1.0, 25.0, None, -3.5, 0.5]), {})
    assert param_columns(source([1.0, 25.0, None, -3.5, 0.5, 0.6]), {}) == ["temperature"]
    assert param_columns(source([None, 25.0, None]), {}) == ["temperature"]  # that row's own error
    with pytest.raises(InputError, match="row 0 has 25"):
        param_columns(source([25.0]), {})


def test_only_the_first_rows_of_the_job_are_looked_at(tmp_path: Path) -> None:
    late = [0.5] * 1000 + [30.0] * 5000
    assert param_columns(parquet(tmp_path, temperature=late), {}) == ["temperature"]
    early = [0.5] * 2 + [30.0] * 10
    assert param_columns(parquet(tmp_path, temperature=early), {}, 3) == ["temperature"]
    with pytest.raises(InputError, match="10 of its first 12"):
        param_columns(parquet(tmp_path, temperature=early), {}, 100)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("seed", pa.timestamp("us")),
        ("max_tokens", pa.bool_()),
        ("temperature", pa.struct([("min", pa.float64())])),
        ("temperature", pa.list_(pa.float64())),
        ("top_p", pa.binary()),
        ("stop", pa.int64()),
        ("stop", pa.list_(pa.int64())),
        ("stop_token_ids", pa.bool_()),
        ("ignore_eos", pa.date32()),
    ],
)
def test_a_type_that_is_no_parameters_is_refused_though_all_is_null(
    tmp_path: Path, name: str, kind: pa.DataType
) -> None:
    source = parquet(tmp_path, **{name: pa.array([None, None], kind)})
    with pytest.raises(InputError, match=f"the column '{name}' can't set .* it holds") as caught:
        param_columns(source, {})
    assert str(kind).partition("<")[0] in str(caught.value)
    assert "--ignore-param-columns" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("seed", pa.null()),
        ("max_tokens", pa.dictionary(pa.int8(), pa.string())),
        ("temperature", pa.decimal128(5, 2)),
        ("top_k", pa.float32()),
        ("stop", pa.large_list(pa.string())),
        ("stop_token_ids", pa.list_(pa.int32())),
        ("stop_token_ids", pa.float64()),
        ("ignore_eos", pa.bool_()),
    ],
)
def test_types_that_are(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    assert param_columns(parquet(tmp_path, **{name: pa.array([None], kind)}), {}) == [name]


def test_what_the_jobs_own_parameters_rule_out_is_refused_too(tmp_path: Path) -> None:
    source = parquet(tmp_path, temperature=[0.7, 0.7, 0.0])
    assert param_columns(source, {}) == ["temperature"]
    with pytest.raises(InputError, match="in row 0, temperature must be 0 with beam search"):
        param_columns(source, {"num_beams": 4, "temperature": 0.0})
    # What the model's own max_tokens allows is not known yet.
    assert param_columns(parquet(tmp_path, min_tokens=[600, 600]), {}) == ["min_tokens"]
    with pytest.raises(InputError, match="min_tokens must be at most max_tokens"):
        param_columns(parquet(tmp_path, min_tokens=[600, 600]), {"max_tokens": 5})


def test_a_row_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"seed": 1}\nnot json\n{"seed": "x"}\n{"seed": 2}\n')
    assert param_columns(open_source([path], "jsonl"), {}) == ["seed"]
