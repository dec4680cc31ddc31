"""`zeroinf.ray.Generate` completes the rows of batches as Ray Data hands them over; Ray itself is not started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from zeroinf.errors import UsageError
from zeroinf.generation.row import Sampling
from zeroinf.ray import Generate
from zeroinf.runs.calls import requests_of

PROMPTS = ["one two", "three", "four five six", "seven"]


@pytest.fixture(scope="module")
def folder(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


@pytest.fixture(scope="module")
def stage(folder: Path) -> Iterator[Generate]:
    found = Generate(str(folder), max_prompt_tokens=32, max_new_tokens=8, dtype="float32", batch_size=8)
    yield found
    found._session.close()


@pytest.fixture(scope="module")
def completions(stage: Generate) -> list[str]:
    """Those of the session's own results, each prompt alone."""
    session, sampling = stage._session, Sampling(max_new_tokens=8)
    return [one.completion for prompt in PROMPTS for one in session.results(requests_of([prompt], sampling))]


def one_batch(stage: Generate, batch: Any) -> Any:
    async def whole() -> Any:
        return [each async for each in stage(batch)]

    (found,) = asyncio.run(whole())
    return found


@pytest.mark.parametrize("form", ["arrow", "numpy", "pandas"])
def test_a_batch_comes_back_in_its_form_with_completions(form: str, stage: Generate, completions: list[str]) -> None:
    columns = {"id": [7, 7, 9, 9], "prompt": PROMPTS}
    forms: dict[str, Callable[[], Any]] = {
        "arrow": lambda: pa.table(columns),
        "numpy": lambda: {name: np.array(values) for name, values in columns.items()},
        "pandas": lambda: pd.DataFrame(columns),
    }
    batch = forms[form]()
    found = one_batch(stage, batch)
    assert type(found) is type(batch)
    assert list(found["completion"].tolist() if form == "numpy" else map(str, found["completion"])) == completions
    assert [int(str(one)) for one in found["id"]] == columns["id"]


def test_a_bad_row_is_a_row_with_an_error(stage: Generate, completions: list[str]) -> None:
    batch = pa.table(
        {
            "prompt": [PROMPTS[0], None, "x" * 100, PROMPTS[1], PROMPTS[2], PROMPTS[3]],
            "max_new_tokens": [None, None, None, 9000, -1, None],
            "n": [None, None, None, None, None, 2],
        }
    )
    found = one_batch(stage, batch)
    assert found["completion"].to_pylist() == [completions[0], *[None] * 5]
    errors = found["error"].to_pylist()
    assert errors[0] is None
    for error, words in zip(errors[1:], ("prompt", "32", "9000", "max_new_tokens", "2 completions"), strict=True):
        assert words in error
    assert found.schema.field("error").type == pa.string()
    assert found.schema.field("completion_tokens").type == pa.int64()


def test_a_batch_without_a_bad_row_has_the_same_types(stage: Generate) -> None:
    found = one_batch(stage, pa.table({"prompt": PROMPTS[:1], "label": [3]}))
    assert found["error"].to_pylist() == [None]
    assert found.schema.field("error").type == pa.string()
    assert found["label"].to_pylist() == [3]


def test_rows_of_one_batch_are_under_way_before_those_of_another_have_ended(
    stage: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request ends before those of both batches were submitted."""
    under_way: list[Any] = []
    submit = stage._session.service.submit

    class Held:
        def __init__(self, handle: Any) -> None:
            self.handle = handle
            under_way.append(handle)

        def __await__(self) -> Any:
            async def both() -> Any:
                while len(under_way) < len(PROMPTS):
                    await asyncio.sleep(0.001)
                return await self.handle

            return both().__await__()

    service = SimpleNamespace(submit=lambda *given, **how: Held(submit(*given, **how)))
    monkeypatch.setattr(stage._session, "service", service)

    async def whole() -> list[Any]:
        async def all_of(batches: AsyncIterator[Any]) -> list[Any]:
            return [each async for each in batches]

        halves = (pa.table({"prompt": PROMPTS[:2]}), pa.table({"prompt": PROMPTS[2:]}))
        return await asyncio.wait_for(asyncio.gather(*(all_of(stage(half)) for half in halves)), 60)

    assert len(asyncio.run(whole())) == 2


def test_what_the_stage_does_not_know_is_refused(stage: Generate) -> None:
    with pytest.raises(UsageError, match="no setting max_token"):
        Generate("demo", max_token=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="column 'error' already"):
        one_batch(stage, pa.table({"prompt": ["x"], "error": ["y"]}))
