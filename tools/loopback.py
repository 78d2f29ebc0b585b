"""Runs a command in a network namespace that has nothing but a loopback interface.

`python tools/loopback.py COMMAND …`. Ray listens on the host's own address even when it serves one
process; in here there is none but 127.0.0.1. Where namespaces are not allowed, the command runs as
it is, and a line on stderr says so.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1


def enter() -> None:
    """Move this process into a fresh namespace and bring its loopback up.

    Raises:
        OSError: not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def main(command: list[str]) -> None:
    """Become `command`, inside if possible."""
    try:
        enter()
    except OSError as error:
        print(f"no network namespace ({error}): running on the host's own", file=sys.stderr)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
