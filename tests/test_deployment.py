"""How a service starts and is interrupted."""

import os
import signal
from contextlib import suppress

import pytest

from tightfit.cluster.deployment import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_something_swallows_still_ends_the_start(number):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        interrupts.check()
        with suppress(BaseException):  # as a finaliser does, or a library
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(number) is before
