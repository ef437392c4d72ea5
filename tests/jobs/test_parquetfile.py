"""Parquet files whose parts contradict each other are refused, wherever they are read."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.parquetfile import opened
from batchrun.jobs.rows.source import open_source
from tests.fuzz.thrift import spans, varint


def written(table, **options):
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def of_file(meta):
    return meta.num_rows


def of_group(meta):
    return meta.row_group(0).num_rows


def of_last_column(meta):
    return meta.row_group(0).column(meta.num_columns - 1).num_values


def lying(data, now, *which):
    """The file with another number in its footer, wherever `which` finds it."""
    for number in which:
        lies = _lies(data, _said(number, data), now)
        data = next(lie for lie in lies if _said(number, lie) == now)
    return data


def _lies(data, was, now):
    """The file with another number in the place of one in its footer, each of them in turn."""
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[begin:-8]
    for span in spans(footer, 0)[0]:
        if span.kind == "integer" and footer[span.begin : span.end] == varint(was * 2):
            lie = footer[: span.begin] + varint(now * 2) + footer[span.end :]
            yield data[:begin] + lie + len(lie).to_bytes(4, "little") + b"PAR1"


def _said(number, data):
    try:
        return number(pq.read_metadata(io.BytesIO(data)))
    except (pa.ArrowException, OSError, IndexError):
        return None


def refusal(path, data):
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        for _ in open_source([path], "parquet").chunks():
            pass
    return str(caught.value)


@pytest.mark.parametrize("said", [202, 198])
def test_a_footer_that_says_more_or_fewer_rows_than_its_groups(tmp_path, said):
    data = written(pa.table({"prompt": ["xyz"] * 200}), row_group_size=150)
    path = tmp_path / "in.parquet"
    assert refusal(path, lying(data, said, of_file)) == (
        f"{path} is damaged: its footer declares {said} rows, but its 2 row groups have 200"
    )


def test_a_column_with_fewer_values_than_its_group_has_rows(tmp_path):
    data = written(pa.table({"prompt": ["xyz"] * 200, "id": range(200)}))
    path = tmp_path / "in.parquet"
    assert refusal(path, lying(data, 199, of_last_column)) == (
        f"{path} is damaged: row group 0 has 200 rows but 199 values in its column 'id'"
    )


def test_a_group_that_holds_fewer_rows_than_everything_says(tmp_path):
    data = written(pa.table({"prompt": ["xyz"] * 200}), use_dictionary=False, compression="none")
    path = tmp_path / "in.parquet"
    assert refusal(path, lying(data, 202, of_file, of_group, of_last_column)) == (
        f"{path} is damaged: row group 0 declares 202 rows but holds 200"
    )


def test_pages_are_checked_where_they_have_checksums(tmp_path):
    path = tmp_path / "in.parquet"
    options = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    for checked in (False, True):
        data = written(pa.table({"prompt": ["a prompt"]}), write_page_checksum=checked, **options)
        path.write_bytes(data.replace(b"a prompt", b"a grompt", 1))
        if checked:
            with pytest.raises(InputError, match=r"in\.parquet is damaged.*CRC"):
                list(open_source([path], "parquet").rows())
        else:
            [row] = open_source([path], "parquet").rows()
            assert row.fields == {"prompt": "a grompt"}


def test_names_that_are_no_text(tmp_path):
    data = written(pa.table({"prompt": ["x"], "of": [{"näme": 1}]}), store_schema=False)
    path = tmp_path / "in.parquet"
    path.write_bytes(data.replace("näme".encode(), "näme".encode("latin-1") + b"x"))
    with pytest.raises(InputError, match=r"in\.parquet is damaged"), opened(path):
        pass


def test_the_damaged_one_of_several_files_is_named(tmp_path):
    data = written(pa.table({"prompt": ["xyz"] * 200}), row_group_size=150)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.parquet").write_bytes(data)
    (tmp_path / "b.parquet").write_bytes(lying(data, 198, of_file))
    with pytest.raises(InputError, match=r"/b\.parquet is damaged"):
        open_source([tmp_path / f"{name}.parquet" for name in ("a", "b", "c")], "parquet")


def test_our_own_bugs_are_not_taken_for_damage(tmp_path):
    path = tmp_path / "in.parquet"
    path.write_bytes(written(pa.table({"prompt": ["x"]})))
    with pytest.raises(ZeroDivisionError), opened(path):
        1 // 0  # noqa: B018
