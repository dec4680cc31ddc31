"""The limits of a pass: how many rows, tokens and pages it may have, and which rows may run beside each other."""

from __future__ import annotations

from dataclasses import dataclass

from zeroinf.planner.plan import Plan
from zeroinf.planner.timing import Resource

_ON_THE_GPU: tuple[Resource, ...] = ("arithmetic", "GPU memory", "kernel launches")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of a pass."""

    rows: int
    """Rows that are live at once."""
    pages: int
    """Pages of the pool, for all of them."""
    micro_batch_rows: int
    prefill_tokens: int
    """Prompt tokens that a pass computes, padding included; longer prompts take several passes."""
    breaks_at: int | None = None
    """Beyond so many tokens a model computes all keys anew, such as with other rotary factors: prompts run whole."""
    static: bool = False
    """Rows are admitted only when no other is live."""
    together: bool = False
    """All live rows are one micro-batch, prompts included, and none is admitted before all have ended."""
    keeps_ended: bool = False
    """A row that has ended keeps its place in its micro-batch: the model has states that cannot be regrouped."""
    host_tokens: int = 0
    """Tokens that host memory has room for: rows for which there are no pages rest there."""
    evenly: bool = False
    """Rows that run together begin with equally many tokens: a decoder behind an encoder may not take padding."""
    forward_tokens: int = 0
    """Tokens of one packed forward, in which rows lie side by side; 0: rows of a forward are padded to one length."""
    entering_rows: int = 1
    """Rows wait until there is room for so many, where a forward for the prompt of each would take longer."""
    whole: bool = False
    """A prompt is computed in one part, however long it is."""
    keeps_states: bool = False
    """A pass changes states of its rows, so it cannot be made again: they are computed anew."""
    scores_alone: bool = False
    """Sequences that are scored have passes of their own: all forwards of a pass attend in one way."""
    score_tokens: int = 0
    """Tokens of a forward of sequences that are scored, at the most; 0: as many as a pass computes of prompts."""
    prefix_pages: int = 0
    """Pages that may hold what prompts begin with in common; 0: rows share none."""
    staged_tokens: int = 0
    """Tokens that one packed forward fetches from host memory, at the most; 0: as many as its rows have."""
    cpu_rows: int = 0
    """Rows in host memory for whose steps the CPU attends, at the most: steps and prompts have forwards of their own.
    0: the GPU attends."""
    cpu_forwards: int = 1
    """Forwards of such steps in a pass, at least, where there are as many rows."""
    runs_ahead: bool = False
    """A pass begins before the tokens of the last one are known, where these hardly end all rows: passes are bound by
    the GPU, which would wait for the host. Passes that are bound by a link lose nothing by waiting."""

    def __post_init__(self) -> None:
        if self.together and self.pages and self.host_tokens:
            raise ValueError("rows of one micro-batch lie all on the GPU or all in host memory")
        if self.prefix_pages and (not self.forward_tokens or self.host_tokens or self.breaks_at is not None):
            raise ValueError("prefixes are shared in packed forwards alone, on the GPU, where no key is computed anew")

    @property
    def runs_whole(self) -> bool:
        """Whether no prompt is cut in parts."""
        return self.whole or self.breaks_at is not None

    @classmethod
    def of(cls, plan: Plan, *, shares_passes: bool, breaks_at: int | None) -> Limits:
        """The limits of `plan`, for an engine whose passes serve several micro-batches or one."""
        regroups, packs = plan.anatomy.is_paged, plan.forward_tokens > 0
        return cls(
            rows=plan.batch_size,
            pages=plan.pool_pages,
            micro_batch_rows=plan.micro_batch_rows,
            prefill_tokens=plan.prefill_tokens,
            breaks_at=breaks_at,
            static=plan.static_batches,
            together=not (regroups and (shares_passes or packs)),
            keeps_ended=not regroups,
            host_tokens=plan.host.tokens if plan.host is not None else 0,
            evenly=plan.anatomy.encoder is not None,
            forward_tokens=plan.forward_tokens,
            entering_rows=plan.timing.entering_rows if plan.timing is not None else 1,
            whole=bool(plan.anatomy.whole_because),
            keeps_states=plan.anatomy.mixers is not None,
            scores_alone=not shares_passes or packs or plan.packs_scores,
            prefix_pages=plan.prefix_pages,
            staged_tokens=plan.host.seen_columns if plan.host is not None and plan.host.cpu_rows else 0,
            cpu_rows=plan.host.cpu_rows if plan.host is not None else 0,
            cpu_forwards=plan.host.cpu_forwards if plan.host is not None else 1,
            runs_ahead=plan.device == "cuda" and plan.timing is not None and plan.timing.binds in _ON_THE_GPU,
        )
