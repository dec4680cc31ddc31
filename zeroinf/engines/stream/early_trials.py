"""Tries kernels on a thread of its own while weights are loaded.

A kernel is compiled and compared with what it should compute before a model uses it, which takes seconds for each. The
thread asks for the verdicts that an engine will ask for once its weights are there; nothing of the model is changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from zeroinf.compat.models import is_experts
from zeroinf.engines.stream.experts import coded_experts, kind_of
from zeroinf.engines.stream.norms import norm_kernel_runs
from zeroinf.engines.stream.products import expert_products, product_on_codes
from zeroinf.engines.stream.tensor_groups import TensorGroup
from zeroinf.planner.wire import Codes


def begin_trials(model: Any, groups: Sequence[TensorGroup], kind: Codes | None, device: torch.device) -> None:
    """Begin to try the kernels for `model` on `device`, whose weights cross as codes of `kind` or (None) as they are.

    Whoever asks for a verdict before it is there waits for it, and is told of errors.
    """
    verdicts: list[Callable[[], object]] = [
        partial(norm_kernel_runs, device, model.dtype),
        partial(product_on_codes, device, groups),
    ]
    if any(map(is_experts, model.modules())):
        kinds: set[Any] = {kind_of(module) for module in coded_experts(model)} or {kind}
        verdicts += [partial(expert_products, device, model.dtype, own) for own in kinds]
    threading.Thread(target=_ask, args=(verdicts, device), name="zeroinf-trials", daemon=True).start()


def _ask(verdicts: Sequence[Callable[[], object]], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # threads have one each
    for verdict in verdicts:
        with suppress(Exception):  # it is raised again where the verdict is needed
            verdict()
