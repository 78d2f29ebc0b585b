"""The connection to Ray: to a cluster that runs, as one of its nodes if asked for, or to a private
one that begins and ends with it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import psutil
import ray

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.ray_authentication import answers_anyone
from tightfit.cluster.ray_node import OBJECT_STORE_BYTES, JoinedNode

JOIN_POLL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """How to reach, or start, the Ray cluster."""

    address: str | None = None
    """None: start a private one on this machine; "auto" or host:port: join."""
    adds_node: bool = False
    """Make this machine a node of the cluster at `address` first, one without room for stages."""
    num_cpus: int = 1
    """Logical CPUs of a private cluster."""
    threads_per_stage: int = 1
    """CPUs that each stage reserves, if it does not say so itself."""
    strategy: str = "PACK"
    """Ray's placement strategy for the stages: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD."""
    placement_timeout_s: float = 60.0
    """How long to wait for the cluster to have room."""
    insecure: bool = False
    """Join a cluster that asks nobody for a token."""


class RaySession:
    """A connection to Ray; when the cluster is private, the cluster itself.

    Raises:
        ConfigError: the cluster at `address` cannot be reached, or asks nobody for a token.
    """

    def __init__(self, options: RayOptions) -> None:
        self.options = options
        self._was_connected = ray.is_initialized()
        self._temp_dir: str | None = None
        self._processes: list[psutil.Process] = []
        self._node: JoinedNode | None = None
        if self._was_connected:
            return
        common: dict[str, Any] = {
            "logging_level": logging.WARNING,
            "log_to_driver": False,
            "namespace": f"tightfit-{os.getpid()}",
        }
        if options.address is None:
            self._start_private(common)
        elif options.adds_node:
            self._join(options.address, common)
        else:
            try:
                ray.init(address=options.address, **common)
            except (ConnectionError, RuntimeError) as error:
                raise ConfigError(
                    f"no Ray cluster answers at {options.address}: {error}. Start one with "
                    "`ray start --head`, or leave the address out to start a private one. One that "
                    "runs answers only who has its token (RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH)"
                ) from error
            self._refuse_an_open_cluster()

    def _refuse_an_open_cluster(self) -> None:
        if self.options.insecure:
            return
        address = ray.get_runtime_context().gcs_address
        if answers_anyone(address):
            ray.shutdown()
            raise ConfigError(
                f"the Ray cluster at {address} answers without a token: whoever reaches its ports "
                "can run code on its nodes. Start its nodes with RAY_AUTH_MODE=token and the same "
                "RAY_AUTH_TOKEN, or say serve.insecure_ray"
            )

    def _start_private(self, common: dict[str, Any]) -> None:
        """Start Ray for this process alone; what was started is ended when that fails halfway."""
        self._temp_dir = tempfile.mkdtemp(prefix="tf-ray-")
        before = set(psutil.Process().children(recursive=True))
        try:
            ray.init(
                address="local",
                num_cpus=self.options.num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=self._temp_dir,
                **common,
            )
        except BaseException:
            self._processes = self._children_since(before)
            self.close()
            raise
        self._processes = self._children_since(before)

    def _join(self, address: str, common: dict[str, Any]) -> None:
        """Add a node to the cluster, and connect through it as soon as it is known there."""
        deadline = time.monotonic() + self.options.placement_timeout_s
        self._node = JoinedNode(address)
        try:
            self._node.start(self.options.placement_timeout_s)
            while True:
                try:
                    ray.init(address=address, **common)
                    break
                except (ConnectionError, RuntimeError, ValueError) as error:
                    ended = self._node.why_ended()
                    if ended is not None or time.monotonic() > deadline:
                        raise ConfigError(
                            f"cannot join the Ray cluster at {address}: {ended or error}"
                        ) from error
                time.sleep(JOIN_POLL_S)
            self._refuse_an_open_cluster()
        except BaseException:
            self._node.close()
            raise

    @staticmethod
    def _children_since(before: set[psutil.Process]) -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if p not in before]

    @property
    def has_gpus(self) -> bool:
        """Some node of the cluster has one to give out."""
        return bool(ray.cluster_resources().get("GPU", 0))

    @property
    def is_private(self) -> bool:
        """This process started the cluster and ends it."""
        return self._temp_dir is not None

    def close(self) -> None:
        """Disconnect; a private cluster's processes and files are gone when this returns."""
        if self._was_connected:
            return
        if self._temp_dir is None:
            ray.shutdown()
            if self._node is not None:
                self._node.close()
            return
        family = set(self._processes)
        for process in self._processes:
            try:
                family.update(process.children(recursive=True))
            except psutil.NoSuchProcess:
                continue
        ray.shutdown()
        _, alive = psutil.wait_procs(family, timeout=3)
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=2)
        shutil.rmtree(self._temp_dir, ignore_errors=True)
