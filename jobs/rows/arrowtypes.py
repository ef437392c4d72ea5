"""Kinds of Arrow types that differ only in how they are laid out."""

from __future__ import annotations

import pyarrow as pa


def is_text(kind: pa.DataType) -> bool:
    """Whether values are text."""
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def without_dictionary(kind: pa.DataType) -> pa.DataType:
    """The type of the values, whether a dictionary holds each once or not."""
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


def is_binary(kind: pa.DataType) -> bool:
    """Whether values are bytes."""
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, other than maps."""
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def is_large_list(kind: pa.DataType) -> bool:
    """Whether values are lists with offsets of 64 bits."""
    return pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
