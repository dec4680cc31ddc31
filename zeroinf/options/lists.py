"""Reads which of a plan's options is a list, of models or of GPUs, before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from zeroinf.errors import UsageError
from zeroinf.hardware.presets import gpu_names, load_machine, with_gpu
from zeroinf.hardware.rates import Rates
from zeroinf.hardware.snapshot import read_machine
from zeroinf.model.catalog import catalog_names
from zeroinf.model.resolve import check_name
from zeroinf.options.options import PlanOptions

Listed = Literal["model", "gpu"]


def listed(options: PlanOptions) -> tuple[Listed | None, tuple[str, ...]]:
    """The option that is a list, and the names in it; None: neither is.

    Raises UsageError where both are, or a GPU is not known, and ModelError for a model that cannot be.
    """
    models = catalog_names() if options.model == "all" else _parts(options.model)
    models = (options.model,) if Path(options.model).exists() else models
    gpus = gpu_names() if options.gpu == "all" else _parts(options.gpu or "")
    if len(models) > 1 and len(gpus) > 1:
        raise UsageError("many models and many GPUs: one of them makes a table", hint="name one --model, or one --gpu")
    machine = None if options.machine is None else load_machine(options.machine).machine
    for gpu in gpus:
        with_gpu(machine or read_machine(), Rates(), gpu)
    if len(models) > 1:
        for model in models:
            check_name(model, options.revision, random_weights=options.revision is None)
        return "model", models
    return ("gpu", gpus) if len(gpus) > 1 else (None, ())


def _parts(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
