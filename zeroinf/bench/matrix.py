"""Defines the benchmark matrix: presets, cells (one run each), and the layout of the resulting table.

Input: the lists given on the command line. Output: `Cell`s and `BenchmarkSettings`. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from zeroinf.engines.registry import ENGINE_NAMES, descriptor_of
from zeroinf.errors import UsageError
from zeroinf.planner.choice import Fetch
from zeroinf.sizes import Share

PYTHIA = ("pythia-70m", "pythia-160m", "pythia-410m", "pythia-1b", "pythia-1.4b", "pythia-2.8b", "pythia-6.9b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run: what makes it another one than its neighbours."""

    engine: str
    """`stream/replicated` and `stream/partitioned` name a fetch, too."""
    model: str
    offload: str
    batch_size: int
    """Rows of each stream."""
    input_len: int | None
    """None: the prompt that was given."""
    output_len: int
    num_gpus: int

    @property
    def key(self) -> str:
        """A key that the same cell has in every file."""
        return "|".join(str(value) for value in asdict(self).values())

    @property
    def engine_name(self) -> str:
        return self.engine.partition("/")[0]

    @property
    def name(self) -> str:
        """Engine and offload, as a legend shows them."""
        return self.engine if self.offload == "none" else f"{self.engine} ({self.offload})"


_WORDS = {
    "model": "{}",
    "num_gpus": "{} GPUs",
    "batch_size": "{} rows",
    "input_len": "{} in",
    "output_len": "{} out",
}


def label(cell: Cell, cells: Sequence[Cell], first: str, besides: Sequence[str]) -> str:
    """`cell`'s field `first`, and all else that tells `cells` apart except for the fields `besides`."""
    apart = [
        word.format(getattr(cell, name))
        for name, word in _WORDS.items()
        if name not in (first, *besides) and len({getattr(other, name) for other in cells}) > 1
    ]
    return ", ".join([str(getattr(cell, first)), *apart])


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """The lists whose product is run."""

    engines: tuple[str, ...] = ("stream",)
    models: tuple[str, ...] = ()
    offloads: tuple[str, ...] = ("cpu",)
    batch_sizes: tuple[int, ...] = (1,)
    input_lens: tuple[int | None, ...] = (128,)
    output_lens: tuple[int, ...] = (32,)
    num_gpus: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for engine in self.engines:
            name, _, fetch = engine.partition("/")
            fetches = get_args(Fetch) if name in ENGINE_NAMES and "fetch" in descriptor_of(name).options else ()
            if name not in ENGINE_NAMES or (fetch and fetch not in fetches):
                raise UsageError(
                    f"--engines: no engine {engine!r}",
                    hint=f"of {', '.join(ENGINE_NAMES)}, stream/replicated, stream/partitioned",
                )

    def cells(self) -> list[Cell]:
        """Model by model. Engines that keep all weights on the GPU have one cell whatever the offload targets; a fetch
        needs several GPUs. Raises UsageError for an engine that has no cell."""
        lists = (self.models, self.num_gpus, self.input_lens, self.output_lens, self.engines)
        found = []
        for model, gpus, input_len, output_len, engine in product(*lists):
            possible = descriptor_of(engine.partition("/")[0]).offloads
            offloads = self.offloads if len(possible) > 1 else possible
            for offload, rows in product(offloads, self.batch_sizes):
                if "/" in engine and gpus == 1:
                    continue
                found.append(
                    Cell(
                        engine=engine,
                        model=model,
                        offload=offload,
                        batch_size=rows,
                        input_len=input_len,
                        output_len=output_len,
                        num_gpus=gpus,
                    )
                )
        if idle := [engine for engine in self.engines if engine not in {cell.engine for cell in found}]:
            raise UsageError(f"--engines {idle[0]} has no cell: one GPU has no fetch", hint="add --num-gpus 2")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSettings:
    """Settings that every cell of a benchmark shares."""

    repetitions: int = 3
    dtype: str = "auto"
    random_weights: bool = False
    trust_remote_code: bool = False
    resident_blocks: str = "0"
    """A number, or `auto`: the planner's choice."""
    nvme_paths: tuple[Path, ...] = ()
    gpu_memory: int | Share | None = None
    prompt: str | None = None
    """Every row's; None makes one of the length asked for."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    cell_limit_s: float = 600.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "nvme_paths": [str(path) for path in self.nvme_paths]}


@dataclass(frozen=True, slots=True)
class TableLayout:
    """A table's layout: the cell fields that name its rows and columns, and the figure it shows."""

    rows: str
    columns: str
    figure: str


@dataclass(frozen=True, slots=True)
class _Preset:
    matrix: dict[str, Any]
    layout: TableLayout | None


# Prompts and completions have the lengths of the originals: a sentence and 100 tokens, two words and 50.
PRESETS: dict[str, _Preset] = {
    "bloom-table": _Preset(
        {
            "engines": ("accelerate", "tensor-parallel", "zero", "stream"),
            "batch_sizes": (1, 8, 16, 32, 64, 128),
            "input_lens": (10,),
            "output_lens": (100,),
        },
        TableLayout("name", "batch_size", "ms_per_token"),
    ),
    "pythia-hf-vs-ds": _Preset(
        {
            "engines": ("resident", "tensor-parallel", "stream"),
            "models": PYTHIA,
            "offloads": ("none",),
            "input_lens": (4,),
            "output_lens": (50,),
        },
        TableLayout("model", "name", "ms_per_token"),
    ),
    "mii": _Preset({"engines": ("resident", "tensor-parallel", "stream"), "offloads": ("none",)}, None),
}


def with_preset(preset: str | None, lists: dict[str, Sequence[Any] | None]) -> Matrix:
    """The matrix of `lists`, of which those left None are the preset's. Raises UsageError without a model."""
    matrix = Matrix(
        **{**(PRESETS[preset].matrix if preset else {}), **{name: tuple(v) for name, v in lists.items() if v}}
    )
    if not matrix.models:
        raise UsageError("no model to run", hint="--model NAME, --models A,B or --models-dir FOLDER")
    return matrix
