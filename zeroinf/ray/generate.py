"""Completes the rows of a Ray Data dataset: `Generate` is a stage for `Dataset.map_batches`."""

from __future__ import annotations

import asyncio
import os
import sys
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

from zeroinf.compat.imports import quicken_imports
from zeroinf.errors import DoesNotFitError, InputError, UsageError
from zeroinf.paths import cache_directory

if TYPE_CHECKING:
    from zeroinf.jobs.shape import Shaper
    from zeroinf.model.anatomy import Anatomy
    from zeroinf.model.source import ModelSource
    from zeroinf.runs.session import Session
    from zeroinf.service.handles import Handle
    from zeroinf.service.requests import Request

Batch = TypeVar("Batch")
"""A pyarrow.Table, a pandas.DataFrame or a dict of NumPy arrays: what `batch_format` asks Ray for."""

_TYPES = {
    **dict.fromkeys(("completion", "finish_reason"), "string"),
    **dict.fromkeys(("prompt_tokens", "completion_tokens"), "int64"),
    "error": "string",
}
"""The output columns, and their types in Arrow."""


class GenerateSettings(TypedDict, total=False):
    """Settings of all rows, with the names and meanings of `zeroinf.pipeline` and of its calls."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    response_format: Mapping[str, Any]
    json_schema: Any
    regex: str
    choices: Sequence[str]
    engine: str
    offload: str
    nvme_paths: Sequence[str]
    fetch: str
    batch_size: int
    micro_batch_rows: int
    wire: str
    kv: str
    kv_dtype: str
    kv_attention: str
    resident_blocks: int
    gpu_memory: int | str
    host_memory: int | str
    pin_memory: bool
    dtype: str
    revision: str
    trust_remote_code: bool
    random_weights: bool


_CALL = {
    **dict.fromkeys(("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias")),
    **dict.fromkeys(("response_format", "json_schema", "regex", "choices")),
    "stop": (),
    "stop_token_ids": (),
    "min_tokens": 0,
    "ignore_eos": False,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
_MOST_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class _Answer:
    """The output columns of one row, in their order."""

    completion: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Started:
    """A row's request on its way."""

    request: Request
    handle: Handle


class Generate:
    """A stage of Ray Data: one loaded model for all batches that its actor gets.

        dataset.map_batches(
            Generate,
            fn_constructor_kwargs={"model": "meta-llama/Llama-2-13b-hf", "max_new_tokens": 64},
            batch_size=256,
            concurrency=4,         # nodes: one model each
            num_gpus=8,            # all of a node's, so that a node has one copy of the weights
            max_concurrency=4,     # blocks of a dataset that overlap in an actor
        )

    Rows are read as those of a table that `zeroinf run -i` reads: columns that are named as settings (`max_new_tokens`,
    `temperature`, `seed`, ...) hold for their row. The batch comes back with columns `completion`, `finish_reason`,
    `prompt_tokens`, `completion_tokens` and `error`; where a row cannot be completed, `error` says why and the others
    are null. Batches share the model's passes: rows of one enter as those of another end. A sampled completion depends
    on the prompt and the seed alone.
    """

    def __init__(
        self,
        model: str,
        *,
        max_prompt_tokens: int = 512,
        prompt_column: str | None = None,
        messages_column: str | None = None,
        template: str | None = None,
        chat: bool = False,
        system: str | None = None,
        **settings: Unpack[GenerateSettings],
    ) -> None:
        """Load `model` on all GPUs of this process. `max_prompt_tokens` and `max_new_tokens` (128) are planned for:
        longer rows are errors of their own.

        The prompt is in `prompt_column` ("prompt"), chat messages are in `messages_column` ("messages"), or `template`
        (Jinja2) makes the prompt of a row's columns; with `chat`, prompts become user messages below `system`. Raises
        UsageError for settings that there are not or that mean nothing, and whatever `zeroinf.pipeline` raises.
        """
        quicken_imports(cache_directory())
        from zeroinf.jobs.shape import EntryShape, Shaper
        from zeroinf.options.definition import from_keywords
        from zeroinf.options.options import LoadOptions, RunOptions
        from zeroinf.planner.workload import Lengths
        from zeroinf.ray.node import ranks_here, within_ray
        from zeroinf.runs.calls import sampling_of
        from zeroinf.runs.progress import ProgressObserver
        from zeroinf.runs.session import open_session

        if unknown := sorted(settings.keys() - GenerateSettings.__annotations__.keys()):
            raise UsageError(f"Generate has no setting {', '.join(unknown)}", hint="see zeroinf.ray.GenerateSettings")
        self._sampling = sampling_of({**_CALL, **settings}, _MOST_NEW_TOKENS)
        shape = EntryShape(
            prompt_column=prompt_column, messages_column=messages_column, template=template, chat=chat, system=system
        )
        self._shaper: Shaper = Shaper(shape)
        given = {"model": model, **settings}
        options = within_ray(from_keywords(RunOptions, given, LoadOptions, sampling=self._sampling))

        def lengths(source: ModelSource, anatomy: Anatomy) -> Lengths:
            return Lengths.up_to(
                anatomy,
                max_prompt_tokens,
                self._sampling.max_new_tokens,
                rows=options.batch_size,
                sampled=True,
                penalized=True,
                structured=True,
            )

        self._session: Session = open_session(options, lengths, None, ProgressObserver(shown=False), ranks_here())

    async def __call__(self, batch: Batch) -> AsyncIterator[Batch]:
        """The batch with the output columns. Raises UsageError where it has one of that name already."""
        names, rows = _rows_of(batch)
        if taken := [name for name in _TYPES if name in names]:
            raise UsageError(f"the dataset has a column {taken[0]!r} already", hint="rename it: rename_columns")
        started = await asyncio.to_thread(self._submit, rows)
        answers = [each if isinstance(each, _Answer) else await self._answer(each) for each in started]
        yield _with_columns(batch, {name: [getattr(one, name) for one in answers] for name in _TYPES})

    def _submit(self, rows: Sequence[dict[str, Any]]) -> list[_Answer | _Started]:
        """Each row's request on its way, or what is wrong with it."""
        from zeroinf.generation.settings import refuse_sampling
        from zeroinf.jobs.shape import LineError

        found: dict[int, _Answer | _Started] = {}
        requests: list[Request] = []
        for number, row in enumerate(rows):
            try:
                requests.append(self._request(number, row))
            except LineError as error:
                found[number] = _Answer(error=str(error))
        model = self._session.model
        cannot_sample = refuse_sampling(model.engine.model.generation_config)
        for request, tokens in zip(requests, model.codec.encode_all(requests), strict=True):
            if isinstance(tokens, ValueError):
                found[request.index] = _Answer(error=str(tokens))
            elif cannot_sample is not None and not request.sampling.is_greedy:
                found[request.index] = _Answer(error=cannot_sample)
            else:
                found[request.index] = self._start(request, tokens)
        return [found[number] for number in range(len(rows))]

    def _request(self, number: int, row: dict[str, Any]) -> Request:
        """Raises LineError for a row that cannot be run."""
        from zeroinf.jobs.entries import draft_of
        from zeroinf.jobs.formats import InputRecord
        from zeroinf.jobs.readers import choices_of
        from zeroinf.jobs.shape import LineError

        entry = {name: value for name, value in row.items() if name != "id" or self._shaper.uses(name)}
        draft = draft_of(InputRecord(number + 1, "row", entry), self._sampling, self._shaper)
        if draft.choices != 1:
            raise LineError(f"{draft.choices} completions are asked for, and a row has one")
        if draft.sampling.logprobs is not None:
            raise LineError("logprobs is not supported: the output has no column for them")
        return next(choices_of(draft, number, None, None, str(number)))

    def _start(self, request: Request, tokens: Sequence[int]) -> _Answer | _Started:
        try:
            handle = self._session.service.submit(array("i", tokens), request.sampling, priority="batch")
        except InputError as error:
            return _Answer(error=error.message)
        return _Started(request, handle)

    async def _answer(self, started: _Started) -> _Answer:
        """What came of a request. Where the model itself fails, Ray starts this actor anew, and its blocks again."""
        try:
            found = await started.handle
        except DoesNotFitError:
            raise
        except Exception as error:
            print(f"error: {error}; the actor ends, for Ray to start it again", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)
        result = self._session.result(found, started.request)
        if result.failed:
            return _Answer(error=result.reason)
        return _Answer(result.text, result.finish_reason, result.prompt_tokens, result.completion_tokens)


def _rows_of(batch: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Column names and rows of a batch, in whatever form Ray gives it."""
    if isinstance(batch, Mapping):  # of NumPy arrays
        columns = {name: list(getattr(values, "tolist", lambda each=values: each)()) for name, values in batch.items()}
        return list(columns), [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if hasattr(batch, "to_pylist"):
        return list(batch.column_names), batch.to_pylist()
    return list(batch.columns), batch.to_dict("records")


def _with_columns(batch: Any, columns: Mapping[str, list[Any]]) -> Any:
    """The batch, in its own form, with more columns."""
    if hasattr(batch, "to_pylist"):
        import pyarrow

        for name, values in columns.items():
            batch = batch.append_column(name, pyarrow.array(values, getattr(pyarrow, _TYPES[name])()))
        return batch
    if isinstance(batch, Mapping):
        import numpy

        return {**batch, **{name: numpy.array(values, dtype=object) for name, values in columns.items()}}
    return batch.assign(**columns)
