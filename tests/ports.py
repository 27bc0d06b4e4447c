"""A port for processes that are about to find each other."""

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """One that is free, and stays so until a process that is only starting takes it.

    The kernel gives ports of its own range to whoever asks for any: other tests, meanwhile. This is one below those.
    """
    first = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32768
    while True:
        port = random.SystemRandom().randrange(max(1024, first - 20000), first)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
