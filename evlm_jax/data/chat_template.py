"""A tokenizer's own chat template: Jinja, rendered in a sandbox as transformers renders it.

convert/torch_model/templates_evlm.py cuts what it renders into pieces."""

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, str]


class _Generation(Extension):
    """`{% generation %}`, by which templates mark what an assistant says: it stays as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A template and the special tokens that it may name (bos_token, eos_token, ..)."""

    def __init__(self, source: str, names: dict[str, str]):
        self.source, self.names = source, dict(names)

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        """Raises ValueError where it is no Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}; use another data.template") from error

    def render(self, messages: Sequence[Message], answer_begins: bool = False) -> str:
        """The chat as one text; `answer_begins`: up to where an assistant's answer does.

        Raises ValueError where the template refuses the chat.
        """
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=answer_begins,
                tools=None,
                documents=None,
                **self.names,
            )
        except (jinja2.TemplateError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"chat template: it refuses the chat: {error}") from error
