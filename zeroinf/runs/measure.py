"""Measures one rank's part of a run or a session: the work of its passes since a moment that the caller picks."""

from __future__ import annotations

from collections.abc import Sequence

from zeroinf.generation.pass_counts import Counts
from zeroinf.hardware.process import Resident
from zeroinf.runs.report import RankReport
from zeroinf.service.loaded import LoadedModel
from zeroinf.service.phases import Phases


class RankMeter:
    """Counts what `model` does from here on."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        model.scheduler.counts = Counts()
        self._before, self._moved_before = model.engine.stats(), model.moved_bytes
        self._mask_wait_before_s = model.mask_wait_s
        self._attention_before_s, self._attention_wait_before_s = model.attention_s, model.attention_wait_s

    def report(self, phases: Sequence[Phases], host: Resident) -> RankReport:
        """What was counted; `host` is this process's memory at its highest."""
        model = self._model
        stats, before = model.engine.stats(), self._before
        fetched, sent = (now - then for now, then in zip(model.moved_bytes, self._moved_before, strict=True))
        return RankReport(
            host_loading=model.loading,
            host=host,
            gpu=model.gpu_use(),
            link_gbps=model.link_gbps,
            passes=stats.passes - before.passes,
            streamed_bytes=stats.streamed_bytes - before.streamed_bytes,
            routed_passes=stats.routed_passes - before.routed_passes,
            spared_bytes=stats.spared_bytes - before.spared_bytes,
            rows_read=stats.rows_read - before.rows_read,
            rows_read_s=stats.rows_read_s - before.rows_read_s,
            counts=model.scheduler.counts,
            pool_pages=model.scheduler.limits.pages,
            kv_fetched_bytes=fetched,
            kv_sent_bytes=sent,
            slot_bytes=stats.slot_bytes,
            pinned_host_bytes=model.pinned_host_bytes,
            link_busy_s=stats.link_busy_s - before.link_busy_s,
            stalls=stats.stalls - before.stalls,
            mask_wait_s=model.mask_wait_s - self._mask_wait_before_s,
            attention_s=model.attention_s - self._attention_before_s,
            attention_wait_s=model.attention_wait_s - self._attention_wait_before_s,
            repetitions=tuple(phases),
        )


def streamed_by_all(ranks: Sequence[RankReport], *, in_step: bool) -> int:
    """Weight bytes that all ranks streamed: in step, they share one walk over the weights; else each makes its own."""
    return (max if in_step else sum)(rank.streamed_bytes for rank in ranks)
