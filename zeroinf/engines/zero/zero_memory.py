"""Memory terms of DeepSpeed's ZeRO-3 engine, from the settings that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from zeroinf.engines.zero.config import build_zero_config, nvme_pool_bytes
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import HostSize
from zeroinf.model.dtypes import DTYPE_BYTES
from zeroinf.planner.choice import Choice, Offload
from zeroinf.planner.descriptor import EngineTerms
from zeroinf.planner.memory import Overhead, Term, dynamic_terms, process_terms, store_terms
from zeroinf.planner.plan import Plan
from zeroinf.planner.workload import Workload

# DeepSpeed's defaults where a user's JSON says nothing (`deepspeed/runtime/zero/config.py`).
_DEFAULT_LIVE, _DEFAULT_PERSISTENCE = 10**9, 10**5


def memory_terms(
    asked: Plan, overhead: Callable[[bool], Overhead], own_config: Mapping[str, Any] | None = None
) -> EngineTerms:
    """Memory terms of `asked` with another choice in it, under the user's own JSON or the one that follows from it."""
    taken = overhead(asked.world_size > 1)

    def gpu(choice: Choice, workload: Workload) -> tuple[Term, ...]:
        plan = replace(asked, offload=choice.offload, batch_size=choice.batch_size)
        section = (own_config or build_zero_config(plan))["zero_optimization"]
        element_bytes = DTYPE_BYTES[plan.dtype]
        kept = (
            _persistent(plan, section.get("stage3_param_persistence_threshold", _DEFAULT_PERSISTENCE)) * element_bytes
        )
        if plan.offload == "none":
            kept += -(-plan.anatomy.weight_bytes // plan.world_size)
        live = min(section.get("stage3_max_live_parameters", _DEFAULT_LIVE), plan.anatomy.parameters) * element_bytes
        return zero_gpu_terms(live, kept, workload, taken)

    def elsewhere(choice: Choice, kv: HostSize | None) -> tuple[Term, ...]:
        plan = replace(asked, offload=choice.offload, batch_size=choice.batch_size)
        pool_bytes = nvme_pool_bytes(plan, own_config)
        host = zero_host_terms(plan.anatomy, plan.offload, plan.world_size, taken, pool_bytes)
        return (*host, *store_terms(plan.anatomy, choice))

    return EngineTerms(gpu=gpu, elsewhere=elsewhere)


def zero_gpu_terms(live_bytes: int, kept_bytes: int, workload: Workload, overhead: Overhead) -> tuple[Term, ...]:
    """GPU memory of one rank of DeepSpeed's engine: `live_bytes` of gathered weights, `kept_bytes` that never leave."""
    expanded_bytes = 0 if workload.expansion is None else workload.expansion.nbytes
    counted = (
        Term("gpu", "weights that stay", kept_bytes, "counted"),
        Term("gpu", "live weights", live_bytes, "counted"),
        Term("gpu", "gaps between live weights", live_bytes // 4, "assumed"),
        *((Term("gpu", "a weight made of its codes", expanded_bytes, "counted"),) if expanded_bytes else ()),
    )
    return (*counted, *dynamic_terms([kept_bytes, live_bytes, expanded_bytes], workload, overhead))


def zero_host_terms(
    anatomy: Anatomy, offload: Offload, world_size: int, overhead: Overhead, pool_bytes: int
) -> tuple[Term, ...]:
    """Host memory of all ranks of DeepSpeed's engine; torch rounds each page-locked allocation to a power of two."""
    locked = 0
    if offload == "cpu":
        for tensor in anatomy.tensors():
            part = -(-tensor.nbytes // world_size)
            locked += world_size * (1 << (part - 1).bit_length()) if part and not tensor.is_buffer else 0
    if offload == "nvme":
        locked = world_size * (1 << max(pool_bytes - 1, 1).bit_length())
    terms = (Term("host", "weights or read pool, page-locked", locked, "counted"), *process_terms(world_size, overhead))
    return tuple(term for term in terms if term.nbytes)


def _persistent(plan: Plan, threshold: int) -> int:
    """Elements of the parameters that never leave the GPU."""
    return sum(t.numel for t in plan.anatomy.tensors() if not t.is_buffer and t.numel <= threshold)
