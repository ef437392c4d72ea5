"""From a JSON schema to a column's type, and from JSON to values of it."""

import json
import sys
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest

from batchrun.jobs.output.schematypes import type_of
from batchrun.jobs.output.typed import MisfitError
from batchrun.jobs.rows.jsontext import parse_value

INT, NUM, STR = {"type": "integer"}, {"type": "number"}, {"type": "string"}
NULL, BOOL = {"type": "null"}, {"type": "boolean"}
TEXT = "json"  # a string column that holds JSON


def of(**properties):
    return {"type": "object", "properties": properties, "required": sorted({*properties})}


def array(items):
    return {"type": "array", "items": items}


def kind_of(schema):
    return type_of(json.dumps(schema))


def shown(kind):
    """A type as Arrow writes it, with `json` for strings that hold JSON."""
    name = type(kind).__name__
    if name == "Struct":
        return f"struct<{', '.join(f'{name}: {shown(part)}' for name, part in kind.fields)}>"
    if name == "List":
        return f"list<element: {shown(kind.item)}>"
    if name == "Map":
        return f"map<string, {shown(kind.item)}>"
    return TEXT if name == "JsonText" else str(kind.arrow)


NODE = of(value=INT, next={"anyOf": [{"$ref": "#/$defs/Node"}, NULL]})
SCHEMAS = [
    (STR, "string"),
    ({"type": "string", "format": "date-time", "enum": ["a"]}, "string"),
    (INT, "int64"),
    (NUM, "double"),
    (BOOL, "bool"),
    (NULL, "null"),
    ({"const": "a"}, "string"),
    ({"enum": ["a", "b", None]}, "string"),
    ({"enum": [1, 2.5]}, "double"),
    ({"enum": [True, False]}, "bool"),
    ({"enum": [True, 1]}, TEXT),
    ({"enum": [1 << 63]}, TEXT),
    ({"enum": [[1]]}, TEXT),
    ({"type": ["string", "null"]}, "string"),
    ({"type": ["integer", "number"]}, "double"),
    ({"type": ["integer", "string"]}, TEXT),
    ({"type": ["null"]}, "null"),
    ({"anyOf": [INT, NULL], "title": "x"}, "int64"),
    ({"oneOf": [NULL, INT, NUM]}, "double"),
    ({"anyOf": [INT, STR]}, TEXT),
    ({"anyOf": [of(a=INT), of(a=INT, b=INT)]}, TEXT),
    ({"anyOf": [of(a=INT), {**of(a=INT), "required": []}]}, "struct<a: int64>"),
    ({"anyOf": [array(INT), NULL]}, "list<element: int64>"),
    ({"type": ["string", "null"], "anyOf": [STR, INT]}, "string"),
    ({**of(a=INT, b=STR), "anyOf": [{"required": ["a"]}]}, "struct<a: int64, b: string>"),
    (of(a=INT, b=of(c=array(of(d=NUM)))), "struct<a: int64, b: struct<c: "
     "list<element: struct<d: double>>>>"),
    ({**of(a=INT), "additionalProperties": False}, "struct<a: int64>"),
    (of(a={}, b=True, c={"description": "x"}), "struct<a: json, b: json, c: json>"),
    ({"type": "object", "additionalProperties": INT}, "map<string, int64>"),
    ({"type": "object", "additionalProperties": of(a=INT)}, "map<string, struct<a: int64>>"),
    ({"type": "object", "additionalProperties": True}, TEXT),
    ({"type": "object", "additionalProperties": {}}, TEXT),
    ({"type": "object"}, TEXT),
    ({"type": "object", "properties": {}}, TEXT),
    ({"type": "object", "patternProperties": {"^a": INT}}, TEXT),
    ({**of(a=INT), "additionalProperties": STR}, TEXT),
    ({**of(a=INT), "additionalProperties": True}, TEXT),
    ({"properties": {"a": INT}}, TEXT),  # it allows other values than objects
    ({}, TEXT),
    (True, TEXT),
    (False, TEXT),
    (array(STR), "list<element: string>"),
    ({"type": "array"}, "list<element: json>"),
    (array({"anyOf": [STR, INT]}), "list<element: json>"),
    ({"type": "array", "prefixItems": [INT, INT], "items": False}, "list<element: int64>"),
    ({"type": "array", "prefixItems": [INT, NULL], "maxItems": 2}, "list<element: int64>"),
    ({"type": "array", "prefixItems": [INT, STR], "items": False}, TEXT),
    ({"type": "array", "prefixItems": [INT]}, TEXT),
    ({"type": "array", "items": [INT, INT], "additionalItems": INT}, "list<element: int64>"),
    ({"allOf": [of(a=INT), of(b=STR)]}, "struct<a: int64, b: string>"),
    ({"allOf": [of(a=NUM), of(a=INT)]}, "struct<a: int64>"),
    ({"allOf": [STR, {"minLength": 1}]}, "string"),
    ({"allOf": [STR, INT]}, TEXT),
    ({"$defs": {"a b/~": INT}, "$ref": "#/$defs/a%20b~1~0"}, "int64"),
    ({"$defs": {"A": of(a=INT)}, "$ref": "#/$defs/A", "description": "x"}, "struct<a: int64>"),
    ({"$defs": {"A": of(a=INT)}, "allOf": [{"$ref": "#/$defs/A"}, of(b=INT)]},
     "struct<a: int64, b: int64>"),
    ({"$defs": {"A": INT}, **of(a={"$ref": "#/$defs/A"}, b={"$ref": "#/$defs/A"})},
     "struct<a: int64, b: int64>"),
    ({"$defs": {"Node": NODE}, "$ref": "#/$defs/Node"}, "struct<value: int64, next: json>"),
    (of(more=array({"$ref": "#"})), "struct<more: list<element: json>>"),
    ({"$ref": "#"}, TEXT),
    ({"$ref": "#/$defs/none"}, TEXT),
    ({"$ref": "https://example.com/x.json"}, TEXT),
    ({"$ref": 1}, TEXT),
    ({**of(a=INT), "if": {"required": ["a"]}, "then": of(b=INT)}, TEXT),
    ({"type": "nothing"}, TEXT),
    ({"type": []}, TEXT),
    ({"type": [1]}, TEXT),
    ({"type": "object", "properties": 1}, TEXT),
    ({**of(a=INT), "required": [{}, "a"]}, "struct<a: int64>"),
    ({"anyOf": 1}, TEXT),
    ({"anyOf": []}, TEXT),
    (of(**{"": INT, "a.b": INT, "é\n": INT}), None),
    (of(a=INT, A=INT), TEXT),
    (of(**{"a\0b": INT}), TEXT),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "want"), SCHEMAS, ids=lambda value: json.dumps(value)[:60])
def test_the_type_of_a_schema(schema, want):
    kind = kind_of(schema)
    if want is None:
        names = list(schema["properties"])
        assert kind.arrow == pa.struct([(name, pa.int64()) for name in names])
    else:
        assert shown(kind) == want
        assert str(kind.arrow) == shown(kind).replace(TEXT, "string")


def test_properties_keep_the_order_of_the_schema():
    names = ["z", "a", "m"]
    assert [field.name for field in kind_of(of(**dict.fromkeys(names, INT))).arrow] == names


class TestValues:
    @pytest.mark.parametrize(
        ("schema", "text", "want"),
        [
            (INT, "3", 3),
            (INT, "3.0", 3),
            (INT, "1e3", 1000),
            (INT, "-9223372036854775808", -(1 << 63)),
            (INT, "9007199254740993.0", 9007199254740993),
            (NUM, "3", 3.0),
            (NUM, "9007199254740993", 9007199254740992.0),
            (NUM, "0.1000000000000000055", 0.1),
            (STR, '"a\\u00e9"', "aé"),
            (STR, '"\\ud800"', "\ufffd"),
            (BOOL, "false", False),
            (NULL, "null", None),
            ({"type": ["integer", "null"]}, "null", None),
            (of(a=INT), '{"a": 1, "b": 2}', {"a": 1}),
            (of(a=INT), '{"a": 1, "a": 2}', {"a": 2}),
            ({**of(a=INT, b=INT), "required": []}, '{"b": 2}', {"b": 2}),
            ({"type": "object", "additionalProperties": INT}, '{"x": 1, "": 2}',
             [("x", 1), ("", 2)]),
            (array({}), '["a", 1, 1.10, null, {"b": [true]}]',
             ['"a"', "1", "1.10", None, '{"b": [true]}']),
            ({}, '"null"', '"null"'),
            ({}, "null", None),
            ({}, str(10**300), str(10**300)),
            ({"type": "object"}, '{"\\ud800": "\\udfff"}', '{"\ufffd": "\ufffd"}'),
        ],
    )  # fmt: skip
    def test_a_value_as_arrow_takes_it(self, schema, text, want):
        kind = kind_of(schema)
        found = kind.fitted(parse_value(text))
        assert (found, type(found)) == (want, type(want))
        assert pa.array([found], kind.arrow).to_pylist() == pa.array([want], kind.arrow).to_pylist()

    @pytest.mark.parametrize(
        ("schema", "text", "want"),
        [
            (INT, "1.5", "x: expected an integer, but found 1.5"),
            (INT, "true", "x: expected an integer, but found true"),
            (INT, '"1"', "x: expected an integer, but found a string"),
            (INT, "null", "x: expected an integer, but found null"),
            (INT, "1e-9999999999999999999", "x: expected an integer, but found 1e-9"),
            (INT, str(1 << 63), f"x: {1 << 63} does not fit in 64 bits"),
            (INT, "1e300", "x: 1e300 does not fit in 64 bits"),
            (NUM, "true", "x: expected a number, but found true"),
            (NUM, "1" + "0" * 400, f"x: 1{'0' * 36}... is not a finite 64-bit number"),
            (NUM, "1e999", "x: 1e999 is not a finite 64-bit number"),
            (NUM, "NaN", "x: NaN is not a finite 64-bit number"),
            (STR, "1", "x: expected a string, but found 1"),
            (BOOL, "0", "x: expected true or false, but found 0"),
            (NULL, "0", "x: expected null, but found 0"),
            (of(a=INT), "[]", "x: expected an object, but found an array"),
            (of(a=INT), "{}", 'x: an object without "a", which the schema requires'),
            ({**of(a=INT), "additionalProperties": False}, '{"a": 1, "b": 2}',
             'x: an object with "b", which the schema does not allow'),
            (array(STR), "{}", "x: expected an array, but found an object"),
            ({"type": "object"}, "[]", "x: expected an object, but found an array"),
            ({"type": "object", "additionalProperties": INT}, '{"k": "v"}', "x.k: expected an"),
            (of(items=array(of(price=NUM))), '{"items": [{"price": 1}, {"price": "2"}]}',
             "x.items[1].price: expected a number, but found a string"),
            (of(**{'a "b"': INT}), '{"a \\"b\\"": "c"}', 'x["a \\"b\\""]: expected an'),
        ],
    )  # fmt: skip
    def test_a_value_that_does_not_fit(self, schema, text, want):
        kind = kind_of(schema)
        with pytest.raises(MisfitError) as info:
            kind.fitted(parse_value(text))
        assert info.value.at("x").startswith(want)

    def test_what_a_type_holds_is_json_again(self):
        value = Decimal("0.1")
        text = kind_of({}).fitted(parse_value(f'["\\u2028", {value}, "{{"]'))
        assert json.loads(text) == ["\u2028", 0.1, "{"]


def nested(levels, inner, wrap):
    schema = json.dumps(inner)
    for _ in range(levels):
        schema = wrap % schema
    return schema


WRAPS = [
    '{"type": "object", "properties": {"a": %s}}',
    '{"type": "array", "items": %s}',
    '{"anyOf": [%s, {"type": "null"}]}',
    '{"allOf": [%s]}',
    '{"type": "object", "additionalProperties": %s}',
]


class TestHostile:
    @pytest.mark.parametrize("wrap", WRAPS)
    @pytest.mark.parametrize("levels", [31, 32, 33, 60, 100, 10_000])
    def test_depth(self, tmp_path, wrap, levels):
        """The type is one that Parquet's readers take, and doesn't depend on Python's stack."""
        text = nested(levels, INT, wrap)
        kind = type_of(text)
        assert depth(kind) <= 32
        if "Of" not in wrap:
            assert (depth(kind) == levels) is (levels <= 32)

        def deeper(frames):
            return deeper(frames - 1) if frames else type_of(text)

        assert deeper(300) == kind
        pa.parquet.write_table(pa.table({"x": pa.nulls(1, kind.arrow)}), tmp_path / "x.parquet")
        assert pa.parquet.read_schema(tmp_path / "x.parquet").field("x").type == kind.arrow

    def test_many_references(self):
        chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(10_000)}
        assert kind_of({"$defs": {**chain, "a10000": INT}, "$ref": "#/$defs/a0"}).arrow
        few = {"$defs": {**chain, "a20": INT}, "$ref": "#/$defs/a0"}
        assert kind_of(few).arrow == pa.int64()

    @pytest.mark.parametrize("keyword", ["properties", "anyOf", "allOf"])
    def test_references_that_double_at_each_level(self, keyword):
        """2**30 columns, or alternatives."""
        inner = {}
        for i in range(30):
            ref = {"$ref": f"#/$defs/a{i + 1}"}
            both = {"l": ref, "r": ref} if keyword == "properties" else [ref, ref]
            inner[f"a{i}"] = {"type": "object", keyword: both}
        inner["a30"] = of(x=INT)
        assert str(kind_of({"$defs": inner, "$ref": "#/$defs/a0"}).arrow) == "string"

    def test_many_properties(self):
        names = [f"p{i}" for i in range(2000)]
        kind = kind_of(of(**{name: {"anyOf": [INT, NULL]} for name in names}))
        assert kind.arrow == pa.struct([(name, pa.int64()) for name in names])
        text = json.dumps({name: i for i, name in enumerate(names)})
        assert kind.fitted(parse_value(text)) == json.loads(text)
        with pytest.raises(MisfitError, match="p1999"):
            kind.fitted(dict.fromkeys(names[:-1], 1))
        assert str(kind_of(of(**{f"p{i}": INT for i in range(6000)})).arrow) == "string"

    @pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '{"type": ["object"', "NaN"])
    def test_what_is_no_schema_is_any_value(self, text):
        assert type_of(text) == type_of("{}")

    @pytest.mark.parametrize(
        "text",
        ["[" * 65 + "]" * 65, "[" * 10_000, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 5000],
    )
    def test_values_that_no_reader_takes(self, text):
        limit = sys.getrecursionlimit()
        with pytest.raises(ValueError, match=r"64 levels|4300 digits|not valid JSON"):
            parse_value(text)
        assert sys.getrecursionlimit() == limit


def depth(kind):
    parts = [part for _, part in getattr(kind, "fields", ())]
    parts += [kind.item] if hasattr(kind, "item") else []
    return 1 + max(map(depth, parts)) if parts else 0
