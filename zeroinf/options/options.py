"""The options of a run, as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zeroinf.generation.row import Sampling
from zeroinf.jobs.export import OutputFormat
from zeroinf.jobs.formats import InputFormat
from zeroinf.jobs.shape import Shape
from zeroinf.model.anatomy import KvDtype
from zeroinf.planner.choice import Fetch, Offload
from zeroinf.planner.kv import Kv
from zeroinf.planner.plan import AioSettings, TensorParallel
from zeroinf.planner.wire import Wire


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """One run, as asked for on the command line; nothing is resolved yet."""

    model: str
    sampling: Sampling
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    random_weights: bool = False
    engine: str = "auto"
    fetch: Fetch | Literal["auto"] = "auto"
    resident_blocks: int | None = None
    wire: Wire = "model"
    kv: Kv = "auto"
    kv_dtype: KvDtype = "model"
    offload: Offload | Literal["auto"] = "auto"
    nvme_paths: tuple[Path, ...] = ()
    pin_memory: bool = True
    aio: AioSettings = field(default_factory=AioSettings)
    zero_config: Path | None = None
    tensor_parallel: TensorParallel = field(default_factory=lambda: TensorParallel(size=0))
    prompts: tuple[str, ...] = ()
    input_files: tuple[str, ...] = ()
    input_format: InputFormat = "auto"
    shape: Shape = field(default_factory=Shape)
    output_file: Path | None = None
    output_format: OutputFormat = "auto"
    to_stdout: bool = False
    """Write JSON lines to standard output; without it and a file, in=/out= pairs go there."""
    overwrite: bool = False
    resume: bool = False
    resume_anyway: bool = False
    """Go on although the job is not the same; with `resume`."""
    resume_command: str = ""
    """What the user types to go on with this run."""
    max_error_rate: float = 1.0
    """The largest share of the requests that may be refused."""
    batch_size: int | None = None
    micro_batch_rows: int | None = None
    static_batches: bool = False
    gpu_memory_bytes: int | None = None
    """The most that each rank may take of its GPU."""
    host_memory_bytes: int | None = None
    benchmark: bool = False
    repetitions: int = 1
    """How often the same requests are run, each time measured; the last one's results are kept."""
    sampling_only: tuple[str, ...] = ()
    """Flags the user gave that mean something only where a row samples."""
