"""A conversation rendered by the checkpoint's own chat template, sandboxed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tightfit.cluster.errors import ConfigError, InvalidRequestError

MAX_RENDERED_CHARACTERS = 4 * 2**20


class ChatTemplate:
    """A Jinja template with what Hugging Face's templates expect around them.

    The sandbox lets a template read its variables and nothing else; output is bounded.

    Args:
        source: the template.
        special_tokens: name → text, as the template may use them.
    Raises:
        ConfigError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the checkpoint's chat template is not valid: {error}") from error
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt for the next turn of the assistant.

        Raises:
            InvalidRequestError: the template does not accept the conversation.
        """
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                length += len(piece)
                if length > MAX_RENDERED_CHARACTERS:
                    raise InvalidRequestError(
                        "chat", f"renders to over {MAX_RENDERED_CHARACTERS} characters"
                    )
                pieces.append(piece)
        except InvalidRequestError:
            raise
        except Exception as error:  # a template can raise whatever its expressions raise
            raise InvalidRequestError(
                "chat", f"the checkpoint's chat template refuses it: {error}"
            ) from error
        return "".join(pieces)


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks what training learns from: here, just text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
