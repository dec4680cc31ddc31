"""Noticing that a rank has died, within a fraction of a second, wherever the others are stuck."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from zeroinf.distributed.control import Control
from zeroinf.errors import RankError

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Peer:
    """Another rank's process; `started` tells it from a later process of the same pid."""

    rank: int
    host: str
    pid: int
    started: float

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class PeerWatch:
    """A thread that watches the processes of all ranks on this host.

    A rank that is stuck in a collective cannot notice by itself that its peer is gone. The thread does: it calls
    `on_death(message, speak)` to save what can be saved and ends the process; `speak` is true on one rank only, the
    lowest that lives.
    A rank that fails on purpose leaves its reason with `confess`, so that the others can name it.
    """

    def __init__(self, control: Control, on_death: Callable[[str, bool], None]) -> None:
        self._control = control
        self._on_death = on_death
        self._stop = threading.Event()
        process = psutil.Process()
        own = Peer(control.world.rank, socket.gethostname(), process.pid, process.create_time())
        peers: list[Peer] = control.gather(own)
        self._peers = [p for p in peers if p.host == own.host and p.rank != own.rank]
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._thread.start()

    def confess(self, reason: str) -> None:
        """Tell the other ranks why this one is about to end."""
        try:
            self._control.store.set(f"reason/{self._control.world.rank}", reason)
        except RuntimeError:
            return  # rank 0, which holds the store, is gone already

    def stop(self) -> None:
        """Stop watching: from here on ranks may end in any order."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            dead = [peer for peer in self._peers if not peer.is_alive()]
            if dead and not self._stop.is_set():
                first_alive = min(set(range(self._control.world.size)) - {peer.rank for peer in dead})
                texts = [f"rank {peer.rank} (process {peer.pid}) died: {self._reason(peer)}" for peer in dead]
                self._on_death("; ".join(texts), first_alive == self._control.world.rank)
                os._exit(RankError.exit_code)

    def _reason(self, dead: Peer) -> str:
        key = f"reason/{dead.rank}"
        try:
            if dead.rank != 0 and self._control.store.check([key]):
                return self._control.store.get(key).decode()
        except RuntimeError:
            pass
        return "it left no word, so it was killed from outside (out of host memory? see the system log)"
