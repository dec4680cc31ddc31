"""Finds a free TCP port on which ranks can meet."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

# Below the range from which Linux takes ports for connections (ip_local_port_range): between the moment a port is
# found free and the moment rank 0 listens on it, seconds later, none of the many sockets of other runs gets it.
_FIRST, _LAST = 20_000, 32_000
_TRIES = 100


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at this moment. Raises OSError where none is found."""
    choose = random.SystemRandom()
    for _ in range(_TRIES):
        port = choose.randint(_FIRST, _LAST)
        with suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port between {_FIRST} and {_LAST}")
