"""Measures this node's devices: memory that is free now, and rates, which are cached.

A CPU host takes a few seconds the first time. Nothing here starts Ray or a stage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Final

import torch

from tightfit import __version__
from tightfit.workers.errors import ProbeError, WorkerError
from tightfit.workers.probing import cuda
from tightfit.workers.probing.cache import ProbeCache
from tightfit.workers.probing.host import host_cores, host_memory, processor_name
from tightfit.workers.probing.loopback import measure_loopback
from tightfit.workers.probing.nvml import holders_note
from tightfit.workers.probing.rates import full_bytes, measure_rates
from tightfit.workers.probing.result import DeviceProbe, DeviceRates, LinkRate, NodeProbe

DEVICES: Final = ("all", "cpu", "cuda")
CPU_WIDTHS: Final = (4096, 2048, 1024, 512)
CPU_DENSE_TOKENS: Final = 256
CPU_LIMIT_S: Final = 4.0
"""After which nothing is repeated, and layers are smaller."""


def probe_node(devices: str, cache: ProbeCache) -> NodeProbe:
    """Memory and rates of this node's devices, and the rates of the links between them.

    Args:
        devices: `cpu`; `cuda`, all GPUs that are visible; or `all`, GPUs only where there are any.
        cache: rates that were measured before.

    Raises:
        ProbeError: GPUs are asked for and cannot be used, or the kernel does not tell what is free.
    """
    start_s = time.monotonic()
    run = _Run(cache)
    problem = cuda.cuda_problem()
    if devices == "cuda" and problem is not None:
        raise ProbeError(problem)
    if devices != "cuda":
        run.probe_cpu()
    if devices != "cpu" and problem is None:
        run.probe_gpus()
    return NodeProbe(
        node=os.uname().nodename,
        devices=tuple(run.devices),
        links=tuple(run.links),
        notes=(*run.notes, *cache.notes),
        elapsed_s=time.monotonic() - start_s,
    )


class _Run:
    """What one run has found so far."""

    def __init__(self, cache: ProbeCache) -> None:
        self._cache = cache
        self._software = f"torch {torch.__version__}, tightfit {__version__}"
        self.devices: list[DeviceProbe] = []
        self.links: list[LinkRate] = []
        self.notes: list[str] = []

    def probe_cpu(self) -> None:
        """The host, and the link from one stage on it to another."""
        name, cores, memory = processor_name(), host_cores(), host_memory()
        identity = f"cpu: {name}, {cores:g} cores, {self._software}"

        def measure() -> DeviceRates:
            with _threads(max(1, int(cores))):
                return _cpu_rates(memory.free_bytes)

        is_short = memory.free_bytes < full_bytes(CPU_WIDTHS)
        rates, is_cached = self._rates(identity, measure, is_short=is_short)
        self.devices.append(
            DeviceProbe(
                device="cpu",
                name=name,
                identity=identity,
                cores=cores,
                memory=memory,
                rates=rates,
                is_cached=is_cached,
            )
        )
        self._link("cpu", "cpu", f"loopback of {identity}", measure_loopback)

    def probe_gpus(self) -> None:
        """Every visible GPU, its links with the host, and with every other GPU."""
        identities: dict[int, str] = {}
        for index in range(torch.cuda.device_count()):
            try:
                identities[index] = self._probe_gpu(index)
            except ProbeError as error:
                self.notes.append(str(error))
        for index, identity in identities.items():
            gpu = f"cuda:{index}"
            up = partial(cuda.host_link, index, is_upload=True)
            self._link("cpu", gpu, f"host to {identity}", up)
            down = partial(cuda.host_link, index, is_upload=False)
            self._link(gpu, "cpu", f"{identity} to host", down)
        for source, target in permutations(identities, 2):
            self._link(
                f"cuda:{source}",
                f"cuda:{target}",
                f"from {identities[source]} to {identities[target]}",
                partial(cuda.peer_link, source, target),
            )

    def _probe_gpu(self, index: int) -> str:
        """One GPU; returns its identity.

        Raises:
            ProbeError: not even a context can be made.
        """
        memory = cuda.gpu_memory(index)
        properties = torch.cuda.get_device_properties(index)
        uuid = str(properties.uuid)
        if (note := holders_note(f"cuda:{index}", uuid)) is not None:
            self.notes.append(note)
        identity = f"gpu: {uuid}, driver {cuda.driver_version()}, {self._software}"
        measure = partial(cuda.gpu_rates, index, memory.free_bytes)
        is_short = memory.free_bytes < full_bytes(cuda.WIDTHS)
        rates, is_cached = self._rates(identity, measure, is_short=is_short)
        self.devices.append(
            DeviceProbe(
                device=f"cuda:{index}",
                name=properties.name,
                identity=identity,
                capability=f"{properties.major}.{properties.minor}",
                uuid=uuid,
                memory=memory,
                rates=rates,
                is_cached=is_cached,
            )
        )
        return identity

    def _rates(
        self, identity: str, measure: Callable[[], DeviceRates], *, is_short: bool
    ) -> tuple[DeviceRates | None, bool]:
        """Known rates, or new ones. Those measured short of memory, in smaller sizes, are kept
        apart: they are no good once there is room."""
        known = self._cache.find(identity, DeviceRates) if is_short else None
        if known is not None:
            return known, True
        name = f"{identity}, short of memory" if is_short else identity
        try:
            return self._cache.get(name, DeviceRates, measure)
        except ProbeError as error:
            self.notes.append(str(error))
            return None, False

    def _link(
        self, source: str, target: str, identity: str, measure: Callable[[], LinkRate]
    ) -> None:
        """One direction; a cached one gets today's names, as GPUs may be numbered anew."""
        try:
            rate, _ = self._cache.get(identity, LinkRate, measure)
        except WorkerError as error:
            self.notes.append(str(error))
        else:
            self.links.append(replace(rate, source=source, target=target))


def _cpu_rates(free_bytes: int) -> DeviceRates:
    try:
        return measure_rates(
            torch.device("cpu"),
            free_bytes,
            widths=CPU_WIDTHS,
            dense_tokens=CPU_DENSE_TOKENS,
            limit_s=CPU_LIMIT_S,
        )
    except RuntimeError as error:  # torch's, when memory went away meanwhile
        raise ProbeError(f"the cpu cannot be measured: {error}") from error


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """torch with this many threads: a quota is no affinity, and torch knows only the latter."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
