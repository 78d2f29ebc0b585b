"""How the tests run: kernels without a GPU, and several workers of pytest-xdist on one machine."""

import contextlib
import gc
import os

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER and int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) >= len(os.sched_getaffinity(0)):
    # Before torch is imported, which reads it. OpenMP's threads wait by spinning: with more of them
    # than cores, they keep those from computing that they wait for.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import loopback  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Without a GPU Triton's kernels are interpreted; said before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

with contextlib.suppress(ImportError):  # bench/gpu_check.py does without
    from hypothesis import HealthCheck, settings

    # How long an example takes says how busy the cores are.
    settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shared")


def pytest_configure():
    """Each worker has a network of its own: no port that it finds free or sees listening is
    another's."""
    if WORKER:
        with contextlib.suppress(OSError):  # not allowed: tools/loopback.py has said so
            loopback.enter()


def pytest_collection_modifyitems(items):
    if WORKER:
        _put_long_files_first(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """What is there now stays to the end: a collection of garbage need not look at it.

    Each stage that loads collects twice; through all that the tests import that took a second.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else extensions report at the end what is frozen as leaked


def _put_long_files_first(items):
    """Workers take whole files, in this order; a long one at the end would leave the others idle.

    By what the files say themselves: the longest limit of time, then the number of slow tests.
    """
    limit_s, num_slow = {}, {}
    for item in items:
        timeout = item.get_closest_marker("timeout")
        limit_s[item.path] = max(limit_s.get(item.path, 0), timeout.args[0] if timeout else 0)
        is_slow = item.get_closest_marker("slow") is not None
        num_slow[item.path] = num_slow.get(item.path, 0) + is_slow
    items.sort(key=lambda item: (limit_s[item.path], num_slow[item.path]), reverse=True)


@pytest.fixture(scope="module")
def one_thread():
    """torch computes on one thread, so that sums are added in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
