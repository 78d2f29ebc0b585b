"""Text to tokens and back, with the `tokenizers` library; no torch, no transformers in this
process.

A checkpoint without tokenizer.json (OPT's vocab.json and merges.txt, SentencePiece files, GGUF) is
converted once, in a process of its own, and the result is cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from tightfit.cluster.errors import ConfigError

TOKENIZER = "tokenizer.json"
REPLACEMENT = "�"
CONVERT_TIMEOUT_S = 300.0


class Tokenizer:
    """A checkpoint's tokenizer. Thread-safe; encoding releases the GIL.

    Args:
        fast: the tokenizer.
        chat_template: the checkpoint's template, or None.
        special_tokens: name → text, for the template ("bos_token", "eos_token", …).
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._fast = fast
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}
        self.eos_token_ids = eos_token_ids

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included."""
        return self._fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with what the model expects at its ends, if asked."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens; special tokens are left out."""
        text: str = self._fast.decode(list(token_ids), skip_special_tokens=True)
        return text


class IncrementalDecoder:
    """Text of a growing list of tokens, each character as soon as it is whole.

    Decoding starts anew from a window that always holds the last complete text, so that what a
    token looks like after its predecessors (spaces, bytes of one character) is right, at constant
    cost per token.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """`context`: tokens whose text is already known, such as resumed ones."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._window_start = 0
        self._read_end = 0
        self.text = ""
        for token in context:
            self.push(token)

    def push(self, token_id: int) -> str:
        """Add a token; the text that is now certain, which may be empty."""
        self._tokens.append(token_id)
        known = self._tokenizer.decode(self._tokens[self._window_start : self._read_end])
        whole = self._tokenizer.decode(self._tokens[self._window_start :])
        if len(whole) <= len(known) or whole.endswith(REPLACEMENT):
            return ""
        self._window_start, self._read_end = self._read_end, len(self._tokens)
        return self._add(whole[len(known) :])

    def finish(self) -> str:
        """What is left at the end: an incomplete character, as replacement characters."""
        known = self._tokenizer.decode(self._tokens[self._window_start : self._read_end])
        whole = self._tokenizer.decode(self._tokens[self._window_start :])
        self._window_start = self._read_end = len(self._tokens)
        return self._add(whole[len(known) :])

    def _add(self, text: str) -> str:
        self.text += text
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """Where a checkpoint's tokenizer is."""

    directory: Path
    """Holds tokenizer.json."""
    configs: Path
    """Holds tokenizer_config.json and the like."""


def load_tokenizer(model_path: Path, *, eos_token_ids: frozenset[int] = frozenset()) -> Tokenizer:
    """The tokenizer of a checkpoint directory or GGUF file.

    Args:
        model_path: the checkpoint.
        eos_token_ids: from the model's config; generation_config.json adds to them.
    Raises:
        ConfigError: there is none, or it cannot be read or converted.
    """
    files = _find(model_path)
    try:
        fast = FastTokenizer.from_file(str(files.directory / TOKENIZER))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{files.directory / TOKENIZER} cannot be read: {error}") from error
    config = _json(files.configs / "tokenizer_config.json")
    generation = _json(files.configs / "generation_config.json")
    special = {
        key: value["content"] if isinstance(value, dict) else str(value)
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, (str, dict))
    }
    return Tokenizer(
        fast,
        chat_template=_chat_template(files.configs, config),
        special_tokens=special,
        eos_token_ids=eos_token_ids | _eos_ids(fast, special, generation),
    )


def _eos_ids(
    fast: FastTokenizer, special: dict[str, str], generation: dict[str, Any]
) -> frozenset[int]:
    named = generation.get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    own = fast.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return frozenset(int(i) for i in ids) | (frozenset() if own is None else {own})


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _find(model_path: Path) -> _Files:
    if model_path.is_dir():
        if (model_path / TOKENIZER).exists():
            return _Files(directory=model_path, configs=model_path)
        ggufs = sorted(model_path.glob("*.gguf"))
        if len(ggufs) == 1:
            model_path = ggufs[0]
    converted = _converted(model_path)
    return _Files(directory=converted, configs=converted)


def cache_directory() -> Path:
    """Where converted tokenizers are kept: $TIGHTFIT_CACHE, or tightfit/ in the user's cache."""
    own = os.environ.get("TIGHTFIT_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tightfit"


def _converted(model_path: Path) -> Path:
    """A cached conversion, made now if there is none."""
    stat = model_path.stat()
    identity = f"{model_path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    target = cache_directory() / "tokenizers" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if (target / TOKENIZER).exists():
        return target
    command = [
        sys.executable,
        "-m",
        "tightfit.workers.tokenizer_files",
        str(model_path),
        str(target),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{model_path}: converting its tokenizer took over {CONVERT_TIMEOUT_S:g} s"
        ) from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ConfigError(
            f"{model_path} has no tokenizer.json, and its tokenizer cannot be converted: "
            f"{reason[0]}"
        )
    return target
