"""Ranks agree over sockets, share a store, and notice when one of them is gone. Ranks are processes that fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from ranks import FORK, on_ranks

from zeroinf.distributed import watch
from zeroinf.distributed import watch as own
from zeroinf.distributed.control import Control
from zeroinf.distributed.watch import Peer, PeerWatch
from zeroinf.distributed.world import World
from zeroinf.errors import RankError

FOREVER_S = 600
"""Longer than `on_ranks` waits."""


def heard_by(queue: Any) -> list[Any]:
    """What the ranks, which have all ended, put into `queue`."""
    heard = []
    while not queue.empty():
        heard.append(queue.get())
    return heard


def test_alone_everything_is_answered_on_the_spot() -> None:
    control = Control(World(), "cpu")
    assert control.broadcast("x") == "x"
    assert control.all_gather(3) == [3]
    assert control.all_reduce_max(1, 7) == (1, 7)
    assert control.store.add("count", 2) == 2
    control.close()


def test_ranks_agree() -> None:
    def body(control: Control) -> Any:
        rank = control.world.rank
        counted = control.store.add("count", 1) in (1, 2, 3)
        told = control.broadcast({"from": rank} if rank == 0 else None)
        return told, control.all_gather(f"r{rank}"), control.all_reduce_max(rank, 10 - rank), counted

    found, _ = on_ranks(3, body)
    assert found == [({"from": 0}, ["r0", "r1", "r2"], (2, 10), True)] * 3


def test_ranks_leave_together_though_one_is_late() -> None:
    def body(control: Control) -> str:
        if control.world.rank == 1:
            time.sleep(1)
        control.store.set(f"rank {control.world.rank}", "was here")
        control.close()
        return "left"

    assert on_ranks(2, body)[0] == ["left", "left"]


def test_a_collective_with_a_rank_that_is_gone_is_a_rank_error() -> None:
    def body(control: Control) -> Any:
        if control.world.rank == 1:
            os._exit(9)
        control.all_reduce_max(1)

    found, _ = on_ranks(2, body)
    assert isinstance(found[0], RankError)
    assert "lost the connection to another rank" in str(found[0])


@pytest.mark.parametrize("dying", [0, 1, 2])
def test_a_killed_rank_is_noticed_by_ranks_that_are_stuck_and_one_of_them_speaks(dying: int) -> None:
    told = FORK.SimpleQueue()  # its `put` is over when it returns

    def body(control: Control) -> None:
        PeerWatch(control, lambda message, reports: told.put((control.world.rank, message, reports)))
        control.all_gather(None)
        if control.world.rank == dying:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(FOREVER_S)

    _, codes = on_ranks(3, body)
    heard = sorted(heard_by(told))
    assert len(heard) == 2
    assert [rank for rank, _, _ in heard] == [rank for rank in range(3) if rank != dying]
    assert all(f"rank {dying} (process " in message and "killed from outside" in message for _, message, _ in heard)
    assert [reports for _, _, reports in heard] == [True, False]
    assert codes == [-signal.SIGKILL if rank == dying else RankError.exit_code for rank in range(3)]


def test_a_rank_that_confessed_is_quoted() -> None:
    told = FORK.SimpleQueue()  # its `put` is over when it returns

    def body(control: Control) -> None:
        watch = PeerWatch(control, lambda message, reports: told.put(message))
        if control.world.rank == 1:
            watch.publish_exit_reason("the disk is on fire", 3)
            os._exit(3)
        time.sleep(FOREVER_S)

    _, codes = on_ranks(2, body)
    (message,) = heard_by(told)
    assert message.startswith("rank 1 (process ")
    assert message.endswith("died: the disk is on fire")
    assert codes == [3, 3], "all ranks end with the code of the one that failed"


def test_when_rank_0_confessed_the_others_leave_in_silence_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    told = FORK.SimpleQueue()
    monkeypatch.setattr(watch, "_GRACE_S", 60.0)  # it goes once the others have heard

    def body(control: Control) -> None:
        watch = PeerWatch(control, lambda message, reports: told.put((message, reports)))
        if control.world.is_main:
            watch.publish_exit_reason("the disk is on fire", 3)
            os._exit(3)
        time.sleep(FOREVER_S)

    _, codes = on_ranks(3, body)
    assert heard_by(told) == [("the disk is on fire", False)] * 2
    assert codes == [3, 3, 3]


def test_a_rank_whose_collective_broke_lets_the_watch_name_the_one_that_died() -> None:
    told = FORK.SimpleQueue()

    def body(control: Control) -> None:
        def on_death(message: str, reports: bool) -> None:
            told.put(message)
            own._GRACE_S = 0.1

        own._GRACE_S = 60.0  # a thread that notices late is no failure
        watch = PeerWatch(control, on_death)
        if control.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            control.all_reduce_max(1)
        except RankError:
            watch.defer_to_peer_failure()
        told.put("gave up waiting")

    on_ranks(2, body)
    (message,) = heard_by(told)
    assert message.startswith("rank 1 (process ")


def test_after_stop_ranks_may_end_in_any_order() -> None:
    def body(control: Control) -> str:
        watch = PeerWatch(control, lambda message, reports: os._exit(77))
        control.all_gather(None)
        watch.stop()
        control.all_gather(None)
        if control.world.rank == 0:
            time.sleep(1)
        return "alive"

    assert on_ranks(2, body) == (["alive", "alive"], [0, 0])


def test_a_peer_is_its_process_and_not_a_later_one_of_the_same_number() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        born = psutil.Process(process.pid).create_time()
        peer, namesake = (Peer(1, "here", process.pid, started) for started in (born, born - 100))
        assert peer.is_alive()
        assert not namesake.is_alive()
        process.kill()
        deadline = time.monotonic() + 60
        while peer.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not peer.is_alive(), "dead, though nobody has waited for it yet"


@pytest.mark.parametrize("dying", [0, 1, 2])
def test_a_rank_that_dies_on_another_node_ends_all_ranks_on_all_nodes(
    dying: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nodes, which is what their ranks are told this machine is."""
    monkeypatch.setattr(watch, "_HEARTBEAT_EVERY_S", 0.1)
    monkeypatch.setattr(watch, "_SILENCE_S", 3.0)
    told: Any = FORK.SimpleQueue()  # what is put is sent at once, also by a process that ends the hard way

    def body(control: Control) -> None:
        own = control.world.rank
        monkeypatch.setattr("socket.gethostname", lambda: f"node-{own}")
        PeerWatch(control, lambda message, reports: told.put((own, message, reports)))
        if own == dying:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(FOREVER_S)

    _, codes = on_ranks(3, body)
    assert codes[dying] == -signal.SIGKILL
    assert {code for rank, code in enumerate(codes) if rank != dying} == {1}
    words = []
    while not told.empty():
        words.append(told.get())
    assert sorted(rank for rank, _, _ in words) == sorted({0, 1, 2} - {dying})
    assert all(f"rank {dying} (process" in message for _, message, _ in words)


def test_ranks_on_nodes_of_one_name_are_not_looked_for_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers or cloned nodes: another one's process numbers are nobody's here, which would be a death."""

    def body(control: Control) -> str:
        own = control.world.rank
        monkeypatch.setattr(os, "readlink", lambda path: f"pid:[{own}]")
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: float(own))
        watching = PeerWatch(control, lambda message, reports: os._exit(77))
        time.sleep(1)
        control.all_gather(None)
        watching.stop()
        return "alive"

    assert on_ranks(2, body) == (["alive", "alive"], [0, 0])


def test_a_rank_that_is_done_early_is_not_taken_for_dead_by_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_HEARTBEAT_EVERY_S", 0.1)
    monkeypatch.setattr(watch, "_SILENCE_S", 3.0)

    def body(control: Control) -> str:
        own = control.world.rank
        monkeypatch.setattr("socket.gethostname", lambda: f"node-{own}")
        watching = PeerWatch(control, lambda message, reports: os._exit(77))
        if own == 1:
            watching.stop()
        else:
            time.sleep(4)
        control.all_gather(None)
        watching.stop()
        return "done"

    assert on_ranks(2, body) == (["done", "done"], [0, 0])


def test_parts_of_the_ranks_talk_among_themselves_and_share_the_store() -> None:
    def body(control: Control) -> Any:
        part = control.subgroup(2)
        told = part.broadcast(control.world.rank)
        together = part.all_gather(control.world.rank)
        part.store.add("all", 1)
        control.all_gather(None)
        counted = control.store.add("all", 0)
        control.all_gather(None)  # the store goes with rank 0
        return told, together, part.world.rank, part.world.size, counted

    assert on_ranks(4, body)[0] == [
        (0, [0, 1], 0, 2, 4),
        (0, [0, 1], 1, 2, 4),
        (2, [2, 3], 0, 2, 4),
        (2, [2, 3], 1, 2, 4),
    ]


def test_a_part_of_one_rank_is_alone_and_a_part_of_all_is_the_whole() -> None:
    alone = Control(World(), "cpu")
    assert alone.subgroup(1) is alone
