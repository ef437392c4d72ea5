"""No chat template eats the machine's memory, and sound ones make what they made."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from batchrun.prompts import sandbox
from batchrun.prompts.messages import PromptError
from batchrun.prompts.sandbox import bound

CHAT = [{"role": "user", "content": "Hello"}]
DOUBLED = (
    "{%% set ns = namespace(s='x') %%}{%% for i in range(99) %%}{%% set ns.s = %s %%}{%% endfor %%}"
)
K = "{% set k = messages | length * 10 ** 10 %}"  # what Jinja can't compute as it compiles
GREEDY = [
    DOUBLED % "ns.s ~ ns.s",
    DOUBLED % "ns.s + ns.s",
    DOUBLED % "[ns.s, ns.s] | join",
    DOUBLED % "[ns.s, ns.s] | map('string') | join",
    DOUBLED % "','.join([ns.s, ns.s])",
    DOUBLED % "ns.s.replace('x', 'xx')",
    DOUBLED % "ns.s | replace('x', 'xx')",
    DOUBLED % "'%s%s' % (ns.s, ns.s)",
    DOUBLED % "'{0}{0}'.format(ns.s)",
    DOUBLED % "ns.s.translate({120: 'xx'})",
    DOUBLED % "ns.s | replace('', 'x' * 1000)",
    "{% macro m(n) %}{% for i in range(n) %}{{ 'x' * 60000 }}{% endfor %}{% endmacro %}{{ m(20) }}",
    "{% for i in range(99999) %}{{ messages[0].content * 60000 }}{% endfor %}",
    "{% set n = namespace(i=3) %}{% for i in range(99) %}{% set n.i = n.i * n.i %}{% endfor %}",
    K + "{{ 'x' * k }}",
    K + "{{ [1] * k }}",
    K + "{{ k ** k }}",
    K + "{{ '%*d' % (k, 1) }}",
    K + "{{ '%*d' | format(k, 1) }}",
    K + "{{ ('%s' * 60000) % ('x' * 60000) }}",
    K + "{{ ('%(a)s' * 60000) % {'a': 'x' * 60000} }}",
    K + "{{ '{:>{}}'.format('x', k) }}",
    K + "{{ ('{0}' * 60000).format('x' * 60000) }}",
    K + "{{ messages[0].role.center(k) }}",
    K + "{{ messages[0].role | center(k) }}",
    K + "{{ messages[0].role | indent(k, true) }}",
    K + "{{ 'a\tb'.expandtabs(k) }}",
    K + "{{ messages | batch(k, 1) | list }}",
    K + "{{ messages | tojson(indent=k) }}",
    K + "{{ 3 | round(k, 'ceil') }}",
    K + "{{ (1).to_bytes(k, 'big') }}",
    K + "{{ (1).to_bytes(byteorder='big', length=k) }}",
]


def rendered(source: str, after: Callable[[str], None] = lambda _: None) -> str:
    after(source)
    [text], _ = render_jinja_template([CHAT], chat_template=source)
    return str(text)


@pytest.mark.parametrize("source", GREEDY)
def test_what_grows_without_end_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_MOST", 1 << 20)
    was = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), was[1]))
    try:
        with pytest.raises(PromptError, match="more than 1,048,576"):
            rendered(source, after=bound)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, was)


CONSTANT = [
    "{{ 3 ** (10 ** 10) }}",
    "{{ 'x' * 60000 * 60000 }}",
    "{{ [1] * 10 ** 10 }}",
    "{% if 'x' | center(10 ** 10) %}{% endif %}",
    "{{ 3 | round(10 ** 9, 'ceil') }}",
    "{{ ('xx' * 60000) | replace('x', 'y' * 60000) }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ (['x' * 60000] * 60000) | join }}",
]


@pytest.mark.parametrize("source", CONSTANT)
def test_what_grows_as_soon_as_it_is_read_is_refused_unread(source: str) -> None:
    with pytest.raises(PromptError, match="more than 67,108,864"):
        bound(source)


SOUND = [
    "{{ 1 + 2 * 3 ** 2 % 5 }} {{ 2.5 * 2 }} {{ 'a' + 'b' }} {{ [1] + [2] }} {{ 'ab' * 2 }}",
    "{{ 'a' ~ 1 ~ none ~ x }} {{ '%s has %05.1f%%' % ('it', 3.14159) }}",
    "{{ 'id 123456789: %s' % 1 }} {{ '%(a)3d' % {'a': 1} }} {{ '%s' | format('x') }}",
    "{{ '{:>{}} {a!r:^9} {{}}'.format('x', 4, a='b') }} {{ 'a-b'.replace('-', '+', 1) }}",
    "{{ ['a', 1] | join(', ') }} {{ messages | map(attribute='role') | join(d='-') }}",
    "{{ x | join }} {{ 'abc' | join('-') }} {{ messages | join('+', attribute='role') }}",
    "{{ ','.join(messages[0].keys()) }} {{ messages | tojson(indent=2) }} {{ '7'.zfill(3) }}",
    "{{ 'a\nb' | indent(3, true) }} {{ 'x' | center(7) }} {{ 3.14159 | round(2) }}",
    "{% macro m(a) %}<{{ a }}>{{ caller() if caller }}{% endmacro %}{{ m('x') }}"
    "{% call m('y') %}!{% endcall %}{% set z %}block{% endset %}{{ z | upper }}",
    "{% generation %}{{ messages[0].content.strip() }}{% endgeneration %}",
    "{% for a, b in messages[0].items() %}{{ loop.index }}{{ a + b }}{% if loop.last %}{% break %}"
    "{% endif %}{% endfor %}{{ range(3) | sum }} {{ [[1], [2]] | sum(start=[]) }}",
    "{{ 'a' * -1 }} {{ true * 3 }} {{ 7 // 2 }} {{ 2 ** -1 }} {{ 'é' * 3 }}",
    "{{ messages | batch(2) | list }} {{ messages[0].content | replace('l', 'L', 1) }}",
]


@pytest.mark.parametrize("source", SOUND)
def test_sound_templates_make_what_they_made(source: str) -> None:
    before = rendered(source)
    bound(source)
    assert _compile_jinja_template(source).environment.intercepted_binops
    assert rendered(source) == before
