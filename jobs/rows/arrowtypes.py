"""Groups of Arrow types that differ only in layout."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
from pyarrow import types


def any_of(*kinds: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    """Whether a type is one of these kinds."""
    return lambda kind: any(is_kind(kind) for is_kind in kinds)


is_text = any_of(types.is_string, types.is_large_string, types.is_string_view)
is_binary = any_of(
    types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view
)
is_large_list = any_of(types.is_large_list, types.is_large_list_view)  # offsets of 64 bits
is_list = any_of(  # without maps, which are lists too
    types.is_list, types.is_fixed_size_list, types.is_list_view, is_large_list
)


def without_dictionary(kind: pa.DataType) -> pa.DataType:
    """The type of the values, dictionary-encoded or not."""
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind
