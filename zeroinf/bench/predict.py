"""Predicts the duration of benchmark cells before any has run, from the planner's timing.

Input: a cell and the benchmark's settings. Output: seconds and tokens/s. No weights are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from zeroinf.bench.matrix import BenchmarkSettings, Cell
from zeroinf.bench.prompt import prompt_tokens
from zeroinf.engines.registry import descriptor_of
from zeroinf.errors import ZeroinfError
from zeroinf.hardware.snapshot import read_machine
from zeroinf.options.options import PlanOptions
from zeroinf.options.plan_input import plan_input_of
from zeroinf.simulation.make_plan import make_plan

# A process with its imports, a rank's start, and the way out: seconds seen on machines with and without GPUs.
_START_S = 12.0
_WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The predicted duration of one cell, in seconds; None if the planner cannot predict it, with the reason in
    `words`.
    """

    seconds: float | None
    tokens_per_second: float | None
    words: str = ""


def predict(cell: Cell, settings: BenchmarkSettings) -> Prediction:
    """Predict the duration of `cell` in seconds, all repetitions and the warm-up included."""
    engine = descriptor_of(cell.engine_name)
    if not engine.is_timed:
        return Prediction(seconds=None, tokens_per_second=None, words="the planner has no model of the engine")
    _, _, fetch = cell.engine.partition("/")
    has_gpu = bool(read_machine().gpus)
    places = (
        descriptor_of(cell.engine_name).places_blocks and cell.offload != "none" and settings.resident_blocks != "auto"
    )
    try:
        options = PlanOptions(
            model=cell.model,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            engine=cell.engine_name,
            offload=cell.offload,  # type: ignore[arg-type]
            batch_size=cell.batch_size,
            resident_blocks=int(settings.resident_blocks) if places else None,
            requests=cell.batch_size * cell.num_gpus,
            input_len=prompt_tokens(cell, settings),
            output_len=cell.output_len,
            nvme_paths=settings.nvme_paths if cell.offload == "nvme" else (),
        )
        if fetch:
            options = replace(options, fetch=fetch)  # type: ignore[arg-type]
        if has_gpu and settings.device == "cpu":
            options = replace(options, num_gpus=0)
        elif has_gpu:
            options = replace(options, num_gpus=cell.num_gpus, gpu_memory=settings.gpu_memory)
        timing = make_plan(plan_input_of(options)).plan.timing
    except ZeroinfError as error:
        return Prediction(seconds=_START_S, tokens_per_second=None, words=error.message)
    assert timing is not None
    once = timing.prefill_s + (cell.output_len - 1) * timing.decode_s
    warm_up = timing.prefill_s + _WARM_UP_STEPS * timing.decode_s
    return Prediction(
        seconds=_START_S + timing.load_s + warm_up + settings.repetitions * once,
        tokens_per_second=timing.tokens_per_second,
    )
