"""Linear layers that several blocks share: their tensors are the same stored bytes.

Some models tie whole blocks (ALBERT, Universal Transformers), and `torch.save` stores tensors that
share memory once. A shard then holds the weights once, too. What is compared is where the bytes lie
(`Checkpoint.place`), never what they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from tightfit.workers.api import StageSpec
from tightfit.workers.checkpoint import Checkpoint, find_prefix
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.model_formats import ModelFormats, Role, layer_roles


def role_tensors(config: DecoderConfig, layer: int, role: Role) -> Iterator[str]:
    """Names, without prefix, of the tensors that one linear layer of a block is made of."""
    names = layer_roles(config, layer)[role]
    for linear in config.layer_linears(layer):
        if linear.name in names:
            yield from (name for name, _ in config.linear_tensors(linear))


def shared_linears(
    checkpoint: Checkpoint, config: DecoderConfig, formats: ModelFormats, spec: StageSpec
) -> dict[tuple[int, Role], int]:
    """Which linear layers of a shard are an earlier layer's: (layer, role) → the first that has it.

    Opens the files of the shard's layers.

    Raises:
        CheckpointError: a tensor is missing.
    """
    prefix = find_prefix(checkpoint, config, spec.model_path)
    first_with: dict[Hashable, int] = {}
    shared = {}
    for layer in range(spec.first_layer, spec.end_layer):
        for role, names in layer_roles(config, layer).items():
            places = tuple(
                checkpoint.place(config.full_name(name, prefix))
                for name in role_tensors(config, layer, role)
            )
            stored = tuple(config.stored_scheme(name) for name in names)
            held = formats.scheme(role, layer), formats.is_held(role, layer)
            first = first_with.setdefault((role, places, stored, held), layer)
            if first != layer:
                shared[layer, role] = first
    return shared
