"""A node's process without a model: it completes requests one by one, with a pause for each, or all at once."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from queue import Empty, SimpleQueue

from fake_cluster_results import CHARACTERS, result_of

from zeroinf.ray.messages import NodeEvent, NodeReady, NodeResults
from zeroinf.ray.supervisor import NodeSupervisor
from zeroinf.service.requests import Work

__all__ = ["CAPACITY", "CHARACTERS", "PAUSE", "FakeSupervisor"]
PAUSE, CAPACITY = "FAKE_PAUSE_S", "FAKE_CAPACITY"


class FakeSupervisor(NodeSupervisor):
    """Supervises a process of this module. Ray's actors are named after it."""

    module = "fake_worker"


def main() -> None:
    events = os.fdopen(os.dup(1), "wb")
    source = sys.stdin.buffer
    pickle.load(source)  # the NodeSpec
    pause_s = float(os.environ.get(PAUSE, 0))
    held: SimpleQueue[Work] = SimpleQueue()

    def send(event: NodeEvent) -> None:
        pickle.dump(event, events)
        events.flush()

    def receive() -> None:
        try:
            while (draw := pickle.load(source)) is not None:
                for work in draw:
                    held.put(work)
        finally:
            os._exit(0)

    send(NodeReady(capacity=int(os.environ.get(CAPACITY, 3)), load_s=0.0, plan="no model"))
    threading.Thread(target=receive, daemon=True).start()
    tokens = 0
    while True:
        done = [held.get()]
        while not pause_s:
            try:
                done.append(held.get_nowait())
            except Empty:
                break
        time.sleep(pause_s)
        tokens += sum(work.sampling.max_new_tokens for work in done)
        send(NodeResults(results=[result_of(work) for work in done], tokens=tokens))


if __name__ == "__main__":
    main()
