"""A job that a process of its own drives over a Ray cluster whose nodes have no model."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

from fake_cluster import drive
from fake_job import entries, read_job
from fake_worker import PAUSE, FakeSupervisor
from observers import Notes

from zeroinf.errors import ClusterError
from zeroinf.ray.cluster import RayCluster

_STARTS = multiprocessing.get_context("forkserver")
_STARTS.set_forkserver_preload([__name__])


class Spoken(Notes):
    """An observer that says everything to stderr."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    failed = note


def drive_on(address: str, out: Path, requests: int, pause_s: float) -> None:
    """One run of a job of `requests`, of which nodes take `pause_s` for each; it goes on where another one ended."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    cluster = RayCluster(address, supervisor=FakeSupervisor)
    try:
        drive(read_job(entries(requests)), out, cluster, Spoken(), resume=True, environ={PAUSE: str(pause_s)})
    except ClusterError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    finally:
        cluster.leave()


def started(address: str, out: Path, requests: int, pause_s: float) -> multiprocessing.process.BaseProcess:
    """A process that drives it, forked from one that has imported everything and knows no Ray cluster."""
    process = _STARTS.Process(target=drive_on, args=(address, out, requests, pause_s))
    process.start()
    return process
