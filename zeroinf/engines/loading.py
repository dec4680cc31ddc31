"""Loads the engine that a plan names. Only that engine's libraries are imported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import Engine, LoadListener
from zeroinf.engines.registry import descriptor_of
from zeroinf.errors import ModelError
from zeroinf.model.anatomy import UNTIED
from zeroinf.model.checkpoint import read_facts
from zeroinf.model.reading import reading_weights
from zeroinf.model.source import CheckpointFacts, ModelSource
from zeroinf.model.weights import weight_files
from zeroinf.planner.plan import Plan

_NAMED = 3


def load_engine(
    plan: Plan,
    source: ModelSource,
    zero_config: dict[str, Any] | None,
    control: Control,
    device: torch.device,
    listener: LoadListener,
) -> Engine:
    """Load the plan's engine, and tell `listener` how it goes. Only its own libraries are imported.

    Raises ModelError for weights that are damaged, incomplete, or that would run code, whichever engine reads them.
    """
    if not source.random_weights:
        source = replace(source, facts=_account_for_weights(source, control, listener))
    with reading_weights(source.name):
        engine: Engine = descriptor_of(plan.engine).load(plan, source, zero_config, control, device, listener)
        return engine


def _account_for_weights(source: ModelSource, control: Control, listener: LoadListener) -> CheckpointFacts:
    """The facts of the checkpoint; weights that were not on this machine when the model was looked up are fetched and
    checked."""
    facts = source.facts
    if facts is None:
        listener.fetching(source.name)
        if control.world.local_rank == 0:
            weight_files(source)  # one rank of a node fetches what has to be fetched
        control.all_gather(None)
        files = weight_files(source)
        listener.doing("loading weights")
        facts = read_facts(source.name, source.config, files, trust_remote_code=source.trust_remote_code)
        if set(facts.untied) != set(getattr(source.config, UNTIED, ())):
            raise ModelError(
                f"{source.name} stores {', '.join(facts.untied) or 'all tied weights'} otherwise than its config says, "
                "so its plan is wrong",
                hint="run the same command again: its files are in the cache now, and are read before planning",
            )
    if facts.unused and control.world.is_main:
        named = ", ".join(facts.unused[:_NAMED]) + (", ..." if facts.unused[_NAMED:] else "")
        listener.note(f"the model does not use {len(facts.unused)} stored tensors: {named}")
    return facts
