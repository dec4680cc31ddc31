"""Runs a model under DeepSpeed's ZeRO stage 3: parameters are partitioned over the ranks and kept on the GPU, in host
memory or on NVMe.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zeroinf.compat.deepspeed import build_whole_models, codes_of, gathered_bytes, has_codes, partition_models
from zeroinf.compat.modules import own_buffers, own_parameters, unsaved_buffers
from zeroinf.distributed.control import join_process_group
from zeroinf.distributed.world import World
from zeroinf.engines.base import EngineStats
from zeroinf.engines.quiet import quiet_deepspeed
from zeroinf.engines.scratch import ScratchFolder
from zeroinf.model.inspect import auto_class, keeping_untied
from zeroinf.model.pretrained import load_pretrained
from zeroinf.model.skeleton import build_skeleton
from zeroinf.model.source import ModelSource
from zeroinf.planner.plan import Plan

_RANDOM_SEED = 0
_SPREAD = 0.02


class ZeroEngine:
    """Runs a transformers model under ZeRO stage 3. Each forward is a collective: ranks step together."""

    name = "zero"
    in_step = True
    shares_passes = False
    link_stream = None

    def __init__(self, plan: Plan, source: ModelSource, config: dict[str, Any], world: World) -> None:
        """Load `source` straight into partitions: no rank builds the whole model first.

        `config` is a DeepSpeed JSON from `zeroinf.engines.zero.config` or the user's own. On NVMe the partitions lie in
        a folder of this run, which `close` removes: DeepSpeed itself leaves them behind.
        """
        os.environ["DS_ACCELERATOR"] = plan.device
        self._leave_group = join_process_group(world, plan.device)
        import deepspeed

        self._passes = 0
        self._offloaded = plan.offload != "none"
        config, self._swap_folder = _with_private_swap_folder(config)
        try:
            with quiet_deepspeed():
                # zero.Init makes buffers in the weights' dtype, and a rotary embedding of rounded frequencies gives
                # other tokens: the model's own are made apart.
                buffers = dict(build_skeleton(source, plan.dtype).named_buffers())
                # transformers holds this object by a weak reference only, and loads unpartitioned once it is gone.
                self._transformers_config = partition_models(config)
                deepspeed.init_distributed(dist_backend="nccl" if plan.device == "cuda" else "gloo", verbose=False)
                self._engine = deepspeed.initialize(model=_build(source, plan), config=config)[0]
                _set_buffers(self._engine.module, buffers)
                self._engine.module.eval()
        except BaseException:
            self._leave()
            raise

    @property
    def model(self) -> Any:
        return self._engine.module

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One collective forward for each micro-batch, one after the other."""
        self._passes += len(micro_batches)
        with torch.no_grad():
            return [self._engine.module(**inputs) for inputs in micro_batches]

    def recover(self) -> bool:
        return False  # DeepSpeed's hooks lose count of what they have gathered

    def stats(self) -> EngineStats:
        return EngineStats(passes=self._passes, streamed_bytes_per_pass=self._streamed_bytes())

    def _streamed_bytes(self) -> int:
        if not self._offloaded:
            return 0
        return gathered_bytes(self.model)

    def close(self) -> None:
        self._engine.destroy()
        self._leave()

    def _leave(self) -> None:
        """Leave transformers, the disk and the process group as they were."""
        build_whole_models()  # while it holds, models are built in partitions
        self._remove_swap_folder()
        self._leave_group()

    def _remove_swap_folder(self) -> None:
        if self._swap_folder is not None:
            self._swap_folder.remove()


def _build(source: ModelSource, plan: Plan) -> Any:
    dtype = getattr(torch, plan.dtype)
    if not source.random_weights:
        return load_pretrained(source, dtype)
    torch.manual_seed(_RANDOM_SEED)
    with keeping_untied(source.config):
        made = auto_class(source.config).from_config(
            source.config, dtype=dtype, trust_remote_code=source.trust_remote_code
        )
    _draw_coded_weights(made)
    return made


def _draw_coded_weights(model: Any) -> None:
    """Random weights where DeepSpeed keeps codes of them: transformers has drawn numbers in the codes' place."""
    import deepspeed

    spread = getattr(model.config.get_text_config(), "initializer_range", None) or _SPREAD
    for module in model.modules():
        weight: Any = own_parameters(module).get("weight")
        if not has_codes(weight):
            continue
        is_linear = isinstance(module, torch.nn.Linear)
        names = ("out_features", "in_features") if is_linear else ("num_embeddings", "embedding_dim")
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            if deepspeed.comm.get_rank() == 0:
                shape = [getattr(module, name) for name in names]
                drawn = torch.empty(shape, dtype=weight.dtype, device=weight.device).normal_(std=spread)
                weight.data.copy_(codes_of(weight, drawn))


def _set_buffers(model: torch.nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Replace the buffers that no checkpoint holds."""
    for prefix, module in model.named_modules():
        for name in unsaved_buffers(module):
            made = own_buffers(module)[name]
            if made is not None:
                own_buffers(module)[name] = buffers[f"{prefix}.{name}" if prefix else name].to(made.device)


def _with_private_swap_folder(config: dict[str, Any]) -> tuple[dict[str, Any], ScratchFolder | None]:
    """`config` with its nvme_path replaced by a folder below it that belongs to this rank of this run alone."""
    offload = config["zero_optimization"].get("offload_param") or {}
    if offload.get("device") != "nvme":
        return config, None
    folder = ScratchFolder(Path(offload["nvme_path"]))
    config = copy.deepcopy(config)
    config["zero_optimization"]["offload_param"]["nvme_path"] = str(folder.path)
    return config, folder
