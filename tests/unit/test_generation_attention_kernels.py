"""The GPU's attention over pages, interpreted on the CPU: `TRITON_INTERPRET=1`, with Triton and a numpy before 2.4."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from paged_rows import PagedRows, StagedRows

from zeroinf.generation.attention import Scores, attend_in_torch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs TRITON_INTERPRET=1 and Triton",
)
HEADS = 4
KINDS: dict[str, Callable[..., PagedRows]] = {
    "pages": PagedRows,
    "records": StagedRows,
    "codes": partial(StagedRows, kv_dtype="int8"),
}
PARTS = ({0: 20, 1: 1}, {0: 1, 1: 1, 2: 30}, {0: 17, 2: 1}, {0: 5, 1: 18, 2: 2}, {0: 1})


@pytest.mark.parametrize(
    "scores", [Scores(0.3, None, None), Scores(0.3, 2.0, torch.randn(HEADS))], ids=["plain", "all"]
)
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("window", [None, 7, 33])
def test_rows_attend_to_their_own_tokens_however_they_are_cut(kind: str, window: int | None, scores: Scores) -> None:
    from zeroinf.generation.attention_kernels import attend_on_gpu

    torch.manual_seed(0)
    rows = KINDS[kind]([50, 20, 33], window)
    for counts in PARTS:
        for found, expected in rows.attend(counts, scores, attend_on_gpu):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("window", [None, 700])
def test_few_rows_with_long_contexts_share_their_keys_among_programs(kind: str, window: int | None) -> None:
    from zeroinf.generation.attention_kernels import attend_on_gpu

    torch.manual_seed(0)
    rows, scores = KINDS[kind]([1200, 900, 40], window), Scores(0.3, None, torch.randn(HEADS))
    for counts in ({0: 1198, 1: 899, 2: 39}, {0: 1, 1: 1}, {0: 1, 2: 1}):
        kernel = attend_in_torch if counts[0] > 1 else attend_on_gpu
        for found, expected in rows.attend(counts, scores, kernel):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_kernels_compile_for_rows_without_tokens() -> None:
    from generating import anatomy_of
    from small_models import build_model

    from zeroinf.generation.attention_kernels import attend_on_gpu
    from zeroinf.generation.warm_up import attention_compilations
    from zeroinf.model.inspect import build_meta

    model = build_model("gpt_oss")
    given = {"row_tokens": 2000, "pages": True, "kernel": attend_on_gpu}
    for dtype in ("model", "int8"):
        for each in attention_compilations(
            build_meta(model.config, "float32"), anatomy_of(model), torch.device("cpu"), kv_dtype=dtype, **given
        ):
            each()


@pytest.mark.parametrize("fetch", [True, False])
def test_runs_of_records_are_copied_between_the_sides_of_the_link(fetch: bool) -> None:
    from zeroinf.generation.attention_kernels import copy_runs

    torch.manual_seed(0)
    host, staged = (torch.randint(0, 255, (count, 48), dtype=torch.uint8) for count in (900, 800))
    runs = torch.tensor([[0, 300, 500], [510, 0, 1], [520, 10, 200]])
    expected = (staged if fetch else host).clone()
    for at, place, count in runs.tolist():
        if fetch:
            expected[at : at + count] = host[place : place + count]
        else:
            expected[place : place + count] = staged[at : at + count]
    source, target = (host, staged) if fetch else (staged, host)
    copy_runs(source, target, runs, fetch=fetch)
    assert torch.equal(target, expected)
