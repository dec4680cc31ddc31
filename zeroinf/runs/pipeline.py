"""A loaded model that is called as transformers' text-generation pipeline is, for `zeroinf.pipeline`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import TracebackType
from typing import Any, TypeAlias, TypedDict, Unpack, overload

from zeroinf.errors import InputError, RequestsFailedError
from zeroinf.options.keywords import with_known_keywords
from zeroinf.planner.plan import Plan
from zeroinf.runs.calls import is_chat, requests_of, sampling_of
from zeroinf.runs.progress import ProgressObserver
from zeroinf.runs.report import RunReport
from zeroinf.runs.session import Session
from zeroinf.service.core import Priority
from zeroinf.service.handles import Handle
from zeroinf.service.requests import Request, Result

Chat: TypeAlias = Sequence[Mapping[str, str]]
"""Messages, each with `role` and `content`."""

JsonSchema: TypeAlias = Mapping[str, Any] | type[Any]
"""A JSON schema, or a class that makes one of itself, such as pydantic's models."""

Prompt: TypeAlias = str | Chat | Mapping[str, Any]
"""Text, a chat, or an entry as in JSONL input: `prompt` or `messages`, and settings that hold for it alone."""


class CallSettings(TypedDict, total=False):
    """Settings of one call of a pipeline."""

    return_full_text: bool | None
    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    min_p: float | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | None
    min_tokens: int
    stop_token_ids: Sequence[int]
    response_format: Mapping[str, Any] | None
    json_schema: JsonSchema | None
    regex: str | None
    choices: Sequence[str] | None
    n: int


class Generated(TypedDict):
    """The result of a text-generation pipeline for one sequence: text, or the chat with the answer at its end."""

    generated_text: str | list[dict[str, str]]


class Pipeline:
    """A loaded model, called as transformers' text-generation pipeline is. Made by `zeroinf.pipeline`.

    Calls may come from several threads: their requests run side by side.
    """

    task = "text-generation"

    def __init__(self, session: Session, max_new_tokens: int, observer: ProgressObserver) -> None:
        self._session, self._observer = session, observer
        self._max_new_tokens = max_new_tokens

    def __repr__(self) -> str:
        return f"zeroinf.Pipeline\n{self.plan!r}"

    @property
    def plan(self) -> Plan:
        """The plan that the model runs by."""
        return self._session.plan

    def report(self) -> RunReport:
        """What was done since the model was loaded: counts, times, bytes, memory beside the plan, where time went.

        It waits for the pass that runs. `to_json()` gives what `zeroinf run --report` writes. Under a launcher only
        rank 0 asks. Raises UsageError once the pipeline is closed.
        """
        return self._session.report()

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model, None for random weights without one."""
        return self._session.model.codec.tokenizer

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, text_inputs: str, **how: Unpack[CallSettings]
    ) -> list[Generated]: ...
    @overload
    def __call__(self, text_inputs: Chat, **how: Unpack[CallSettings]) -> list[Generated]: ...
    @overload
    def __call__(self, text_inputs: Sequence[str], **how: Unpack[CallSettings]) -> list[list[Generated]]: ...
    @overload
    def __call__(self, text_inputs: Sequence[Prompt], **how: Unpack[CallSettings]) -> list[list[Generated]]: ...
    @with_known_keywords
    def __call__(
        self,
        text_inputs: Any,
        *,
        return_full_text: bool | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        min_p: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        response_format: Mapping[str, Any] | None = None,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        n: int = 1,
    ) -> Any:
        """Complete a prompt or a chat, or each of several.

        One input gives a list with a `{"generated_text": ...}` for each of its `n` completions, several give a list of
        such lists. The text begins
        with the prompt unless `return_full_text` is False; a chat comes back with the answer as its last message.
        Greedy unless `do_sample` is set or a `temperature` above 0 is given. Raises UsageError for settings that mean
        nothing, InputError for a prompt longer than was planned for, RequestsFailedError where the model's scores for a
        prompt are not numbers.
        """
        sampling = sampling_of(locals(), self._max_new_tokens)
        single = isinstance(text_inputs, (str, Mapping)) or is_chat(text_inputs)
        inputs = [text_inputs] if single else list(text_inputs)
        full = True if return_full_text is None else return_full_text
        results = self._all(requests_of(inputs, sampling, n=n))
        failed = [result for result in results if result.failed]
        if failed:
            raise RequestsFailedError(
                f"{len(failed)} of {len(results)} prompts failed; prompt {failed[0].index}: {failed[0].reason}",
                hint="zeroinf.generate returns the results of the others",
            )
        of_each = groupby(results, lambda result: result.id)
        found = [[_generated(one, each, full) for each in own] for one, (_, own) in zip(inputs, of_each, strict=True)]
        return found[0] if single else found

    def _all(self, requests: Sequence[Request]) -> list[Result]:
        results = self._observer.counted(self._session.results(requests), len(requests))
        return sorted(results, key=lambda result: result.index)

    @with_known_keywords
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        min_p: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        response_format: Mapping[str, Any] | None = None,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        n: int = 1,
        echo: bool = False,
        logprobs: int | None = None,
    ) -> list[Result]:
        """A result for each of the `n` completions of each prompt, in order, with finish reasons, token counts and
        log-probabilities. With `echo` the `text` of a result begins with its prompt."""
        sampling = sampling_of(locals(), self._max_new_tokens)
        return self._all(requests_of(prompts, sampling, n=n, echo=echo))

    @with_known_keywords
    def as_finished(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        min_p: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        response_format: Mapping[str, Any] | None = None,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        n: int = 1,
        echo: bool = False,
        logprobs: int | None = None,
    ) -> Iterator[Result]:
        """Yield the results of `generate` as they finish; `index` says whose each is. What is left is cancelled where
        the caller stops."""
        sampling = sampling_of(locals(), self._max_new_tokens)
        return self._session.results(requests_of(prompts, sampling, n=n, echo=echo))

    @with_known_keywords
    def submit(
        self,
        prompt: Prompt,
        *,
        priority: Priority = "interactive",
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        min_p: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        response_format: Mapping[str, Any] | None = None,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        logprobs: int | None = None,
    ) -> Handle:
        """Let one prompt be completed beside all others, and return at once.

        Iterating over the handle, with `for` or `async for`, gives text as it comes; `.result()` waits for the whole,
        `await` does so in asyncio; `.cancel()` ends it. Interactive requests enter before those of calls.

            for event in pipe.submit("Once upon a time"):
                print(event.text, end="", flush=True)

            async def ask(prompt):
                return (await pipe.submit(prompt)).text

        Under a launcher only rank 0 submits.
        """
        sampling = sampling_of(locals(), self._max_new_tokens)
        requests = requests_of([prompt], sampling)
        if len(requests) > 1 or (requests[0].extra is not None and requests[0].extra.echo):
            raise InputError("n and echo are for calls", hint="submit the prompt several times")
        (request,) = requests
        return self._session.submit(request, priority=priority, stream=True)

    def close(self) -> None:
        """Free the model; what has not ended is cancelled."""
        self._session.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _generated(asked: Any, result: Result, full: bool) -> Generated:
    if isinstance(asked, Mapping):
        asked = asked["messages"] if "messages" in asked else asked["prompt"]
    if not full:
        return {"generated_text": result.completion}
    if isinstance(asked, str):
        return {"generated_text": asked + result.completion}
    return {"generated_text": [*(dict(m) for m in asked), {"role": "assistant", "content": result.completion}]}
