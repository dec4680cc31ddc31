"""Memory terms of DeepSpeed's ZeRO-3 engine, from the settings that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zeroinf.engines.zero.config import build_zero_config, nvme_pool_bytes
from zeroinf.model.anatomy import DTYPE_BYTES
from zeroinf.planner.choice import Choice
from zeroinf.planner.memory import Overhead, Term, zero_gpu_terms, zero_host_terms
from zeroinf.planner.plan import Plan
from zeroinf.planner.search import EngineTerms
from zeroinf.planner.workload import Workload

# DeepSpeed's defaults where a user's JSON says nothing (`deepspeed/runtime/zero/config.py`).
_DEFAULT_LIVE, _DEFAULT_PERSISTENCE = 10**9, 10**5


def zero_terms(asked: Plan, overhead: Overhead, own_config: Mapping[str, Any] | None = None) -> EngineTerms:
    """Memory terms of `asked` with another choice in it, under the user's own JSON or the one that follows from it."""

    def terms(choice: Choice, workload: Workload) -> tuple[Term, ...]:
        plan = replace(asked, offload=choice.offload, batch_size=choice.batch_size)
        section = (own_config or build_zero_config(plan))["zero_optimization"]
        element_bytes = DTYPE_BYTES[plan.dtype]
        kept = (
            _persistent(plan, section.get("stage3_param_persistence_threshold", _DEFAULT_PERSISTENCE)) * element_bytes
        )
        if plan.offload == "none":
            kept += -(-plan.anatomy.weight_bytes // plan.world_size)
        live = min(section.get("stage3_max_live_parameters", _DEFAULT_LIVE), plan.anatomy.parameters) * element_bytes
        return (
            *zero_gpu_terms(live, kept, workload, overhead),
            *zero_host_terms(plan.anatomy, plan.offload, plan.world_size, overhead, nvme_pool_bytes(plan, own_config)),
        )

    return terms


def _persistent(plan: Plan, threshold: int) -> int:
    """Elements of the parameters that never leave the GPU."""
    return sum(t.numel for t in plan.anatomy.tensors() if not t.is_buffer and t.numel <= threshold)
