"""The report of a run: times, bytes, memory and the comparison with the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zeroinf.engines.base import Stalls
from zeroinf.generation.pass_counts import Counts
from zeroinf.hardware.process import Resident
from zeroinf.planner.plan import Plan
from zeroinf.runs.compare import Compared, compare_gpu, compare_host, compare_time
from zeroinf.service.gpu_memory import GpuUse
from zeroinf.service.observer import rate
from zeroinf.service.phases import Phases


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """One rank's part of a run."""

    host_loading: Resident
    """Resident memory of the process at its highest while weights were loaded."""
    host: Resident
    """The same over the whole run."""
    gpu: GpuUse | None
    """None without a GPU."""
    link_gbps: float | None
    """Rate of this rank's link, measured before the weights were loaded while all ranks measured theirs."""
    passes: int
    """Walks over the blocks in the measured part."""
    streamed_bytes: int
    """Weight bytes that they streamed; ranks in step streamed the same ones together."""
    routed_passes: int
    """Those of the passes that brought only the experts that their tokens were routed to."""
    spared_bytes: int
    """Weight bytes that these did without."""
    rows_read: int
    """Rows of tables that were read from the checkpoint's files, each once a forward."""
    rows_read_s: float
    """Seconds that forwards waited for them."""
    counts: Counts
    """What its passes were filled with."""
    pool_pages: int
    """Pages of its KV cache."""
    kv_fetched_bytes: int
    """Keys and values that crossed this rank's link from host memory in the measured part."""
    kv_sent_bytes: int
    """Those that crossed it the other way."""
    slot_bytes: int
    """Device memory that blocks pass through."""
    pinned_host_bytes: int
    """Host memory page-locked by this rank, what it shares with others included."""
    link_busy_s: float
    """Seconds of the measured part in which weights crossed this rank's link."""
    stalls: Stalls
    """Where the time of the measured part went."""
    mask_wait_s: float
    """Seconds that passes waited for the masks of structured answers, since the model was loaded."""
    attention_s: float
    """Seconds that the CPU attended to keys and values in host memory."""
    attention_wait_s: float
    """Seconds that the host waited for attention on the CPU, part of the time in layers."""
    repetitions: tuple[Phases, ...]
    """Of the same requests; what else is measured is the last one's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """A whole run, all ranks together. Times in seconds."""

    plan: Plan
    requests: int
    """Results of this run."""
    refused: int
    failed: int
    """Requests of this run that came to nothing, as the model's scores were not numbers; their tokens count below."""
    cut: int
    """Results of this run that were cut at their most tokens, `finish_reason` "length"."""
    cut_answers: int
    """Those of them whose answers have a format (a JSON schema, a regex, choices), which is not complete."""
    prompt_tokens: int
    completion_tokens: int
    """Tokens really generated: no padding, end-of-sequence tokens included."""
    start_to_ready_s: float
    """From the start of the process to weights loaded."""
    load_s: float
    """The part of it that the engine took to load the weights."""
    tokenize_s: float
    generate_s: float
    """From the first forward to the last result; warm-up left out."""
    start_to_finish_s: float
    """From the start of the process to the last result."""
    streamed_bytes: int
    """Weight bytes that reached the compute devices of all ranks from host memory or disk while generating."""
    shared_host_bytes: int
    """Weights in host memory of which all ranks map the same copy."""
    ranks: tuple[RankReport, ...]
    output: Path | None
    errors: Path | None

    def to_json(self) -> dict[str, Any]:
        """Every figure of the run, for `--report`. `schema` changes when a name or a meaning does."""
        plan, anatomy = self.plan, self.plan.anatomy
        asked = (
            "engine",
            "fetch",
            "offload",
            "wire",
            "dtype",
            "device",
            "world_size",
            "batch_size",
            "resident_blocks",
            "host_rows",
            "embeddings",
            "expert_parts",
            "routed_tokens",
        )
        counted = (
            "requests",
            "refused",
            "failed",
            "cut",
            "cut_answers",
            "prompt_tokens",
            "completion_tokens",
            "shared_prompt_tokens",
        )
        moved = ("streamed_bytes", "shared_host_bytes")
        timed = ("start_to_ready_s", "load_s", "tokenize_s", "generate_s", "start_to_finish_s")
        rates = (
            "tokens_per_second",
            "streamed_gbps",
            "kv_gbps",
            "link_gbps",
            "link_share",
            "link_busy",
            "ms_per_token",
        )
        memory = ("peak_gpu_bytes", "peak_host_bytes", "peak_host_loading_bytes", "pinned_host_bytes")
        return {
            "schema": 1,
            **{name: getattr(anatomy, name) for name in ("architecture", "parameters", "weight_bytes")},
            **{name: getattr(plan, name) for name in asked},
            **{name: getattr(self, name) for name in (*counted, *moved, *timed, *rates, *memory)},
            "kv_attention": plan.kv_attention,
            "kv_dtype": plan.host.dtype if plan.host is not None else "model",
            "padding": self.padding,
            "kv_pool": self.pool_share,
            "compared": [{**asdict(one), "ratio": one.ratio} for one in self.compared()],
            "tensor_parallel_size": plan.tensor_parallel.size,
            "repetitions": [asdict(phases) for phases in self.repetitions],
            "ranks": [asdict(rank) for rank in self.ranks],
        }

    def compared(self) -> tuple[Compared, ...]:
        """Every term of the plan beside what was measured."""
        uses = [rank.gpu for rank in self.ranks if rank.gpu is not None]
        return (
            *compare_gpu(self.plan, uses),
            *compare_host(self.plan, self.pinned_host_bytes, self.peak_host_bytes),
            *compare_time(self.plan, self.load_s, self.step_s, self.tokens_per_second),
        )

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens over the time to generate them, all ranks together."""
        return rate(self.completion_tokens, self.generate_s)

    @property
    def repetitions(self) -> tuple[Phases, ...]:
        """The phases of the whole run: the ranks' longest times."""
        return tuple(
            Phases(
                generate_s=max(phases.generate_s for phases in ranks),
                first_token_s=max(phases.first_token_s for phases in ranks),
                prefill_s=max(phases.prefill_s for phases in ranks),
            )
            for ranks in zip(*(rank.repetitions for rank in self.ranks), strict=True)
        )

    @property
    def peak_gpu_bytes(self) -> int | None:
        """Memory of the GPU that the run took most of; None without a GPU."""
        uses = [rank.gpu for rank in self.ranks if rank.gpu is not None]
        return max((use.process or use.reserved for use in uses), default=None)

    @property
    def peak_host_bytes(self) -> int:
        """Host memory of all ranks; weights that they share count once."""
        return self._together([rank.host for rank in self.ranks])

    @property
    def peak_host_loading_bytes(self) -> int:
        """Host memory of all ranks while weights were loaded."""
        return self._together([rank.host_loading for rank in self.ranks])

    @property
    def pinned_host_bytes(self) -> int:
        """Host memory that the ranks have page-locked; what they share counts once."""
        shared = [min(rank.pinned_host_bytes, self.shared_host_bytes) for rank in self.ranks]
        return sum(rank.pinned_host_bytes for rank in self.ranks) - sum(shared[:-1])

    @property
    def step_s(self) -> float | None:
        """Seconds of a pass that is a token for every row that may be live; None where there were no two in a row."""
        counts = [rank.counts for rank in self.ranks]
        steps = sum(one.full_steps for one in counts)
        return sum(one.full_steps_s for one in counts) / steps if steps else None

    @property
    def padding(self) -> dict[str, float]:
        """The part of the columns, computed or attended to, that held no token of their row; all ranks together."""
        counts = [rank.counts for rank in self.ranks]
        return {
            "prefill": _share(sum(c.prefill_padding for c in counts), sum(c.prefill_columns for c in counts)),
            "decode": _share(sum(c.decode_padding for c in counts), sum(c.decode_columns for c in counts)),
        }

    @property
    def shared_prompt_tokens(self) -> int:
        """Prompt tokens that were not computed: another sequence had the same prefix. All ranks together."""
        return sum(rank.counts.shared_tokens for rank in self.ranks)

    @property
    def pool_share(self) -> dict[str, float]:
        """The part of the KV cache that live rows held, on average over all passes and at the most."""
        ranks = self.ranks
        passes = sum(rank.counts.passes * rank.pool_pages for rank in ranks)
        return {
            "mean": _share(sum(rank.counts.reserved_pages for rank in ranks), passes),
            "peak": max(_share(rank.counts.most_reserved_pages, rank.pool_pages) for rank in ranks),
        }

    def _together(self, ranks: Sequence[Resident]) -> int:
        mapped = sorted(min(rank.shared_bytes, self.shared_host_bytes) for rank in ranks)
        return sum(rank.total_bytes for rank in ranks) - sum(mapped[:-1])

    @property
    def streamed_gbps(self) -> float:
        """GB/s (10^9 bytes) of weights, all links together."""
        return self.streamed_bytes / self.generate_s / 1e9 if self.generate_s else 0.0

    @property
    def kv_gbps(self) -> float:
        """GB/s (10^9 bytes) of keys and values from host memory, all links together."""
        fetched = sum(rank.kv_fetched_bytes for rank in self.ranks)
        return fetched / self.generate_s / 1e9 if self.generate_s else 0.0

    @property
    def link_gbps(self) -> float | None:
        """All links together, as measured before the weights were loaded; None where nothing crosses one."""
        rates = [rank.link_gbps for rank in self.ranks if rank.link_gbps is not None]
        return sum(rates) if rates else None

    @property
    def link_share(self) -> float | None:
        """The part of the links' rate that weights, keys and values reached over the whole generation."""
        return (self.streamed_gbps + self.kv_gbps) / self.link_gbps if self.link_gbps else None

    @property
    def link_busy(self) -> float | None:
        """The part of the generation in which weights crossed a link, on average over the ranks; None where nothing
        crosses one. It is more than `link_share` where the link is slowed."""
        busy_s = [rank.link_busy_s for rank in self.ranks if rank.link_gbps is not None]
        return sum(busy_s) / len(busy_s) / self.generate_s if busy_s and self.generate_s else None

    @property
    def ms_per_token(self) -> float:
        """Tokenize and generate, milliseconds for each generated token, all ranks together."""
        return 1e3 * (self.tokenize_s + self.generate_s) / max(self.completion_tokens, 1)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOutcome:
    """The number of requests that were completed, refused and failed, and the report."""

    requests: int
    """Results in the output, those of earlier runs included."""
    refused: int
    failed: int
    """Requests that came to nothing, those of earlier runs included."""
    report: RunReport | None
    """None where earlier runs had done everything."""
    why_failed: str = ""
    """Why the first of those that failed did."""
