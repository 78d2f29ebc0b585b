"""Checkpoints by hub name: `org/name`, `org/name@revision`, or `org/name/file.gguf`.

Downloads only what is loaded: the config, the tokenizer, and one kind of weights. The files lie in
the hub library's own cache, which other programs share (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE` mean what they mean there).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from tightfit.cluster.errors import ConfigError

log = logging.getLogger(__name__)

NAME: Final = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<file>[\w./-]+\.gguf))?(@(?P<revision>[\w./-]+))?",
    re.ASCII,
)
SMALL_FILES: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken")
WEIGHTS: Final = (
    ("model", ".safetensors"),
    ("pytorch_model", ".bin"),
)
"""Kinds of weights as (stem, suffix), best first, as `workers.checkpoint` prefers them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """A model on a hub."""

    repo: str
    """org/name."""
    file: str | None = None
    """One GGUF file of the repository; None for its checkpoint."""
    revision: str | None = None
    """Branch, tag or commit; None for the main branch."""

    @property
    def served_name(self) -> str:
        """Last part of the file's or repository's name, as for a path."""
        return PurePosixPath(self.file or self.repo).name.removesuffix(".gguf")

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{self.repo}{file}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_name(text: str) -> HubName | None:
    """The model that `text` names; None when it cannot be a hub name."""
    match = NAME.fullmatch(text)
    if match is None or ".." in text:
        return None
    return HubName(repo=match["repo"], file=match["file"], revision=match["revision"])


def choose_files(names: Sequence[str], file: str | None = None) -> list[str]:
    """Files of a repository to download: small ones at its top, and one kind of weights.

    Args:
        names: all files, as paths in the repository.
        file: the GGUF file that was asked for, or None for the best kind of weights.
    Raises:
        ValueError: there are no weights that can be loaded, or a GGUF file has to be named.
    """
    top = [name for name in names if "/" not in name]
    small = [name for name in top if name.endswith(SMALL_FILES) and ".index." not in name]
    if file is not None:
        if file not in names:
            raise ValueError(f"has no file {file}; it has: {_listed(_ggufs(names))}")
        return [*small, file]
    for stem, suffix in WEIGHTS:
        shard = re.compile(rf"{stem}(-\d+-of-\d+)?{re.escape(suffix)}(\.index\.json)?")
        if weights := [name for name in top if shard.fullmatch(name)]:
            return [*small, *weights]
    ggufs = _ggufs(names)
    if len(ggufs) == 1 and ggufs[0] in top:
        return [*small, *ggufs]
    if ggufs:
        raise ValueError(
            f"holds GGUF files of which one has to be named, as in org/name/{ggufs[0]}: "
            f"{_listed(ggufs)}"
        )
    raise ValueError("holds no weights: no model*.safetensors, pytorch_model*.bin or .gguf file")


def download(name: HubName) -> Path:
    """The checkpoint directory or GGUF file, downloaded unless it is in the cache already.

    When the hub cannot be asked, what an earlier download left in the cache is used.

    Raises:
        ConfigError: the hub has no such model, refuses it, or has no weights that can be loaded;
            it cannot be asked, and nothing is cached; or the download broke off.
    """
    # Imported here: it takes a while, and most models are given by path.
    from httpx2 import TransportError
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name.repo, revision=name.revision)
    except (OSError, TransportError) as error:
        if refusal := _refusal(name, error):
            raise refusal from error
        directory = _cached(name, error)
    else:
        files = _choose(name, [sibling.rfilename for sibling in info.siblings or ()])
        try:
            directory = snapshot_download(name.repo, revision=name.revision, allow_patterns=files)
        except (OSError, TransportError) as error:
            broken_off = ConfigError(
                f"{name}: the download broke off ({_reason(error)}); started again, it goes on "
                "with what is missing"
            )
            raise _refusal(name, error) or broken_off from error
    path = Path(directory)
    return path / name.file if name.file else path


def download_config(name: HubName) -> Path:
    """The config.json of a model, downloaded unless it is in the cache already; no weights.

    Raises:
        ConfigError: the hub has no such model, refuses it, or cannot be asked, and nothing is
            cached.
    """
    from httpx2 import TransportError
    from huggingface_hub import HfApi, hf_hub_download

    try:
        HfApi().model_info(name.repo, revision=name.revision)  # says at once what is wrong
    except (OSError, TransportError) as error:
        if refusal := _refusal(name, error):
            raise refusal from error
        return Path(_cached(name, error)) / "config.json"
    try:
        return Path(hf_hub_download(name.repo, "config.json", revision=name.revision))
    except (OSError, TransportError) as error:
        broken_off = ConfigError(f"{name}: its config.json cannot be had ({_reason(error)})")
        raise _refusal(name, error) or broken_off from error


def _refusal(name: HubName, error: Exception) -> ConfigError | None:
    """What the hub's answer means; None when it is not an answer about this model."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return ConfigError(
            f"{name}: the hub gives this model only to those who accepted its terms. Accept them "
            "on the model's page, and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return ConfigError(f"{name}: {name.repo} has no revision {name.revision}")
    if isinstance(error, hub.RepositoryNotFoundError):
        return ConfigError(
            f"{name}: there is no such file or directory here, and no such model on the hub, or "
            "it is private: then set HF_TOKEN"
        )
    return None


def _choose(name: HubName, names: Sequence[str]) -> list[str]:
    try:
        return choose_files(names, name.file)
    except ValueError as error:
        raise ConfigError(f"{name}: {name.repo} {error}") from error


def _cached(name: HubName, why: Exception) -> str:
    """The directory of an earlier download; opening the checkpoint tells what it lacks."""
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            name.repo,
            revision=name.revision,
            local_files_only=True,
            # What must be there: without this, the whole repository, of which we leave most.
            allow_patterns=[name.file or "config.json"],
        )
    except OSError as error:
        raise ConfigError(
            f"{name}: there is no such file or directory here, the hub cannot be asked "
            f"({_reason(why)}), and no earlier download is in its cache"
        ) from error
    log.warning("%s: the hub cannot be asked (%s); using the cache", name, _reason(why))
    return directory


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _ggufs(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".gguf"))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def resolve_model(model: str) -> Path:
    """The checkpoint directory or GGUF file that MODEL names; from a hub when it is not here.

    Raises:
        ConfigError: nothing is there.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path.absolute()  # not resolved: caches link to files whose names say nothing
    if name := parse_hub_name(model):
        return download(name)
    raise ConfigError(
        f"{model}: no such directory or GGUF file. Give a checkpoint directory (config.json with "
        "safetensors or .bin shards), a .gguf file, or a hub name such as bigscience/bloom-560m"
    )
