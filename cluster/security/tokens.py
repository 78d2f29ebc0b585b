"""Bearer tokens: made once, kept as hashes in one file that is edited as a whole.

A token is "tft_" and 256 random bits, so a plain SHA-256 keeps it: nobody can search 2^256 tokens
for one that has a given hash. A slow hash such as scrypt is for passwords, which people choose from
few; here it would add tens of milliseconds of CPU to every call, for anyone who sends nonsense.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tightfit.cluster.errors import ConfigError

PREFIX = "tft_"
"""So that scanners for leaked secrets, and people, know one when they see it."""
SECRET_BYTES = 32
MAX_FILE_BYTES = 4 * 2**20
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"

Role = Literal["user", "admin"]
Instant = Annotated[datetime, msgspec.Meta(tz=True)]


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the file: a token without its secret."""

    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    """Whose it is, in logs and in `tightfit token list`; unique."""
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """Of the whole token, in hexadecimal."""
    role: Role = "user"
    """admin: may also drain the service."""
    created: Instant
    expires: Instant | None = None
    """From then on it is refused; None: never."""
    max_concurrent: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    """Calls under way at once; None: any number."""
    max_tokens_per_minute: Annotated[int, msgspec.Meta(ge=1, le=2**53)] | None = None
    """Prompt and generated tokens together, on average; None: any number."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1]
    tokens: list[Token]


_DECODER = msgspec.json.Decoder(_File)


def new_secret() -> str:
    """A token that nobody has seen."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def digest(secret: str) -> str:
    """What the file keeps of a token."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def decode(data: bytes) -> tuple[Token, ...]:
    """The entries that a file's bytes hold.

    Raises:
        ValueError: they are no such file, or two entries have the same name or the same hash.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has {len(data):,} bytes; at most {MAX_FILE_BYTES:,} are read")
    try:
        tokens = _DECODER.decode(data).tokens
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    for field in ("name", "sha256"):
        values = [getattr(token, field) for token in tokens]
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ValueError(f"{field} {twice!r} is there twice")
    return tuple(tokens)


def encode(tokens: Sequence[Token]) -> bytes:
    """A file's bytes: JSON that a person can read."""
    file = _File(version=1, tokens=list(tokens))
    return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"


def read(path: Path) -> tuple[Token, ...]:
    """The entries of a file.

    Raises:
        ConfigError: it is missing, cannot be read, or is malformed.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        return decode(data)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}. `tightfit token create` makes one"
        ) from error
    except ValueError as error:  # msgspec's errors are some
        raise ConfigError(f"{path}: is no file of tokens: {error}") from error


@contextmanager
def editing(path: Path) -> Iterator[list[Token]]:
    """The entries, to be changed in place; written when the `with` block ends without an error.

    Only its owner can read the file. A reader sees all of the old or all of the new one; two edits
    at once wait for each other.

    Raises:
        ConfigError: it cannot be read or written, or is malformed.
    """
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokens = list(read(path)) if path.exists() else []
        yield tokens
        _replace(path, encode(tokens))
    finally:
        os.close(lock)


def _replace(path: Path, data: bytes) -> None:
    decode(data)  # never leaves a file behind that the service would refuse
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        os.unlink(name)
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
