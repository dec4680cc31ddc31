"""Finds the model that options name: its source and, on the meta device, its anatomy."""

from __future__ import annotations

from zeroinf.model.anatomy import Anatomy
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.model.source import ModelSource, pick_dtype
from zeroinf.options.contradictions import engine_of
from zeroinf.options.options import ConfigOptions, ModelOptions, PlanOptions, RunOptions
from zeroinf.planner.descriptor import expands_once, needs_full_weights


def source_of(options: RunOptions | PlanOptions | ConfigOptions, device: str) -> ModelSource:
    """The source of the model. Without a run only shapes are wanted, so the catalog's will do; it knows no
    revisions."""
    in_full = isinstance(options, ConfigOptions) or needs_full_weights(engine_of(options)[0], options.wire)
    return resolve_model(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        random_weights=options.random_weights if isinstance(options, RunOptions) else options.revision is None,
        in_full=in_full,
        expands_once=expands_once(device, options.offload),
    )


def anatomy_of(options: ModelOptions, source: ModelSource, device: str) -> Anatomy:
    """Every tensor of the model, in the dtype that was asked for on a `device` ("cuda" or "cpu")."""
    return read_anatomy(
        source.config,
        dtype=pick_dtype(options.dtype, source, device),
        trust_remote_code=options.trust_remote_code,
    )
