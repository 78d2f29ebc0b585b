"""A conversation rendered by the checkpoint's own chat template, sandboxed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tightfit.cluster.errors import InvalidRequestError

MAX_RENDERED_CHARACTERS = 4 * 2**20


class ChatTemplate:
    """A Jinja template with what Hugging Face's templates expect around them.

    The sandbox lets a template read its variables and nothing else; output is bounded.

    Raises:
        InvalidRequestError: (from `render`) the conversation is not one that the template accepts.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt for the next turn of the assistant."""
        try:
            pieces, length = [], 0
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=True, **self._special_tokens
            ):
                length += len(piece)
                if length > MAX_RENDERED_CHARACTERS:
                    raise InvalidRequestError(
                        "chat", f"renders to over {MAX_RENDERED_CHARACTERS} characters"
                    )
                pieces.append(piece)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequestError(
                "chat", f"the checkpoint's chat template refuses it: {error}"
            ) from error
        return "".join(pieces)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
