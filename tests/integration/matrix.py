"""Many (checkpoint, offload) cells in one process group, and what plain transformers makes of the same batches."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from conftest import SharedFolder
from forked import SERVER

from zeroinf.distributed.ports import free_port

BATCH_SIZE = 4
NEW_TOKENS = 12
# Of models of 100 MB and more, which take ranks on two cores seconds a token.
FEW_TOKENS = 4
# Uneven on purpose: every batch is padded, and the last one is not full.
PROMPTS = (
    "One",
    "A prompt of some length, so that its neighbours are padded",
    "Two words",
    "The quick brown fox",
    "x",
    "Numbers: 1 2 3 4 5 6 7 8 9",
    "a b",
    "Once upon a time there was a model that did not fit",
    "The end",
    "Water",
    "def f(n):",
)
DRIVER_TIMEOUT_S = 1200
"""Of all cells of a matrix together, on a machine that does much else."""

# DeepSpeed keeps what is smaller than 1 MiB a rank in host memory: these widths make weights that really go to disk.
_WIDE = {
    "gpt_neox": {"intermediate_size": 1536},
    "llama": {"intermediate_size": 1536, "head_dim": 192},
    "opt": {"ffn_dim": 1536, "word_embed_proj_dim": 768},
    "bloom": {},
    "mixtral": {"intermediate_size": 768, "head_dim": 192},
}
WIDE_HIDDEN = 768
WIDE_ARCHITECTURES = tuple(_WIDE)


@dataclass(frozen=True)
class Cell:
    """One run of the driver."""

    model: str
    offload: str
    engine: str = "zero"
    fetch: str = "auto"
    batch_size: int | None = BATCH_SIZE
    """None leaves it to the planner."""
    parallel: tuple[tuple[str, Any], ...] = ()
    """What the driver takes as "parallel"."""
    dtype: str = "auto"

    @property
    def name(self) -> str:
        words = (Path(self.model).name, self.engine, self.offload, self.fetch, self.batch_size)
        return "-".join(map(str, (*words, *(name for name, _ in self.parallel))))


@dataclass(frozen=True)
class Answer:
    """A cell's tokens from all ranks together, by request."""

    tokens: dict[int, list[int]]
    finish: dict[int, str]
    rows_by_rank: list[list[int]]
    forwards: list[int]
    bytes_on_disk: int
    partitioned: bool
    prompts: list[list[int]]
    batch_size: int
    pad_token: int


def make_wide_checkpoint(architecture: str, folder: Path) -> None:
    """A two-layer model with weights of more than 1 MiB, whose end-of-sequence token ends some of PROMPTS midway."""
    import torch
    from small_models import build_tokenizer, small_config
    from transformers import AutoModelForCausalLM

    small = small_config(architecture)
    fields = {**small.to_dict(), **_WIDE[architecture]}
    for name in ("hidden_size", "num_hidden_layers"):
        fields.pop(small.attribute_map.get(name, name), None)
    fields.pop("layer_types", None)
    config = type(small)(**{**fields, "hidden_size": WIDE_HIDDEN, "num_hidden_layers": 2})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Blocks outweigh what a token brings along: otherwise tied embeddings repeat it for ever.
                parameter.normal_(std=(1 if "embed" in name else 4) / WIDE_HIDDEN**0.5)
    tokenizer = build_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = plain_tokens(model, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS], tokenizer.pad_token_id)
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [own, _token_that_ends_some_rows_midway(rows)]
    model.generation_config.save_pretrained(folder)


def _token_that_ends_some_rows_midway(rows: Sequence[Sequence[int]]) -> int:
    def rows_with(token: int) -> int:
        return sum(token in row[2:-2] and token not in row[:2] for row in rows)

    candidates = {token for row in rows for token in row[2:-2]}
    ending = [token for token in sorted(candidates) if sum(token in row for row in rows) < len(rows)]
    assert ending, "random weights that always end alike: choose another seed"
    return min(ending, key=lambda token: abs(rows_with(token) - len(rows) // 2))


def plain_tokens(
    model: Any, prompts: Sequence[Sequence[int]], pad: int, batch_size: int = BATCH_SIZE, new_tokens: int = NEW_TOKENS
) -> list[Any]:
    """Greedy tokens of transformers' own `generate`, batch by batch in input order; padding after the end cut off."""
    import torch

    rows: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
            )  # fmt: skip
        rows.extend(_cut(row, model.generation_config.eos_token_id) for row in out[:, width:].tolist())
    return rows


def _cut(row: list[int], eos: int | list[int] | None) -> list[int]:
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    return row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]


@cache
def expected(
    model: str, prompts: tuple[tuple[int, ...], ...], pad: int, batch_size: int, dtype: str
) -> list[list[int]]:
    """What plain transformers generates from the checkpoint folder `model`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    return plain_tokens(plain, prompts, pad, batch_size, _new_tokens(model))


def _new_tokens(model: str) -> int:
    nbytes = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    return FEW_TOKENS if nbytes >= 100_000_000 else NEW_TOKENS


def drive(folder: Path, cells: Sequence[Cell], ranks: int) -> None:
    """Run `cells` on `ranks` ranks; results and what went wrong are left in `folder`."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    listed = []
    for cell in cells:
        nvme_path = folder / "nvme" / cell.name
        nvme_path.mkdir(parents=True)
        listed.append(
            {
                "name": cell.name,
                "model": cell.model,
                "engine": cell.engine,
                "offload": cell.offload,
                "fetch": cell.fetch,
                "nvme_path": str(nvme_path) if cell.offload == "nvme" else str(folder / "nvme"),
                "input": str(prompts),
                "batch_size": cell.batch_size,
                "max_new_tokens": _new_tokens(cell.model),
                "parallel": dict(cell.parallel),
                "dtype": cell.dtype,
            }
        )
    (folder / "cells.json").write_text(json.dumps(listed))
    port = str(free_port())
    own_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja
    files = (str(folder / "cells.json"), str(folder / "results.json"))
    processes = []
    for rank in range(ranks):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        env = {"PATH": own_path, "MASTER_PORT": port, **{name: str(value) for name, value in launched.items()}}
        processes.append(SERVER.Process(target=_drive, args=(env, folder / f"log-{rank}.txt", files)))
        processes[-1].start()
    deadline = time.monotonic() + DRIVER_TIMEOUT_S
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    if any(process.exitcode is None for process in processes):
        (folder / "hung").touch()
    for process in processes:
        process.kill()
        process.join()


def _drive(env: Mapping[str, str], log: Path, files: tuple[str, str]) -> None:
    """One rank's process."""
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.update(env)
    import driver

    driver.main(*files)


class Driven:
    """Cells that run in one group of processes once one of them is asked for, those of the full tier in another."""

    def __init__(
        self, name: str, cells: Sequence[Cell], default: Sequence[Cell], ranks: int, shared: SharedFolder
    ) -> None:
        self._groups = {
            name: [cell for cell in cells if cell in default],
            f"{name}-full": [cell for cell in cells if cell not in default],
        }
        self._ranks, self._shared = ranks, shared

    def folder(self, cell: Cell) -> Path:
        """Where what came of `cell` and of its group lies."""
        name, cells = next((name, cells) for name, cells in self._groups.items() if cell in cells)
        return self._shared(f"driven-{name}", lambda folder: drive(folder, cells, self._ranks))

    def answer(self, cell: Cell) -> Answer:
        """What was found for `cell`."""
        return answer(self.folder(cell), cell)


def answer(folder: Path, cell: Cell) -> Answer:
    """What `drive` found for `cell`."""
    results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").is_file() else {}
    logs = "\n".join(log.read_text()[-2000:] for log in sorted(folder.glob("log-*.txt")))
    assert cell.name in results, f"{cell.name} {'hung' if (folder / 'hung').exists() else 'was not reached'}:\n{logs}"
    parts = results[cell.name]["ranks"]
    assert not any("error" in part for part in parts), "\n".join(part.get("error", "") for part in parts)
    if cell.engine == "tensor-parallel":  # one stream
        assert all(part["tokens"] == parts[0]["tokens"] for part in parts)
        parts = parts[:1]
    rows = [index for part in parts for index in part["tokens"]]
    assert len(rows) == len(set(rows)), "a request was answered twice"
    return Answer(
        tokens={int(index): tokens for part in parts for index, tokens in part["tokens"].items()},
        finish={int(index): reason for part in parts for index, reason in part["finish"].items()},
        rows_by_rank=[sorted(int(index) for index in part["tokens"]) for part in parts],
        forwards=[part["forwards"] for part in parts],
        bytes_on_disk=parts[0]["bytes_on_disk"],
        partitioned=all(part["partitioned"] for part in parts),
        prompts=parts[0]["prompts"],
        batch_size=parts[0]["batch_size"],
        pad_token=parts[0]["pad_token"],
    )


def wide_checkpoint(shared_folder: SharedFolder, architecture: str) -> Path:
    """The wide checkpoint, made once a session."""
    return shared_folder(f"wide-{architecture}", lambda folder: make_wide_checkpoint(architecture, folder))


def check_tokens(found: Answer, model: str, dtype: str = "auto") -> None:
    """Every request is answered with the tokens of plain transformers on the same batches."""
    prompts = tuple(map(tuple, found.prompts))
    assert len(prompts) == len(PROMPTS)
    wanted = expected(model, prompts, found.pad_token, found.batch_size, dtype)
    assert [found.tokens[index] for index in sorted(found.tokens)] == wanted
