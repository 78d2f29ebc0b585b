"""Converts a checkpoint's tokenizer to tokenizer.json with transformers: `python -m … MODEL
TARGET`.

A process of its own, so that the gateway needs neither transformers nor torch. For SentencePiece
and vocab/merges tokenizers, and those inside GGUF files.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def convert(model: Path, target: Path) -> None:
    """Write the tokenizer of `model` into the directory `target`, all or nothing.

    Of several processes that do this at once, one wins and the others use what it wrote.

    Args:
        model: a checkpoint directory or a GGUF file; no weights are read.
        target: does not exist, or holds a whole conversion.
    """
    from transformers import AutoTokenizer

    options = {"gguf_file": model.name} if model.is_file() else {}
    directory = model.parent if model.is_file() else model
    tokenizer = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False, **options
    )
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise SystemExit("there are no vocabulary files")  # transformers made an empty one
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        fresh = Path(work) / "tokenizer"
        tokenizer.save_pretrained(str(fresh))
        if not (fresh / "tokenizer.json").exists():
            raise SystemExit(f"{type(tokenizer).__name__} cannot be written as tokenizer.json")
        try:
            os.replace(fresh, target)
        except OSError:
            if not (target / "tokenizer.json").exists():
                raise


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
