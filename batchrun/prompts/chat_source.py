"""What the source of a chat template says, without running it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchrun.errors import ModelError
from batchrun.prompts.messages import RESERVED

_GLOBALS = {"raise_exception", "strftime_now"}  # transformers provides these to templates


class _Generation(Extension):
    """transformers' `{% generation %}`, around the text of a model's turn."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags, unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def parsed(source: str) -> nodes.Template:
    """The syntax tree of a chat template.

    Raises:
        jinja2.TemplateError: It can't be parsed.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])
    return environment.parse(source)


@lru_cache(maxsize=8)
def variables(source: str) -> frozenset[str] | None:
    """Names that a chat template reads from its context; None if that can't be known."""
    try:
        found = meta.find_undeclared_variables(parsed(source))
    except (jinja2.TemplateError, ValueError, RecursionError):  # ValueError: a number too long
        return None
    return frozenset(found - _GLOBALS) if source else None


def has_literal(source: str, text: str) -> bool:
    """Whether a template has a text in quotes, to compare something with it or to write it."""
    return bool(re.search(rf"(['\"]){re.escape(text)}\1", source))


def check_template_args(args: Mapping[str, object], sources: Sequence[str], model: str) -> None:
    """Refuse arguments of a job that its chat templates don't read.

    Args:
        args: The arguments, by name.
        sources: The templates, one for each kind of chat.
        model: What to call the model in messages.

    Raises:
        ModelError: None of them reads one of the names.
    """
    known = [variables(source) for source in sources]
    read = {name for names in known for name in names or ()}
    for name in args:
        if None not in known and name not in read:
            own = ", ".join(sorted(read - RESERVED)) or "nothing but messages"
            raise ModelError(
                f"the chat template of {model} does not read --template-arg {name}",
                hint=f"it reads {own}",
            )
