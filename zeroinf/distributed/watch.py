"""Detects that a rank has died, within a fraction of a second on one node, even while other ranks are stuck in a
collective.

Input: the control channel. Output: a callback with a message, then the end of this process.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from zeroinf.distributed.control import Control
from zeroinf.errors import RankError
from zeroinf.signals import STOPPED_CODES

_POLL_S = 0.2
_GRACE_S = 1.5
"""How long a rank that ends gives the others to notice why: several polls."""

_HEARTBEAT_EVERY_S = 1.0
_SILENCE_S = 15.0
"""How long a rank on another node may say nothing before it is taken for dead: loading holds threads up."""

_HEARD = "reason/heard"


@dataclass(frozen=True, slots=True)
class Peer:
    """Another rank's process; `started` distinguishes it from a later process with the same pid."""

    rank: int
    host: str
    pid: int
    started: float
    namespace: tuple[str, ...] = ()
    """What tells in which processes it can be looked for: hosts and containers may have the same name."""

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class PeerWatch:
    """A thread that watches the processes of all ranks on this host, and the heartbeats of those on other hosts.

    Each rank increments a counter in the store as its heartbeat. Rank 0 watches the ranks on other nodes, and those
    watch rank 0: a failure between two other nodes reaches rank 0 through them, and every rank through rank 0.

    A rank that is stuck in a collective cannot notice by itself that its peer is gone. The thread does: it calls
    `on_death(message, reports)`, which saves what can be saved, and ends the process. `reports` is true on one rank
    only, the lowest that lives. A rank that fails on purpose stores its reason and exit code with
    `publish_exit_reason`: the other ranks report the reason and end with the exit code. Rank 0 holds the store and
    reports its own error: then no other rank does.

    With `ends_process` False the process goes on after `on_death`, and is watched no more: it is a user's own.
    """

    def __init__(self, control: Control, on_death: Callable[[str, bool], None], *, ends_process: bool = True) -> None:
        self._control = control
        self._on_death = on_death
        self._ends_process = ends_process
        self._stop = threading.Event()
        self._ending = threading.Event()
        process = psutil.Process()
        own = Peer(control.world.rank, socket.gethostname(), process.pid, process.create_time(), _process_namespace())
        peers: list[Peer] = control.all_gather(own)
        self._local_peers = [p for p in peers if p.namespace == own.namespace and p.rank != own.rank]
        self._remote_peers = [p for p in peers if p.namespace != own.namespace]
        heard = [p for p in self._remote_peers if own.rank == 0 or p.rank == 0]
        self._heartbeats = {peer: _Heartbeat() for peer in heard}
        self._heartbeat_due = 0.0
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._thread.start()

    def defer_to_peer_failure(self) -> None:
        """To be called where a collective may have failed because a peer died: if one did, this does not return.

        The connection breaks before the thread has looked at the processes, and does not say whose end it was.
        """
        if self._ending.wait(_GRACE_S):
            self._thread.join()

    def has_lost_a_peer(self) -> bool:
        """Whether a rank on this host has ended by itself, and not because it was asked to stop as well."""
        reasons = [self._exit_reason_of(peer.rank) for peer in self._local_peers if not peer.is_alive()]
        return any(reason is None or reason[1] not in STOPPED_CODES for reason in reasons)

    def publish_exit_reason(self, reason: str, exit_code: int) -> None:
        """Tell the other ranks why this one is about to end. Stops watching, since the others may end first."""
        self.stop()
        if self._publish_reason(reason, exit_code) and self._control.world.is_main:
            self._wait_for_peers()

    def _publish_reason(self, reason: str, exit_code: int) -> bool:
        """Store the reason. False if rank 0, which holds the store, is gone already."""
        try:
            self._control.store.set(_reason_key(self._control.world.rank), json.dumps([reason, exit_code]))
        except RuntimeError:
            return False
        return True

    def _wait_for_peers(self) -> None:
        """Keep the store until the others have read from it, or have ended."""
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and (
            self._remote_peers or any(peer.is_alive() for peer in self._local_peers)
        ):
            if self._control.store.add(_HEARD, 0) == len(self._local_peers) + len(self._remote_peers):
                return
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stop watching: from here on ranks may end in any order. Heartbeats for other nodes continue."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            silent = self._silent_peers()
            reason = self._remote_exit_reason() if self._control.world.is_main else self._exit_reason_of(0)
            dead = [*(peer for peer in self._local_peers if not peer.is_alive()), *silent]
            if not (reason or dead) or self._stop.is_set():
                continue
            self._ending.set()
            if reason is not None:
                self._on_death(reason[0], self._control.world.is_main)
                if not self._ends_process:
                    return
                self._wait_for_rank_0_message()
                os._exit(reason[1])
            reasons = [self._exit_reason_of(peer.rank) for peer in dead]
            first_alive = min(set(range(self._control.world.size)) - {peer.rank for peer in dead})
            texts = [f"rank {p.rank} (process {p.pid}) died: {_reason(w)}" for p, w in zip(dead, reasons, strict=True)]
            exit_code = next((reason[1] for reason in reasons if reason), RankError.exit_code)
            if self._remote_peers:
                self._publish_reason("; ".join(texts), exit_code)
            self._on_death("; ".join(texts), first_alive == self._control.world.rank)
            if not self._ends_process:
                return
            time.sleep(_GRACE_S)  # the others shall see who died first, not that this rank followed
            os._exit(exit_code)
        while self._remote_peers and not time.sleep(_HEARTBEAT_EVERY_S):  # type: ignore[func-returns-value]
            self._silent_peers()

    def _silent_peers(self) -> list[Peer]:
        """Send this rank's heartbeat, and return the peers on other nodes whose heartbeat has stopped."""
        now = time.monotonic()
        if not self._remote_peers or now < self._heartbeat_due:
            return []
        self._heartbeat_due = now + _HEARTBEAT_EVERY_S
        try:
            self._control.store.add(_heartbeat_key(self._control.world.rank), 1)
            for peer, beat in self._heartbeats.items():
                count = self._control.store.add(_heartbeat_key(peer.rank), 0)
                if count != beat.count:
                    beat.count, beat.since = count, now
        except RuntimeError:  # the store went with rank 0
            return [peer for peer in self._heartbeats if peer.rank == 0]
        return [peer for peer, beat in self._heartbeats.items() if now - beat.since > _SILENCE_S]

    def _remote_exit_reason(self) -> tuple[str, int] | None:
        """The reason and exit code that a rank on another node has published."""
        reasons = ((peer, self._exit_reason_of(peer.rank)) for peer in self._remote_peers)
        return next(((f"rank {p.rank} on {p.host}: {w[0]}", w[1]) for p, w in reasons if w is not None), None)

    def _wait_for_rank_0_message(self) -> None:
        """Stay alive until rank 0 has reported its error: a launcher that sees one rank end kills the others."""
        with suppress(RuntimeError):
            self._control.store.add(_HEARD, 1)
        main = [peer for peer in self._local_peers if peer.rank == 0]
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and any(peer.is_alive() for peer in main):
            time.sleep(_POLL_S)

    def _exit_reason_of(self, rank: int) -> tuple[str, int] | None:
        """The reason and exit code that `rank` has published; None if it has not."""
        key = _reason_key(rank)
        if rank == 0 and any(peer.rank == 0 and not peer.is_alive() for peer in self._local_peers):
            return None  # its store went with it
        try:
            if not self._control.store.check([key]):
                return None
            reason, exit_code = json.loads(self._control.store.get(key))
        except RuntimeError:
            return None
        return reason, exit_code


@dataclass(slots=True)
class _Heartbeat:
    """The last counter value seen of a rank, and the time since which it has not changed."""

    count: int = -1
    since: float = field(default_factory=time.monotonic)


def _process_namespace() -> tuple[str, ...]:
    """Identifies the processes that can see each other by pid: the same host, boot and pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return socket.gethostname(), boot, str(Path("/proc/self/ns/pid").readlink())


def _heartbeat_key(rank: int) -> str:
    return f"beat/{rank}"


def _reason_key(rank: int) -> str:
    return f"reason/{rank}"


def _reason(reason: tuple[str, int] | None) -> str:
    if reason is not None:
        return reason[0]
    return "it left no word, so it was killed from outside (out of host memory? see the system log)"
