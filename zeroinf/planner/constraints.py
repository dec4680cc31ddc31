"""User constraints: the settings that the user fixed, and those that are left to the planner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from zeroinf.errors import UsageError
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import KvDtype
from zeroinf.planner.choice import Embeddings, Fetch, Offload
from zeroinf.planner.descriptor import default_engine, descriptor_of
from zeroinf.planner.kv import HostShare, KvAttention
from zeroinf.planner.routing import separable
from zeroinf.planner.wire import Wire


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraints:
    """Settings that the user fixed; None and "auto" leave a setting to the planner."""

    world_size: int = 1
    offload: Offload | Literal["auto"] = "auto"
    fetch: Fetch | Literal["auto"] = "auto"
    batch_size: int | None = None
    micro_batch_rows: int | None = None
    resident_blocks: int | None = None
    requests: int | None = None
    """How many rows there are in all; None is plenty."""
    nvme_space_bytes: int | None = None
    """What the folders for NVMe can still take; None without a folder."""
    names_folders: bool = True
    """Whether --nvme-path can name a folder; of another machine than this one, --nvme-space gives the disk's room."""
    one_node: bool = True
    gpus_are_linked: bool = True
    """GPUs reach each other's memory: what makes partitioned fetch worth while."""
    engine: str = field(default_factory=default_engine)
    wire: Wire = "model"
    host_share: HostShare = 0.0
    """The part of the rows whose keys and values rest in host memory."""
    kv_dtype: KvDtype = "model"
    kv_attention: KvAttention = "auto"
    no_host_kernel: str = ""
    """Why attention on the CPU cannot be compiled on the machine; empty where it can. The planner chooses the GPU
    then."""
    embeddings: Embeddings | Literal["auto"] = "auto"
    expert_parts: int | None = None
    routed_tokens: int | None = None
    """Passes of so many tokens or fewer bring only the experts that these are routed to."""
    static_batches: bool = False
    share_prefixes: bool = True
    """Rows whose prompts begin alike share keys and values of that."""
    ranks_per_stream: int = 1
    """Ranks that hold one model together and run the same rows."""

    @property
    def streams(self) -> int:
        return self.world_size // self.ranks_per_stream


def check_embeddings(embeddings: Embeddings | Literal["auto"], anatomy: Anatomy) -> None:
    """Raise UsageError where embeddings cannot rest in host memory, or on a disk, as asked."""
    if embeddings in ("cpu", "disk") and not anatomy.tables:
        why = "its head uses the same matrix" if anatomy.tied else "no table is read by row alone"
        raise UsageError(
            f"--embeddings {embeddings}: {anatomy.architecture} has no embeddings that could rest elsewhere: {why}",
            hint="drop it",
        )
    if embeddings == "disk" and anatomy.unreadable_rows:
        raise UsageError(
            f"--embeddings disk: rows of embeddings cannot be read by themselves: {anatomy.unreadable_rows}",
            hint="--embeddings cpu",
        )


def check_expert_parts(parts: int | None, fetch: Fetch | Literal["auto"], anatomy: Anatomy) -> None:
    """Raise UsageError where experts cannot come in so many parts."""
    if parts is None or parts == 1:
        return
    most = max((experts.count for experts in anatomy.experts), default=1)
    if parts > most:
        has = f"layers with {most} experts" if anatomy.experts else "no experts that could be split"
        hint = "drop it, or fewer parts" if anatomy.experts else "drop it"
        raise UsageError(f"--expert-parts {parts}: {anatomy.architecture} has {has}", hint=hint)
    if fetch == "partitioned":
        raise UsageError("--expert-parts: parts of layers are not shared out among ranks", hint="--fetch replicated")


def check_routed_tokens(
    tokens: int | None, parts: int | None, offload: Offload | Literal["auto"], wire: Wire, anatomy: Anatomy
) -> None:
    """Raise UsageError where experts cannot be brought one by one."""
    if not tokens:
        return
    asked = f"--routed-tokens {tokens}"
    if not anatomy.experts:
        raise UsageError(f"{asked}: {anatomy.architecture} has no experts that could be split", hint="drop it")
    if parts == 1 or offload == "none":
        other = "--offload none" if offload == "none" else "--expert-parts 1"
        raise UsageError(f"{asked} has no effect with {other}: only parts of experts that stream", hint="drop one")
    if not separable(anatomy, wire):
        raise UsageError(f"{asked}: with --wire {wire}, experts share scales", hint="drop one")


def check_micro_batch_rows(rows: int | None, batch_size: int | None, engine: str, regroups: bool) -> None:
    """Raise UsageError where so many rows in a micro-batch (None: as planned) are asked for in vain."""
    if rows is None:
        return
    if batch_size is not None and rows > batch_size:
        raise UsageError(
            f"--micro-batch-rows {rows}, but with --batch-size {batch_size} no more sequences run at a time",
            hint="lower the one, or raise the other",
        )
    shares = descriptor_of(engine).shares_passes
    if not (shares and regroups):
        what = f"the {engine} engine" if not shares else "a model whose states cannot be regrouped"
        raise UsageError(f"--micro-batch-rows has no effect with {what}: all sequences run together", hint="drop it")
