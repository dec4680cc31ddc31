"""Attention over pages against the same written out, for all that models ask of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_rows import PagedRows, StagedRows

from zeroinf.generation.attention import Scores, attend, attend_in_torch

HEADS = 4


KINDS: dict[str, Callable[..., PagedRows]] = {
    "pages": PagedRows,
    "records": StagedRows,
    "codes": partial(StagedRows, kv_dtype="int8"),
}


@given(
    kind=st.sampled_from(sorted(KINDS)),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 7, 16, 33]),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
    draw=st.data(),
)
def test_rows_attend_to_their_own_tokens_however_they_are_cut(
    kind: str, lengths: list[int], window: int | None, softcap: float | None, has_sinks: bool, draw: st.DataObject
) -> None:
    torch.manual_seed(0)
    rows = KINDS[kind](lengths, window)
    scores = Scores(0.3, softcap, torch.randn(HEADS) if has_sinks else None)
    while left := {seat: length - rows.done[seat] for seat, length in enumerate(lengths) if length > rows.done[seat]}:
        seats = draw.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        counts = {seat: draw.draw(st.one_of(st.just(1), st.integers(1, left[seat]))) for seat in seats}
        for found, expected in rows.attend(counts, scores, attend_in_torch):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_handed_over_beside_that_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Linear hands attention what packed forwards do not understand"):
        attend(torch.nn.Linear(1, 1), *(torch.zeros(1, 1, 1, 1),) * 3, None)
