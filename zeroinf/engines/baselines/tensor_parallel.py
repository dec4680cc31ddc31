"""Runs a model with DeepSpeed-Inference's tensor parallelism: each rank of a group holds a part of every large
weight.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from zeroinf.compat.deepspeed import run_tensor_parallel_in
from zeroinf.distributed.control import Control, join_process_group
from zeroinf.engines.base import LoadListener
from zeroinf.engines.baselines.checkpoint_json import ListedWeights, save_parts
from zeroinf.engines.baselines.plain import PlainEngine
from zeroinf.engines.quiet import quiet_deepspeed
from zeroinf.engines.stream.checkpoint_weights import CheckpointWeights
from zeroinf.engines.stream.host_memory import HostMemory
from zeroinf.engines.stream.tensor_groups import group_tensors
from zeroinf.engines.stream.weight_source import LoadProgress, WeightSource
from zeroinf.errors import UsageError
from zeroinf.model.kv import cache_name
from zeroinf.model.skeleton import build_skeleton
from zeroinf.model.source import ModelSource
from zeroinf.planner.plan import Plan

_PROBE_TOKENS = 2


class TensorParallelEngine(PlainEngine):
    """`init_inference` with automatic tensor parallelism, or with the user's injection policy.

    Weights are loaded once a node, into memory that all its ranks map and that is gone when each has cut its part: no
    rank holds the whole model. Ranks of a group must be given the same rows; groups are independent.
    """

    name = "tensor-parallel"
    in_step = True

    def __init__(
        self, plan: Plan, source: ModelSource, control: Control, device: torch.device, listener: LoadListener
    ) -> None:
        os.environ["DS_ACCELERATOR"] = plan.device
        self._leave_group = join_process_group(control.world, plan.device)
        try:
            self._load(plan, source, control, device, listener)
        except BaseException:
            self.close()
            raise

    def _load(
        self, plan: Plan, source: ModelSource, control: Control, device: torch.device, listener: LoadListener
    ) -> None:
        import deepspeed

        with quiet_deepspeed(), redirect_stdout(StringIO()):  # it prints what it found
            deepspeed.init_distributed(dist_backend="nccl" if plan.device == "cuda" else "gloo", verbose=False)
            whole = _WholeModel(plan, source, control, listener)
            try:
                self.model = _split(whole.model, plan, source, control, device)
            finally:
                whole.memory.close()
        _probe(self.model, source, device)
        if (folder := plan.tensor_parallel.save_to) is not None:
            save_parts(self.model, folder, control.world.rank, plan)

    def recover(self) -> bool:
        return False  # the other ranks of the group wait in a collective

    def close(self) -> None:
        super().close()
        self._leave_group()


class _WholeModel:
    """The model with its weights in host memory, one copy a node. Close the memory when nothing refers to it."""

    def __init__(self, plan: Plan, source: ModelSource, control: Control, listener: LoadListener) -> None:
        self.model = build_skeleton(source, plan.dtype)
        blocks, outside, _ = group_tensors(self.model)
        groups = (*blocks, outside)
        starts = [0, *accumulate(group.nbytes for group in groups)]
        self.memory = HostMemory(starts[-1], control, pin=False)
        pieces = [
            (i, self.memory.bytes[at : at + group.nbytes])
            for i, (at, group) in enumerate(zip(starts, groups, strict=False))
        ]
        load_progress = LoadProgress(starts[-1], listener.filled)
        listed = plan.tensor_parallel.checkpoint
        origin: WeightSource = (
            CheckpointWeights(groups, self.model, source, control, torch.device("cpu"), load_progress)
            if listed is None
            else ListedWeights(groups, self.model, listed, control, load_progress)
        )
        origin.fill(pieces)
        control.all_gather(None)  # nobody reads before all of it is there
        for index, piece in pieces:
            for tensor, view in groups[index].views(piece):
                tensor.bind(tensor.like(view))


def _split(model: Any, plan: Plan, source: ModelSource, control: Control, device: torch.device) -> Any:
    """`model` with this rank's part of its weights on `device`; of the host memory that held them nothing is kept."""
    import deepspeed

    asked = plan.tensor_parallel
    if asked.size > 1:
        starts = range(0, control.world.size, asked.size)
        groups = [dist.new_group(range(at, at + asked.size)) for at in starts]
        run_tensor_parallel_in(groups[control.world.rank // asked.size])
    try:
        split = deepspeed.init_inference(
            model,
            dtype=getattr(torch, plan.dtype),
            tensor_parallel={"tp_size": asked.size},
            injection_policy=_policy(model, asked.injection_policy),
        ).module
    except (AssertionError, ValueError, RuntimeError) as error:
        raise _cannot(source, error) from error
    with torch.no_grad():
        for tensor in (*split.parameters(), *split.buffers()):
            tensor.data = tensor.data.to(device, copy=True) if device.type == "cpu" else tensor.data.to(device)
    decoder = getattr(split, "transformer", None)
    if decoder is not None and hasattr(decoder, "build_alibi_tensor"):
        decoder.register_forward_pre_hook(_give_mask, with_kwargs=True)
    return split.eval()


def _give_mask(decoder: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """BLOOM without a mask takes the slopes of all heads; with one it asks where DeepSpeed gives a rank its own."""
    if inputs.get("attention_mask") is None:
        ids, cache = args[0] if args else inputs["input_ids"], inputs.get(cache_name(decoder))
        seen = cache.get_seq_length() if cache is not None else 0
        inputs["attention_mask"] = ids.new_ones(ids.shape[0], seen + ids.shape[1])
    return args, inputs


def _policy(model: Any, asked: Sequence[tuple[str, tuple[str, ...]]]) -> dict[type, tuple[str, ...]] | None:
    """DeepSpeed's injection policy: classes instead of their names."""
    classes = {type(module).__name__: type(module) for module in model.modules()}
    for name, _ in asked:
        if name not in classes:
            blocks = sorted(known for known in classes if known.endswith(("Block", "Layer")))
            raise UsageError(
                f"--injection-policy {name}=...: the model has no {name}", hint=f"one of {', '.join(blocks)}"
            )
    # DeepSpeed looks for a layer's path in its block; that of one directly in it begins with a dot.
    return {classes[n]: tuple(p if "." in p else f".{p}" for p in paths) for n, paths in asked} or None


def _probe(model: Any, source: ModelSource, device: torch.device) -> None:
    """Run a few tokens: where DeepSpeed split what it did not understand, that shows in the first forward."""
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=device), use_cache=False)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise _cannot(source, error) from error


def _cannot(source: ModelSource, error: Exception) -> UsageError:
    return UsageError(
        f"DeepSpeed-Inference cannot split {type(source.config).__name__.removesuffix('Config')}: "
        f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
        hint="name the layers with --injection-policy Block=attention.output,mlp.output, or --engine stream",
    )
