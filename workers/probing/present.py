"""Which devices a node has at this moment, and what is free on each. Torch is imported only where
GPUs are asked for.

Rates are not measured: this is what is looked at again right before stages are placed, and later
on, while they run.
"""

from __future__ import annotations

from collections.abc import Iterator

from tightfit.workers.errors import ProbeError
from tightfit.workers.probing.host import host_memory
from tightfit.workers.probing.result import PresentDevice


def present_devices(
    kinds: frozenset[str], held: frozenset[str] = frozenset()
) -> tuple[PresentDevice, ...]:
    """This node's devices of some kinds: "cpu", "gpu".

    Looking at a GPU puts a context on it, which is gone when this process ends. A GPU that cannot
    be used is missing, as one that is not there.

    Args:
        kinds: of devices.
        held: UUIDs of GPUs that are left out: a full one has no room for another context.

    Raises:
        ProbeError: the kernel does not tell what is free.
    """
    return (*(_gpus(held) if "gpu" in kinds else ()), *(_host() if "cpu" in kinds else ()))


def _host() -> Iterator[PresentDevice]:
    memory = host_memory()
    yield PresentDevice(
        device="cpu", uuid=None, total_bytes=memory.total_bytes, free_bytes=memory.free_bytes
    )


def _gpus(held: frozenset[str]) -> Iterator[PresentDevice]:
    import torch

    from tightfit.workers.probing import cuda

    if cuda.cuda_problem() is not None:
        return
    for index in range(torch.cuda.device_count()):
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        if uuid in held:
            continue
        try:
            memory = cuda.gpu_memory(index)
        except ProbeError:
            continue
        yield PresentDevice(
            device=f"cuda:{index}",
            uuid=uuid,
            total_bytes=memory.total_bytes,
            free_bytes=memory.free_bytes,
        )
