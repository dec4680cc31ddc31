"""What DeepSpeed's ZeRO-3 engine takes of each memory, from the settings that it is given."""

from __future__ import annotations

from dataclasses import replace

from zeroinf.engines.zero.config import build_zero_config, nvme_pool_bytes
from zeroinf.model.anatomy import DTYPE_BYTES
from zeroinf.planner.choice import Choice
from zeroinf.planner.memory import Overhead, Term, zero_gpu_terms, zero_host_terms
from zeroinf.planner.plan import Plan
from zeroinf.planner.search import EngineTerms
from zeroinf.planner.workload import Workload


def zero_terms(asked: Plan, overhead: Overhead) -> EngineTerms:
    """Memory terms of `asked` with another choice in it, under the config that `build_zero_config` makes of that."""

    def terms(choice: Choice, workload: Workload) -> tuple[Term, ...]:
        plan = replace(asked, offload=choice.offload, batch_size=choice.batch_size)
        section = build_zero_config(plan)["zero_optimization"]
        element_bytes = DTYPE_BYTES[plan.dtype]
        kept = section["stage3_model_persistence_threshold"] // plan.world_size * element_bytes
        if plan.offload == "none":
            kept += -(-plan.anatomy.weight_bytes // plan.world_size)
        live = section["stage3_max_live_parameters"] * element_bytes
        return (
            *zero_gpu_terms(live, kept, workload, overhead),
            *zero_host_terms(plan.anatomy, plan.offload, plan.world_size, plan.device, nvme_pool_bytes(plan)),
        )

    return terms
