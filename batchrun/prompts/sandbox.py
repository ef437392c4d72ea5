"""What chat templates may make: Jinja's sandbox bounds what they reach, and this what they grow.

    {% set s = s ~ s %}  {{ 'x' * 10**9 }}  {{ '%*d' % (10**9, 1) }}  {{ 3 | round(10**9, 'ceil') }}

No text, list or number of a template is longer than any prompt could be, and neither is what it
makes in the end. What takes long without growing is left to `batchrun.runner.overdue`.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from batchrun.prompts.chat_source import parsed
from batchrun.prompts.messages import PromptError

_MOST = 1 << 26  # characters of a text, items of a list: more than any context holds
_BITS = 1 << 20  # of a number
_EXPONENT = 1000  # of ten
_LINES = 1024  # about, of JSON
_FIELD = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")
_JOINS = ("str_join", "markup_join")  # what Jinja's code joins texts by, for `~`


def bound(source: str) -> None:
    """Bound what a chat template makes, for all that transformers renders of it from now on.

    transformers compiles each template once and keeps it. What it keeps is compiled again by its
    own environment, with the operators and functions in it that can make much of little.

    Raises:
        PromptError: It can't be compiled without making too much.
        jinja2.TemplateError: It can't be compiled, as transformers would say.
    """
    check_constants(source)
    template = _compile_jinja_template(source)
    environment = template.environment
    if environment.intercepted_binops:
        return
    environment.intercepted_binops = frozenset("+*%") | {"**"}
    filters, table = environment.filters, environment.binop_table
    environment.call_binop = functools.partial(_operated, table)
    for sign, size in _OPERATORS.items():
        table[sign] = _checked(table[sign], size)
    for name, size in _FILTERS.items():
        filters[name] = _checked(filters[name], size)
    filters["join"] = _joining(filters["join"])
    environment.call = functools.partial(_call, environment.call)
    environment.concat = _concat
    made = environment.from_string(source)
    names = made.root_render_func.__globals__
    for name in _JOINS:
        names[name] = functools.partial(_joined, names[name])
    template.root_render_func, template.blocks = made.root_render_func, made.blocks


def check_constants(source: str) -> None:
    """Refuse a template of which Jinja computes too much as soon as it reads it.

    Raises:
        PromptError: It would.
    """
    try:
        tree = parsed(source)
    except (jinja2.TemplateError, ValueError, RecursionError):  # ValueError: a number too long
        return
    for node in reversed(list(tree.find_all((nodes.BinExpr, nodes.Concat, nodes.Filter)))):
        try:  # what is within a node was looked at before it
            size = _constant_size(node)
        except Exception:  # it is no constant, or nothing that can be computed
            continue
        _check(size)


def _constant_size(node: nodes.Node) -> int:
    if isinstance(node, nodes.BinExpr):
        left, right = node.left.as_const(), node.right.as_const()
        return (_OPERATORS | {"+": _sum})[node.operator](left, right)
    if isinstance(node, nodes.Concat):
        return sum(len(str(part.as_const())) for part in node.nodes)
    assert isinstance(node, nodes.Filter)
    assert node.node is not None
    values = [node.node.as_const(), *(argument.as_const() for argument in node.args)]
    named: dict[str, Any] = {str(pair.key): pair.value.as_const() for pair in node.kwargs}
    if node.name == "join":
        return _of_items(values[1] if len(values) > 1 else named.get("d", ""), values[0])
    if node.name == "replace":
        values.insert(0, None)
    return _FILTERS[node.name](*values, **named)


def _checked(function: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
    """A function that is not called where `size` says that its result would be too large."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check(size(*args, **kwargs))
        found = function(*args, **kwargs)
        _check(_length(found))
        return found

    return checked


def _operated(
    table: Mapping[str, Callable[..., Any]], context: Any, sign: str, left: Any, right: Any
) -> Any:
    if sign != "+":
        return table[sign](left, right)
    found = left + right  # in every template, many times; never more than two that may be
    if found.__class__ is str:
        if len(found) > _MOST:
            _check(len(found))
    else:
        _check(_length(found))
    return found


def _joining(join: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(join)
    def joining(context: Any, value: Any, *args: Any, **kwargs: Any) -> str:
        items = value if isinstance(value, str | list) else list(value)
        _check(_of_items(args[0] if args else kwargs.get("d", ""), items))
        return join(context, items, *args, **kwargs)

    return joining


def _check(size: int) -> None:
    if size > _MOST:
        raise PromptError(
            "chat_template",
            f"the chat template makes a text, a list or a number beyond {_MOST:,} characters",
        )


def _call(call: Callable[..., Any], context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A call in a template; of a text's or a number's method only if that can't grow too much."""
    method = getattr(function, "__wrapped__", function)  # as the sandbox has `format`
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(owner, str | bytes | int) and name in _METHODS:
        given = [*args, *kwargs.values()]
        if name == "join":
            args = (list(args[0]), *args[1:]) if args else args
            given = list(args)
        if given:
            _check(_METHODS[name](owner, *given))
    found = call(context, function, *args, **kwargs)
    _check(_length(found))
    return found


def _concat(parts: Iterable[str]) -> str:
    """What a template, or a part of it, made."""
    size, kept = 0, []
    for part in parts:
        size += len(part)
        if size > _MOST:
            _check(size)
        kept.append(part)
    return "".join(kept)


def _joined(join: Callable[..., str], parts: Iterable[Any]) -> str:
    found = join(parts)
    _check(len(found))
    return found


# --- how much an operator, a filter, a method would make at most ---


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _large(bits: int) -> int:
    """Of a number, as a size."""
    return _MOST + 1 if bits > _BITS else 0


def _sum(left: Any, right: Any) -> int:
    return _length(left) + _length(right)


def _product(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return _large(_bits(left) + _bits(right))
    times = left if isinstance(left, int) else right
    return (_length(left) + _length(right)) * times if isinstance(times, int) else 0


def _power(left: Any, right: Any) -> int:
    whole = isinstance(left, int) and isinstance(right, int)
    return _large(_bits(left) * right) if whole else 0


def _modulo(left: Any, right: Any) -> int:
    return _printed(left, *(right if isinstance(right, tuple) else (right,)))


def _printed(text: Any, *values: Any, **named: Any) -> int:
    """`text % values`."""
    if not isinstance(text, str):
        return 0
    given = (*values, *named.values())
    widest, fields = _widest(given), _FIELD.findall(text)
    widths = [width for found in fields for width in found if width]
    size = sum(widest if width == "*" else int(width) for width in widths)
    return size + len(fields) * max(map(_length, given), default=0)


def _formatted(text: Any, *values: Any) -> int:
    """`text.format(values)`."""
    if not isinstance(text, str):
        return 0
    try:
        specs = [spec for _, _, spec, _ in string.Formatter().parse(text) if spec is not None]
    except ValueError:
        return 0  # `format` says so itself
    given = [w for v in values for w in (v.values() if isinstance(v, dict) else (v,))]
    widest = _widest(given)
    numbers = sum(int(number) for spec in specs for number in re.findall(r"\d+", spec))
    nested = sum(spec.count("{") for spec in specs)
    return numbers + widest * nested + len(specs) * max(map(_length, given), default=0)


def _widest(values: Iterable[Any]) -> int:
    return max((value for value in values if isinstance(value, int)), default=0)


def _wide(value: Any, width: Any = 0, *_: Any) -> int:
    return width if isinstance(width, int) else 0


def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any) -> int:
    try:
        return int(text.count(old)) * _length(new)
    except TypeError:
        return 0  # `replace` says so itself


def _of_items(separator: Any, items: Any, *_: Any) -> int:
    return sum(_length(item) + _length(separator) for item in items)


def _tabs(text: Any, size: Any = 8) -> int:
    tab = "\t" if isinstance(text, str) else b"\t"
    return text.count(tab) * size if isinstance(size, int) else 0


def _translated(text: Any, table: Any, *_: Any) -> int:
    return (
        len(text) * max(map(_length, table.values()), default=0) if isinstance(table, dict) else 0
    )


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    each = width if isinstance(width, int) else _length(width)
    return (str(text).count("\n") + 1) * each


def _filled(value: Any, linecount: Any, *_: Any, **__: Any) -> int:
    return linecount if isinstance(linecount, int) else 0


def _rounded(value: Any, precision: Any = 0, *_: Any, **__: Any) -> int:
    return _MOST + 1 if isinstance(precision, int) and abs(precision) > _EXPONENT else 0


def _as_json(value: Any, *args: Any, indent: Any = None, **_: Any) -> int:
    each = args[1] if len(args) > 1 else indent
    return _LINES * (each if isinstance(each, int) else _length(each))


def _replaced_in(_: Any, text: Any, old: Any = "", new: Any = "", *__: Any, **___: Any) -> int:
    return _replaced(str(text), str(old), str(new))


_OPERATORS = {"*": _product, "%": _modulo, "**": _power}
_FILTERS: dict[str, Callable[..., int]] = {
    "batch": _filled,
    "center": _wide,
    "format": _printed,
    "indent": _indented,
    "replace": _replaced_in,
    "round": _rounded,
    "tojson": _as_json,
}
_METHODS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _wide),
    "expandtabs": _tabs,
    "format": _formatted,
    "format_map": _formatted,
    "join": _of_items,
    "replace": _replaced,
    "translate": _translated,
}
