"""Text is read whatever it is packed and encoded in; what is no text is named for what it is."""

import bz2
import gzip
import lzma

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.rows.store import Part
from batchrun.jobs.rows.stream import text_of

TEXT = '{"prompt": "ü"}\n{"prompt": "two"}\n'


def zstd_file(path, data):
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)
    return path.read_bytes()


PACKED = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip of several members": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    "gzip on a tape": lambda data: gzip.compress(data) + bytes(512),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}
ENCODED = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json"])
@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("packed", PACKED)
def test_packing_and_encoding_are_known_by_content(tmp_path, name, encoding, packed):
    path = tmp_path / name
    path.write_bytes(PACKED[packed](TEXT.encode(encoding)))
    rows = list(open_source([path], "jsonl").rows())
    assert [row.fields for row in rows] == [{"prompt": "ü"}, {"prompt": "two"}]


def test_zstd_under_any_name(tmp_path):
    path = tmp_path / "a.csv"
    zstd_file(path, b"prompt\nhi\n")
    assert [row.fields for row in open_source([path], "csv").rows()] == [{"prompt": "hi"}]


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_other_byte_orders_have_marks_too(tmp_path, order):
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\ufeff" + TEXT).encode("utf-16-le" if order == "<" else "utf-16-be"))
    assert open_source([path], "jsonl").count() == 2


FOREIGN = {
    b"PAR1....PAR1": "a Parquet file",
    b"PK\x03\x04....": "Excel",
    b"ARROW1\0\0": "an Arrow file",
    b"\xff\xff\xff\xff\x10\0\0\0": "an Arrow stream",
    b"SQLite format 3\0": "an SQLite database",
    b"%PDF-1.7": "a PDF",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "Git LFS",
    b"<!DOCTYPE html><html></html>": "a web page",
    b"<HTML>sign in</HTML>": "a web page",
    TEXT.encode("utf-16-le"): "UTF-16 without a byte order mark",
    TEXT.encode("utf-16-be"): "UTF-16 without a byte order mark",
}


@pytest.mark.parametrize("content", FOREIGN, ids=list(FOREIGN.values()))
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_is_no_text_is_named_for_what_it_is(tmp_path, content, pack, kind):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(pack(content))
    with pytest.raises(InputError, match=FOREIGN[content]) as refused:
        open_source([path], kind)
    assert refused.value.hint
    assert "x." in str(refused.value)


def window(descriptor, flags=0):
    """The beginning of a zstd frame."""
    return b"\x28\xb5\x2f\xfd" + bytes([flags]) + descriptor + bytes(20)


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (window(bytes([(31 - 10) << 3])), "2,048 MiB"),
        (window(bytes([(27 - 10) << 3 | 1])), "144 MiB"),
        (window((1 << 28).to_bytes(4, "little"), 0x20 | 2 << 6), "256 MiB"),
        (window((1 << 30).to_bytes(8, "little"), 0x20 | 3 << 6), "1,024 MiB"),
    ],
)
def test_a_long_window_is_named_with_the_command_that_unpacks_it(tmp_path, head, size):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(head)
    with pytest.raises(InputError, match=f"window of {size}") as refused:
        open_source([path], "jsonl")
    assert refused.value.hint == f"decompress it first: zstd -d --long=31 '{path}'"


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_what_is_cut_short_is_told(tmp_path, pack):
    path = tmp_path / "x.jsonl"
    data = pack("".join(f'{{"i": {i * i}}}\n' for i in range(50_000)).encode())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"x\.jsonl is damaged or cut short"):
        open_source([path], "jsonl").count()


@pytest.mark.parametrize("tail", [b"\x1f\x8b\x08", b"rubbish"])
def test_rubbish_behind_gzip_is_an_error_and_no_end(tmp_path, tail):
    path = tmp_path / "x.jsonl"
    path.write_bytes(gzip.compress(TEXT.encode()) + tail)
    with pytest.raises(InputError, match="damaged or cut short"):
        open_source([path], "jsonl").count()


@given(st.text(), st.sampled_from(ENCODED), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_any_text_of_which_no_more_is_read_than_there_was(tmp_path_factory, text, encoding, more):
    path = tmp_path_factory.getbasetemp() / "text"
    text = "{" + text
    data = text.encode(encoding, "replace")
    path.write_bytes(data + b"x" * more)
    with text_of(path, len(data)) as file:
        assert file.read().decode() == data.decode(encoding).removeprefix("\ufeff")


def test_a_source_reads_no_further_than_its_part_goes(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(TEXT.rstrip())  # as if the writer was not done with the last line
    part = Part(path, path.stat().st_size)
    with path.open("a") as file:
        file.write(', "more": 1}\n{"prompt": "three"}\n')
    source = open_source([part], "jsonl")
    assert [row.fields["prompt"] for row in source.rows()] == ["ü", "two"]
    assert source.count() == 2
