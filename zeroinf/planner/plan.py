"""The plan: all decisions of a run, made before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import HostSize, PoolSize
from zeroinf.planner.choice import Embeddings, Fetch, Offload
from zeroinf.planner.descriptor import packs_scores, why_padded
from zeroinf.planner.graphs import why_launched
from zeroinf.planner.memory import Term, gathered_tokens
from zeroinf.planner.prefixes import SharedPrefixes
from zeroinf.planner.summary import plan_html, plan_lines
from zeroinf.planner.timing import Timing
from zeroinf.planner.wire import Wire


@dataclass(frozen=True, kw_only=True, slots=True)
class AioSettings:
    """DeepSpeed's asynchronous disk I/O, in its own terms (`aio` section of its config)."""

    block_size_bytes: int = 1 << 20
    queue_depth: int = 32
    threads: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorParallel:
    """Settings with which DeepSpeed-Inference splits a model over ranks."""

    size: int = 1
    """Ranks that hold one model together, and run the same rows. 0 asks for all there are."""
    injection_policy: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """For each class of blocks the linear layers in it whose results are summed over the ranks; empty: found by
    DeepSpeed."""
    checkpoint: Path | None = None
    """A checkpoint JSON in DeepSpeed's format instead of the model's own weights."""
    save_to: Path | None = None
    """Folder that receives each rank's part of the weights, and their checkpoint JSON."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Plan:
    """All decisions of a run: engine, tiers of the weights, batch, and memory terms. Prints in a few lines, in
    notebooks as a table.
    """

    anatomy: Anatomy
    engine: str
    offload: Offload
    dtype: str
    device: Literal["cuda", "cpu"]
    world_size: int
    batch_size: int
    """Rows that are live at once."""
    micro_batch_rows: int = 1
    """Rows that run one forward together, at the most; several micro-batches share a pass."""
    prefill_tokens: int = 1
    """Prompt tokens that a pass computes, at the most."""
    forward_tokens: int = 0
    """Tokens of one packed forward, at the most; 0: rows of a forward are padded to one length."""
    graph_tokens: int = 0
    """Packed forwards of up to so many tokens replay CUDA graphs of layers; 0: none does."""
    pool_pages: int = 0
    """Pages of the KV cache, for all live rows together."""
    prefix_pages: int = 0
    """Of these, those that may hold what prompts begin with in common; 0: rows share none."""
    prefixes: SharedPrefixes | None = None
    """What prompts share, where rows may; None: nothing is shared."""
    unshared_because: str = ""
    """Why prompts that begin alike are computed one by one, where that was not asked for."""
    host_rows: int = 0
    """Rows whose keys and values rest in host memory; those of the others lie in pages on the GPU."""
    host: HostSize | None = None
    """Room for them there."""
    no_host_kernel: str = ""
    """Why attention on the CPU cannot be compiled, where that decides who attends, or how fast; else empty."""
    static_batches: bool = False
    """Rows are admitted only when no other is live, as a measure of what it brings to do otherwise."""
    prompt_tokens: int = 0
    """The longest prompt: a micro-batch is at most this wide before it grows. 0 where no request is known."""
    new_tokens: int = 0
    """The most tokens that any row may add to its prompt."""
    scored_tokens: int = 0
    """Given tokens of which a forward may keep the scores; 0: none are scored."""
    fetch: Fetch = "replicated"
    resident_blocks: int = 0
    """Blocks that never leave the GPU, spread evenly over the pass."""
    nvme_blocks: int = 0
    """Blocks that rest on NVMe; the rest of those that stream rest in host memory."""
    host_units: int = 0
    """Of what moves as one piece of blocks on NVMe (all but experts, and each part of these), so many rest in host
    memory."""
    nvme_paths: tuple[Path, ...] = ()
    wire: Wire = "model"
    """How the weights of blocks rest and cross the link. Coded, those of residents are expanded for each pass, too."""
    embeddings: Embeddings = "gpu"
    """Where tables that tokens read by row rest."""
    routed_tokens: int = 0
    """Passes of so many tokens or fewer bring only the experts that these are routed to; where experts are split."""
    expert_parts: int = 1
    """Parts in which the experts of a layer are brought and computed, one after the other."""
    pin_memory: bool = True
    aio: AioSettings = field(default_factory=AioSettings)
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
    terms: tuple[Term, ...] = ()
    """Where every byte goes, as predicted."""
    requests: int | None = None
    """How many the job has; None is plenty."""
    timing: Timing | None = None
    """None where the planner knows no speed of the engine."""

    def __repr__(self) -> str:
        return "\n".join(plan_lines(self))

    def _repr_html_(self) -> str:
        return plan_html(self)

    @property
    def streams(self) -> int:
        """Input streams: ranks that hold one model together run the same rows."""
        return self.world_size // self.tensor_parallel.size

    def rank_anatomy(self, rank: int) -> Anatomy:
        """The anatomy as the cache of `rank` sees it: ranks of a group share the heads as DeepSpeed shares them out."""
        parts = self.tensor_parallel.size
        return self.anatomy.with_heads_shared(parts, rank % parts)

    @property
    def padded_because(self) -> str:
        """Why rows of a forward are padded to one length; empty where they are packed."""
        on_host = self.host_rows > 0 and self.kv_attention == "gpu"
        return why_padded(self.anatomy, self.engine, on_host=on_host, scored=self.scored_tokens > 0)

    @property
    def launched_because(self) -> str:
        """Why layers are launched kernel by kernel; empty where packed forwards of few tokens replay CUDA graphs."""
        return why_launched(self.anatomy, self.engine, self.device, expert_parts=self.expert_parts)

    @property
    def kv_attention(self) -> Literal["gpu", "cpu"]:
        """Who attends to keys and values in host memory."""
        return "cpu" if self.host is not None and self.host.cpu_rows else "gpu"

    @property
    def packs_scores(self) -> bool:
        """Whether sequences that are scored lie side by side in one forward."""
        return self.scored_tokens > 0 and packs_scores(self.anatomy, self.engine)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row in the KV cache at the most."""
        return self.anatomy.row_tokens(self.prompt_tokens, self.new_tokens)

    @property
    def gathered_tokens(self) -> int:
        """Tokens whose rows of a table in host memory a forward gathers, at the most."""
        return gathered_tokens(self)

    @property
    def pool(self) -> PoolSize:
        """The size of the KV cache."""
        return PoolSize(
            rows=self.batch_size, tokens=self.row_tokens, pages=self.pool_pages, prefix_pages=self.prefix_pages
        )

    def with_rows(self, rows: int) -> Plan:
        """This plan with fewer rows live at once (1 or more), and passes and a pool that are smaller by as much.

        Terms, predicted rates and room in host memory stay those of all rows.
        """
        longest = self.anatomy.row_pages(self.row_tokens) if self.pool_pages else 0

        def share(of_all: int) -> int:
            return max(1, of_all * rows // self.batch_size)

        timing = self.timing
        if timing is not None:  # as many groups of rows enter in the time of a row as before, not one of all rows
            timing = replace(timing, entering_rows=share(timing.entering_rows))
        return replace(
            self,
            batch_size=rows,
            micro_batch_rows=share(self.micro_batch_rows),
            prefill_tokens=share(self.prefill_tokens),
            forward_tokens=share(self.forward_tokens) if self.forward_tokens else 0,
            graph_tokens=min(self.graph_tokens, share(self.forward_tokens)) if self.graph_tokens else 0,
            pool_pages=max(longest, self.pool_pages * rows // self.batch_size),
            prefix_pages=share(self.prefix_pages) if self.prefix_pages else 0,
            host_rows=min(self.host_rows, rows),
            timing=timing,
        )
