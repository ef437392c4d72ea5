"""Bounds what chat templates make: Jinja's sandbox limits what they reach, this how far they grow.

    {% set s = s ~ s %}  {{ 'x' * 10**9 }}  {{ '%*d' % (10**9, 1) }}  {{ 3 | round(10**9, 'ceil') }}

No text, list or number in a template grows longer than any prompt could be, and neither does its
output. What takes long without growing is left to `batchrun.runner.overdue`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator
from functools import partial, update_wrapper
from typing import Any

import jinja2
from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from batchrun.prompts.chat_source import parsed
from batchrun.prompts.messages import PromptError

_MOST = 1 << 26  # characters of a text, items of a list: more than any context holds
# Costs in characters: computing with numbers takes longer than copying text.
_BIT = 64  # a bit of a number
_PLACE = 1 << 16  # a decimal place
_LINES = 1024  # a character of JSON's indent: about so many lines begin with it
_FIELD = re.compile(r"%(?:\([^)]*\))?([#0\- +*\d.]*)")
_JOINS = ("str_join", "markup_join")  # what Jinja's code joins texts with, for `~`


def bound(source: str) -> None:
    """Bound what a chat template makes whenever transformers renders it from now on.

    transformers compiles each template once and keeps it. The kept one is compiled again in its own
    environment, with checks on the operators and functions that can make much from little.

    Raises:
        PromptError: It can't be compiled without making too much.
        jinja2.TemplateError: It can't be compiled; transformers would raise the same.
    """
    check_constants(source)
    template = _compile_jinja_template(source)
    environment = template.environment
    if environment.intercepted_binops:
        return
    environment.intercepted_binops = frozenset(_OPERATORS)
    for table, sizes in ((environment.binop_table, _OPERATORS), (environment.filters, _FILTERS)):
        for name, size in sizes.items():
            table[name] = update_wrapper(partial(_made, table[name], size), table[name])
    environment.binop_table["+"] = _add
    environment.call = partial(_call, environment.call)
    environment.concat = _concat
    made = environment.from_string(source)
    names = made.root_render_func.__globals__
    for name in _JOINS:
        names[name] = partial(_made, names[name], _nothing)
    template.root_render_func, template.blocks = made.root_render_func, made.blocks


def check_constants(source: str) -> None:
    """Refuse a template from which Jinja computes something too large as soon as it compiles it.

    Raises:
        PromptError: It is refused.
    """
    try:
        tree = parsed(source)
    except (jinja2.TemplateError, ValueError, RecursionError):  # ValueError: a number too long
        return
    for node in reversed(list(tree.find_all((nodes.BinExpr, nodes.Concat, nodes.Filter)))):
        try:  # the nodes within this one have been checked already
            size = _constant_size(node)
        except Exception:  # it is not a constant, or can't be computed
            continue
        _check(size)


def _constant_size(node: nodes.Node) -> int:
    if isinstance(node, nodes.BinExpr):
        return _OPERATORS[node.operator](node.left.as_const(), node.right.as_const())
    if isinstance(node, nodes.Concat):
        return sum(len(str(part.as_const())) for part in node.nodes)
    assert isinstance(node, nodes.Filter)
    assert node.node is not None
    values = [part.as_const() for part in (node.node, *node.args)]
    return _FILTERS[node.name](*values, **{str(p.key): p.value.as_const() for p in node.kwargs})


def _check(size: int) -> None:
    if size > _MOST:
        raise PromptError(
            "chat_template",
            f"the chat template makes a text, list or number of more than {_MOST:,} characters",
        )


def _made(function: Callable[..., Any], size: Callable[..., int], *args: Any, **named: Any) -> Any:
    """What a function returns; it is not called if `size` says that this would be too large."""
    args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
    _check(size(*(arg for arg in args if not isinstance(arg, nodes.EvalContext)), **named))
    found = function(*args, **named)
    _check(_length(found))
    return found


def _add(left: Any, right: Any) -> Any:
    found = left + right  # in every template, many times; at most two allowed texts long
    if found.__class__ is not str or len(found) > _MOST:
        _check(_length(found))
    return found


def _call(call: Callable[..., Any], context: Any, function: Any, *args: Any, **named: Any) -> Any:
    """A call in a template; methods of texts and numbers run only if they can't grow too much."""
    called = partial(call, context, function)
    method = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
    owner, size = getattr(method, "__self__", None), _METHODS.get(getattr(method, "__name__", ""))
    if size is not None and isinstance(owner, str | bytes | int):
        for name in ("_loop_vars", "_block_vars"):  # Jinja's own, for functions with a context
            named.pop(name, None)
        if args or named:
            return _made(called, partial(size, owner), *args, **named)
    found = called(*args, **named)
    _check(_length(found))
    return found


def _concat(parts: Iterable[str]) -> str:
    """The output of a template, or of a part of it."""
    size, kept = 0, []
    for part in parts:
        size += len(part)
        if size > _MOST:
            _check(size)
        kept.append(part)
    return "".join(kept)


# --- upper bounds on what an operator, a filter or a method would make ---


def _nothing(*_: Any, **__: Any) -> int:
    return 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _longest(values: Iterable[Any]) -> int:
    return max(map(_length, values), default=0)


def _widest(_: Any, *values: Any, **named: Any) -> int:
    """The largest number among arguments."""
    return max((v for v in (*values, *named.values()) if isinstance(v, int)), default=0)


def _sum(left: Any, right: Any) -> int:
    return _length(left) + _length(right)


def _product(left: Any, right: Any) -> int:
    numbers = [value for value in (left, right) if isinstance(value, int)]
    if len(numbers) == 2:
        return _BIT * sum(map(int.bit_length, numbers))
    return _sum(left, right) * sum(numbers)


def _power(left: Any, right: Any) -> int:
    whole = isinstance(left, int) and isinstance(right, int)
    return _BIT * left.bit_length() * right if whole else 0


def _modulo(left: Any, right: Any) -> int:
    return _printed(left, *(right if isinstance(right, tuple) else (right,)))


def _printed(text: Any, *values: Any, **named: Any) -> int:
    """`text % values`."""
    return _filled(_FIELD.findall(text), (*values, named)) if isinstance(text, str) else 0


def _formatted(text: Any, *values: Any, **named: Any) -> int:
    """`text.format(values)`."""
    try:
        parts = string.Formatter().parse(text)
        return _filled([spec for _, _, spec, _ in parts if spec is not None], (*values, named))
    except (TypeError, ValueError):
        return 0  # `format` will raise the error itself


def _filled(fields: list[str], values: Iterable[Any]) -> int:
    """The size of a format's fields: their numbers, those that `*` and `{}` take, and values."""
    flat = [w for v in values for w in (v.values() if isinstance(v, dict) else (v,))]
    numbers = sum(int(number) for field in fields for number in re.findall(r"\d+", field))
    given = sum(field.count("*") + field.count("{") for field in fields)
    return numbers + given * _widest(None, *flat) + len(fields) * _longest(flat)


def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> int:
    if isinstance(text, bytes):
        return text.count(old) * _length(new)
    return str(text).count(str(old)) * len(str(new))


def _of_items(items: Any, separator: Any = "", *_: Any, d: Any = "", **__: Any) -> int:
    each = _length(separator or d)
    return sum(_length(item) + each for item in items)


def _tabs(text: Any, *args: Any, **named: Any) -> int:
    tabs: int = text.count("\t" if isinstance(text, str) else b"\t")
    return tabs * _widest(None, *args, **named)


def _translated(text: Any, table: Any, *_: Any) -> int:
    return len(text) * _longest(table.values()) if isinstance(table, dict) else 0


def _indented(text: Any, *args: Any, **named: Any) -> int:
    return (str(text).count("\n") + 1) * _indent(*args, **named)


def _as_json(_: Any, *args: Any, **named: Any) -> int:
    return _LINES * _indent(*args, **named)


def _indent(*args: Any, **named: Any) -> int:
    """The length of a line's indent: a number of spaces, or a text."""
    return max(_widest(None, *args, **named), _longest((*args, *named.values())))


_OPERATORS: dict[str, Callable[..., int]] = {
    "+": _sum,
    "*": _product,
    "%": _modulo,
    "**": _power,
}
_FILTERS: dict[str, Callable[..., int]] = {
    "batch": _widest,
    "center": _widest,
    "format": _printed,
    "indent": _indented,
    "join": _of_items,
    "replace": _replaced,
    "round": lambda _, precision=0, *__, **___: _PLACE * abs(precision),
    "tojson": _as_json,
}
_METHODS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _widest),
    "expandtabs": _tabs,
    "format": _formatted,
    "format_map": _formatted,
    "join": lambda separator, items, *_: _of_items(items, separator),
    "replace": _replaced,
    "translate": _translated,
}
