"""Chat templates: Jinja programs that come with a model and turn messages into a prompt.

They are data from elsewhere, so they run in Jinja's immutable sandbox, with the environment that their authors write for
(`trim_blocks`, `lstrip_blocks`, `raise_exception`, `strftime_now`, `tojson`, `{% generation %}`). Whatever goes wrong while
one runs is the request's fault. Knows nothing of tokens.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spotserve.core.errors import InvalidRequest, ModelError

_RUNTIME_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a Jinja program can raise: it is Python underneath."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training; when serving it is only its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template cannot be compiled: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt up to where the assistant's answer begins.

        Raises:
            InvalidRequest: the template refuses these messages or variables.
        """
        values = {"add_generation_prompt": True, "tools": None, "documents": None, **variables, "messages": list(messages)}
        try:
            return self._template.render(values)
        except _RUNTIME_ERRORS as error:
            raise InvalidRequest(f"The model's chat template refuses the messages: {error}", param="messages") from error


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Plain JSON; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  (templates ask for the local date)
