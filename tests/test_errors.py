"""What is said of an error that another library raised."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import first_line, said_by


@given(st.sampled_from([RuntimeError, KeyError, OSError]), st.text())
def test_an_error_is_told_in_one_line_of_valid_unicode(kind, message):
    error = kind(message)
    assert len(first_line(error).splitlines()) == 1
    told = said_by(error)
    assert told.startswith(kind.__name__)
    assert len(told.encode().splitlines()) == 1


@pytest.mark.parametrize(
    ("message", "line", "told"),
    [
        ("", "RuntimeError", "RuntimeError"),
        ("\n \n", "RuntimeError", "RuntimeError"),
        ("no room\nframe 1", "no room", "RuntimeError: no room"),
        ("\n no room", "no room", "RuntimeError: no room"),
        ("half \ud800", "half \ud800", "RuntimeError: half \\ud800"),
    ],
)
def test_an_error_without_a_message_is_told_by_its_type(message, line, told):
    error = RuntimeError(message)
    assert (first_line(error), said_by(error)) == (line, told)
