"""The GPU's attention over pages, by itself and under models, against the same written out and plain transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import PlainEngine, greedy_by_transformers, rows_of, run_rows
from paged_rows import PagedRows, StagedRows
from small_models import PACKED_MODELS, VOCABULARY, build_model

from zeroinf.generation.attention import Scores, kernel_for
from zeroinf.model.cache_layout import KvDtype

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
LENGTHS = [300, 90, 700, 33]
# Prompts whole and in parts, beside steps, over a window's ring.
PARTS = ({0: 200, 1: 1, 2: 500}, {0: 1, 1: 50, 2: 1, 3: 30}, {0: 60, 2: 1, 3: 1}, {0: 1, 1: 1, 2: 150, 3: 1})
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}

SHAPES = [
    ((32, 4), (128, 128), None, None, False),
    ((8, 8), (64, 64), None, None, False),
    ((8, 8), (80, 80), 100, None, False),
    ((28, 4), (128, 128), None, None, False),
    ((16, 1), (256, 256), None, 50.0, False),
    ((64, 8), (64, 64), 128, None, True),
    ((16, 16), (192, 128), None, None, False),
    ((71, 1), (64, 64), None, None, False),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "widths", "window", "softcap", "has_sinks"), SHAPES, ids=str)
def test_the_kernel_computes_what_is_written_out(
    heads: tuple[int, int],
    widths: tuple[int, int],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    rows = PagedRows(LENGTHS, window, heads=heads, widths=widths, device="cuda", dtype=dtype)
    scores = Scores(widths[0] ** -0.5, softcap, torch.randn(heads[0], device="cuda") if has_sinks else None)
    for counts in PARTS:
        for found, expected in rows.attend(counts, scores, kernel_for(CUDA)):
            assert ((found.float() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "widths", "window", "softcap", "has_sinks"), SHAPES[:6:2], ids=str)
def test_it_reads_what_was_fetched_from_host_memory(
    heads: tuple[int, int],
    widths: tuple[int, int],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    dtype: torch.dtype,
    kv_dtype: KvDtype,
) -> None:
    torch.manual_seed(0)
    rows = StagedRows(LENGTHS, window, kv_dtype, heads=heads, widths=widths, device="cuda", dtype=dtype)
    scores = Scores(widths[0] ** -0.5, softcap, torch.randn(heads[0], device="cuda") if has_sinks else None)
    for counts in (*PARTS, {2: 1}):
        for found, expected in rows.attend(counts, scores, kernel_for(CUDA)):
            assert ((found.float() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("name", PACKED_MODELS)
def test_greedy_tokens_in_float32_are_those_of_plain_transformers(name: str) -> None:
    model: Any = build_model(name).to(CUDA)
    if getattr(model.config, "attn_logit_softcapping", None):  # torch's attention knows none, which 5.17 ignores
        model.set_attn_implementation("eager")
    prompts = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(n)] for row, n in enumerate((7, 1, 40, 12))]
    rows = rows_of(prompts, [9, 12, 7, 10], ignore_eos=True)
    run_rows(PlainEngine(model), rows, rows=3, pages=9, draw=2, prefill_tokens=20, forward_tokens=13)
    assert [row.generated for row in rows] == [greedy_by_transformers(model, row.prompt, row.generated) for row in rows]
