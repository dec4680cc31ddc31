"""Ports that ranks meet at are free, and out of the way of everybody's connections."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from zeroinf.distributed import ports
from zeroinf.distributed.ports import free_port


def test_a_free_port_can_be_listened_on_and_is_none_that_connections_take() -> None:
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    port = free_port()
    assert port < max(first_of_connections, 32_768)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        used, other = taken.getsockname()[1], free_port()
        offered = iter([used, used, other])

        class Fixed:
            def randint(self, first: int, last: int) -> int:
                return next(offered)

        monkeypatch.setattr(ports.random, "SystemRandom", Fixed)
        assert free_port() == other
