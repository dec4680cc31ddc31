"""Executes one run on a Ray cluster from request to report, as `zeroinf.runs.runner` does with ranks.

This process reads the input and holds the journal and the output; the nodes only complete requests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from zeroinf.jobs.output import Job
from zeroinf.jobs.tokenizing import groups_of, lengths_of
from zeroinf.jobs.work_list import WorkList
from zeroinf.model.identity import hub_commit
from zeroinf.model.source import ModelSource
from zeroinf.options.model import source_of
from zeroinf.options.options import RunOptions
from zeroinf.ray.cluster import Cluster, Device
from zeroinf.ray.driver import Driver
from zeroinf.ray.facts import facts_of
from zeroinf.ray.limits import NodeLimits
from zeroinf.ray.messages import NodeSpec
from zeroinf.ray.report import ClusterReport
from zeroinf.runs.interrupts import Interrupts
from zeroinf.runs.opening import open_job, outcome_of
from zeroinf.runs.prepare import JobInput
from zeroinf.runs.report import RunOutcome
from zeroinf.runs.request_feed import JobProgress, Output
from zeroinf.runs.shutdown import Shutdown
from zeroinf.service.observer import Observer
from zeroinf.service.requests import Refusal

_INHERITED = ("ZEROINF_", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "OMP_NUM_THREADS")
"""Variables of this process's environment that the processes on all nodes get."""


def run_on_cluster(
    options: RunOptions,
    cluster: Cluster,
    device: Device,
    limits: NodeLimits,
    results: TextIO,
    observer: Observer,
) -> tuple[RunOutcome, ClusterReport | None]:
    """Carry out one run on the nodes of `cluster`. Without anything to run there is no report.

    Raises a ZeroinfError; whatever was finished by then is saved, and a note says where and how to go on.
    """
    with Interrupts() as interrupts:
        source = source_of(options, device)

        def prepare(reading: JobInput, left: WorkList) -> tuple[NodeSpec, WorkList]:
            groups = groups_of(left) if options.share_prefixes else None
            lengths = lengths_of(reading.anatomy, left, groups)
            if groups is not None:
                left = left.selected(groups.order)
            # Inputs and outputs are this process's alone; a node takes the commit that is here.
            own = replace(options, prompts=(), input_files=(), output_file=None, revision=_commit(options, source))
            environ = {name: value for name, value in os.environ.items() if name.startswith(_INHERITED)}
            facts = facts_of(options, source, device)
            spec = NodeSpec(
                options=own, lengths=lengths, requests=len(left), facts=facts, environ=environ, folder=Path.cwd()
            )
            return spec, left

        opened = open_job(options, source, device, results, observer, prepare, limits.least)
        output = Output(opened.writer)
        shutdown = Shutdown(options.output_file, options.resume_command, output, observer, interrupts)
        report: ClusterReport | None = None
        try:
            if opened.prepared is not None:
                spec, left = opened.prepared
                progress = JobProgress(left, len(opened.job.work) - len(left), output)
                driver = Driver(cluster, spec, left, limits, progress, observer, interrupts)
                report = _with_counts(driver.run(), output, opened.job)
            failures: Sequence[Refusal] = output.finish()
        except BaseException as error:
            shutdown.on_error(error)
            raise
        shutdown.finished()
    return outcome_of(options, opened.job, output, failures, None, observer), report


def _commit(options: RunOptions, source: ModelSource) -> str | None:
    """The revision that names the commit of a hub's model which is here."""
    from_hub = not (source.random_weights or source.is_local or source.adapter)
    return (hub_commit(source) if from_hub else None) or options.revision


def _with_counts(report: ClusterReport, output: Output, job: Job) -> ClusterReport:
    return replace(
        report,
        requests=output.results - output.failed,
        refused=len(job.refusals),
        failed=output.failed,
        cut=output.cut,
        cut_answers=output.cut_answers,
        prompt_tokens=output.prompt_tokens,
        completion_tokens=output.completion_tokens,
    )
