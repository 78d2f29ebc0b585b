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
GENERATION = "generation_config.json"
CONVERT_TIMEOUT_S = 300.0
CONVERSION_VERSION = 1
"""Raise it when the conversion changes: what is cached is then made anew."""
MAX_LOCKED_CHARACTERS = 2000
"""Longest text (or number of tokens) that may be worked on while Python's lock is held: 1 ms."""
SOURCE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


class Tokenizer:
    """A checkpoint's tokenizer. Thread-safe; long work releases the GIL.

    Args:
        fast: the tokenizer; not to be changed by others afterwards.
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
        fast.no_truncation()  # a saved tokenizer may bring settings of its training
        fast.no_padding()
        self._fast = fast
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}
        self.eos_token_ids = eos_token_ids
        added = fast.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_values = _byte_values(fast)

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included."""
        return self._fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with what the model expects at its ends, if asked."""
        if len(text) <= MAX_LOCKED_CHARACTERS:
            encoding = self._fast.encode(text, add_special_tokens=add_special_tokens)
        else:  # only the batched methods release the GIL
            (encoding,) = self._fast.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens; special tokens, and ids that the vocabulary lacks, are left out."""
        if len(token_ids) <= MAX_LOCKED_CHARACTERS:
            text: str = self._fast.decode(list(token_ids), skip_special_tokens=True)
        else:
            (text,) = self._fast.decode_batch([list(token_ids)], skip_special_tokens=True)
        return text

    def is_silent(self, token_id: int) -> bool:
        """`decode` leaves this token out."""
        return token_id in self._special_ids or self._fast.id_to_token(token_id) is None

    @property
    def has_byte_tokens(self) -> bool:
        """`byte_value` knows some."""
        return bool(self._byte_values)

    def byte_value(self, token_id: int) -> int | None:
        """The byte that the token stands for, in vocabularies that spell unknown characters in
        bytes (SentencePiece's byte fallback); None for all other tokens."""
        return self._byte_values.get(token_id)


def _byte_values(fast: FastTokenizer) -> dict[int, int]:
    """Token id → byte, of the tokens `<0x00>` to `<0xFF>`; empty where they are only text."""
    decoder = fast.decoder
    if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
        return {}
    ids = ((fast.token_to_id(f"<0x{value:02X}>"), value) for value in range(256))
    return {token_id: value for token_id, value in ids if token_id is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """Where a checkpoint's tokenizer is."""

    directory: Path
    """Holds tokenizer.json."""
    configs: Path
    """Holds tokenizer_config.json and the like."""
    generation: Path
    """generation_config.json, if there is one."""


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
    generation = _json(files.generation)
    special = _special_tokens({**_json(files.configs / "special_tokens_map.json"), **config})
    return Tokenizer(
        fast,
        chat_template=_chat_template(files.configs, config),
        special_tokens=special,
        eos_token_ids=eos_token_ids | _eos_ids(fast, special, generation),
    )


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Name → text of every "…_token" that is set."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


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
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _find(model_path: Path) -> _Files:
    generation = (model_path if model_path.is_dir() else model_path.parent) / GENERATION
    if model_path.is_dir():
        if (model_path / TOKENIZER).exists():
            return _Files(directory=model_path, configs=model_path, generation=generation)
        ggufs = sorted(model_path.glob("*.gguf"))
        if len(ggufs) == 1:
            model_path = ggufs[0]
    converted = _converted(model_path)
    return _Files(directory=converted, configs=converted, generation=generation)


def cache_directory() -> Path:
    """Where converted tokenizers are kept: $TIGHTFIT_CACHE, or tightfit/ in the user's cache."""
    own = os.environ.get("TIGHTFIT_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tightfit"


def _identity(model_path: Path) -> str:
    """Changes when a file that the tokenizer is made from does."""
    files = [model_path]
    if model_path.is_dir():
        files = sorted(p for p in model_path.iterdir() if p.suffix in SOURCE_SUFFIXES)
    stats = ((file.resolve(), file.stat()) for file in files)
    parts = [f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats]
    return "\n".join([str(CONVERSION_VERSION), *parts])


def _converted(model_path: Path) -> Path:
    """A cached conversion, made now if there is none."""
    key = hashlib.sha256(_identity(model_path).encode()).hexdigest()[:32]
    target = cache_directory() / "tokenizers" / key
    if (target / TOKENIZER).exists():
        return target
    module = "tightfit.workers.tokenizer_files"
    # -P: the working directory may hold modules that shadow installed ones.
    command = [sys.executable, "-P", "-m", module, str(model_path), str(target)]
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
