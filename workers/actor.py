"""The Ray shell of a stage: life cycle and control calls. The only module of the data plane that
knows Ray.

Micro-batches never pass through Ray: `run` takes them from the link until it is told to stop, and
its ObjectRef is the stage's sign of life.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ray

from tightfit.workers.api import LoadProgress, StageSpec, StageStatus, StepResult
from tightfit.workers.errors import StageError
from tightfit.workers.link import Endpoint, Receiver, Sender, StepMessage
from tightfit.workers.link_keys import LinkKeys
from tightfit.workers.logs import configure_logs_from_environment
from tightfit.workers.stage import Stage

log = logging.getLogger(__name__)

STOP_POLL_S = 0.2


class StageActor:
    """One stage in a process of its own. Calls run on several threads: `run` holds one of them."""

    def __init__(self, spec: StageSpec, run_dir: str, tcp: bool) -> None:
        configure_logs_from_environment(stage=spec.stage_index)
        self._spec = spec
        self._run_dir = run_dir
        self._node_id = ray.get_runtime_context().get_node_id()
        self._progress = LoadProgress(phase="waiting")
        self._stop, self._pause = threading.Event(), threading.Event()
        # All arithmetic happens on this one thread. OpenMP keeps a team of threads for every
        # thread that ever computed; as soon as all teams together outnumber the cores, its threads
        # stop spinning between operations and a step takes twice as long (measured: 13.7 ms for
        # 7.3).
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._stage: Stage | None = None
        self._sender: Sender | None = None
        self._keys = LinkKeys.new()
        self._receiver = Receiver(
            StepMessage,
            run_dir=run_dir,
            name=f"stage-{spec.stage_index}-{os.getpid()}",
            node_id=self._node_id,
            tcp_host=ray.util.get_node_ip_address() if tcp else None,  # of this node
            keys=self._keys,
        )

    def endpoint(self) -> Endpoint:
        """Where this stage takes its micro-batches."""
        return self._receiver.endpoint

    def load(self) -> StageStatus:
        """Read, quantise and hold the shard; returns what it measures then."""
        try:
            self._stage = self._compute.submit(
                Stage, self._spec, progress=self._note_progress
            ).result()
        except BaseException as error:
            self._progress = replace(self._progress, phase="failed", message=str(error))
            raise
        # What was made while loading stays: the collector need not walk it again in every step.
        gc.collect()
        gc.freeze()
        self._progress = replace(self._progress, phase="ready")
        return self.status()

    def _note_progress(self, progress: LoadProgress) -> None:
        self._progress = progress

    def progress(self) -> LoadProgress:
        """How far `load` has come; answers while it runs."""
        return self._progress

    def connect(self, onward: Endpoint, epoch: int, upstream_key: str) -> None:
        """Send to this receiver from now on, and accept only this epoch, from the holder of this
        key. Not while `run` computes."""
        self._loaded().begin_epoch(epoch)
        self._receiver.admit(upstream_key)
        if self._sender is not None:
            self._sender.close()
        self._sender = Sender(onward, node_id=self._node_id, keys=self._keys)
        self._pause.clear()

    def status(self) -> StageStatus:
        """What the stage is, holds and has done."""
        return self._loaded().status(node_id=self._node_id)

    def _loaded(self) -> Stage:
        if self._stage is None:
            raise StageError(f"stage {self._spec.stage_index} has not been loaded")
        return self._stage

    def run(self) -> None:
        """Compute micro-batches until `stop` or `pause`. A step that fails ends the run, and with
        it the stage: its KV cache is no longer what the control plane believes."""
        self._compute.submit(self._run).result()

    def _run(self) -> None:
        stage, sender = self._loaded(), self._sender
        if sender is None:
            raise StageError(f"stage {self._spec.stage_index} has not been connected")
        while not (self._stop.is_set() or self._pause.is_set()):
            received = self._receiver.receive(STOP_POLL_S)
            if received is None:
                continue
            message, payload = received
            try:
                if stage.accepts(message.batch):
                    sender.send(*stage.compute(message, payload))
            except Exception as error:
                self._give_up(sender, message, error)

    def _give_up(self, sender: Sender, message: StepMessage, error: Exception) -> None:
        log.error("stage %d: %s", self._spec.stage_index, traceback.format_exc())
        if self._spec.is_last:
            sender.send(
                StepResult(
                    epoch=message.batch.epoch, step=message.batch.step,
                    error=f"stage {self._spec.stage_index}: {error}",
                )
            )  # fmt: skip
        raise error

    def pause(self) -> None:
        """Let `run` return after the step that it is in. The shard stays, to be connected anew."""
        self._pause.set()

    def stop(self) -> None:
        """Let `run` return after the step that it is in, and leave no file behind."""
        self._stop.set()
        shutil.rmtree(self._run_dir, ignore_errors=True)
