"""zeroinf from Python: `plan`, `generate` and `pipeline`, as `import zeroinf` offers them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypedDict, overload

from zeroinf.distributed.world import world_from_environment
from zeroinf.errors import InputError, RequestsFailedError, UsageError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.ask import PlanOptions, ask
from zeroinf.jobs.options import RunOptions
from zeroinf.jobs.planning import choose_engine
from zeroinf.jobs.runner import pick_device
from zeroinf.jobs.session import Session
from zeroinf.model.anatomy import KvDtype
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.source import ModelSource, load_tokenizer, resolve_model
from zeroinf.planner.choice import Fetch, Offload
from zeroinf.planner.kv import Kv
from zeroinf.planner.plan import Plan, TensorParallel
from zeroinf.planner.traits import needs_full_weights
from zeroinf.planner.wire import Wire
from zeroinf.planner.workload import Lengths
from zeroinf.service.requests import Request, Result
from zeroinf.service.text import TextCodec, encode_prompt
from zeroinf.simulation.planning import answer
from zeroinf.sizes import parse_size

Engine: TypeAlias = Literal["auto", "stream", "zero", "resident", "accelerate", "tensor-parallel"]
Chat: TypeAlias = Sequence[Mapping[str, str]]
"""Messages, each with `role` and `content`."""
Size: TypeAlias = int | str
"""Bytes, or text such as "24GiB"."""

_CALL_ARGUMENTS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos")


class Generated(TypedDict):
    """What a text-generation pipeline returns for one sequence: text, or the chat with the answer at its end."""

    generated_text: str | list[dict[str, str]]


def plan(
    model: str,
    *,
    engine: Engine = "auto",
    offload: Offload | Literal["auto"] = "auto",
    fetch: Fetch | Literal["auto"] = "auto",
    batch_size: int | None = None,
    micro_batch_rows: int | None = None,
    wire: Wire = "model",
    kv: Kv = "auto",
    kv_dtype: KvDtype = "model",
    resident_blocks: int | None = None,
    tensor_parallel_size: int | None = None,
    input_len: int = 512,
    output_len: int = 128,
    requests: int | None = None,
    machine: str | None = None,
    num_gpus: int | None = None,
    gpu_memory: Size | None = None,
    host_memory: Size | None = None,
    nvme_space: Size | None = None,
    link_gbps: float | None = None,
    nvme_gbps: float | None = None,
    nvme_paths: Iterable[str | Path] = (),
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What `zeroinf plan` would do: where every byte goes (`terms`) and how long it takes (`timing`, seconds).

    `input_len` and `output_len` are tokens a row. `machine` is a name of configs/machines or a file of `zeroinf doctor
    --json`; without one it is this machine. No weights are loaded. Raises DoesNotFitError when nothing fits, UsageError
    for what would have no effect.
    """
    options = PlanOptions(
        model=model,
        engine=engine,
        offload=offload,
        fetch=fetch,
        batch_size=batch_size,
        micro_batch_rows=micro_batch_rows,
        wire=wire,
        kv=kv,
        kv_dtype=kv_dtype,
        resident_blocks=resident_blocks,
        tensor_parallel_size=tensor_parallel_size,
        input_len=input_len,
        output_len=output_len,
        requests=requests,
        machine_name=machine,
        num_gpus=num_gpus,
        gpu_memory=_bytes(gpu_memory),
        host_memory=_bytes(host_memory),
        nvme_space=_bytes(nvme_space),
        link_gbps=link_gbps,
        nvme_gbps=nvme_gbps,
        nvme_paths=tuple(map(Path, nvme_paths)),
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return answer(ask(options)).plan


def generate(
    model: str, prompts: Sequence[str], *, max_new_tokens: int = 128, batch_size: int | None = None, **options: Any
) -> list[Result]:
    """Load `model`, complete each of `prompts`, in order, and free it again.

    `options` are those of `pipeline` (how to run) and of calling it (`temperature`, `top_p`, `top_k`, `seed`, `stop`,
    `ignore_eos`). What is planned for is the longest prompt. Where the model's scores for a prompt are not numbers, the
    `finish_reason` of its result is "error". Raises a ZeroinfError with a message and a hint.
    """
    sampling = _sampling(max_new_tokens, {name: options.pop(name) for name in _CALL_ARGUMENTS[1:] if name in options})
    run_options, source = _resolve(model, batch_size, sampling, options)
    requests = [_request(number, prompt, sampling) for number, prompt in enumerate(prompts)]
    if not requests:
        return []
    anatomy = read_anatomy(source.config, trust_remote_code=source.trust_remote_code)
    codec = TextCodec(load_tokenizer(source), anatomy)
    longest = max(len(encode_prompt(codec, request)) for request in requests)
    with _open(
        run_options, source, Lengths(prompt_tokens=longest, new_tokens=max_new_tokens), len(requests)
    ) as session:
        return session.run(requests)


def pipeline(
    model: str,
    *,
    max_prompt_tokens: int = 512,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
    **options: Any,
) -> Pipeline:
    """Load `model` once, for calls as of transformers' text-generation pipeline.

    `max_prompt_tokens` and `max_new_tokens` are what memory is planned for. `batch_size` None lets the planner choose.
    `options` say how to run, with the names and meanings of the flags of `zeroinf run`: `engine`, `offload`,
    `nvme_paths`, `fetch`, `wire`, `kv`, `kv_dtype`, `resident_blocks`, `micro_batch_rows`, `dtype`, `revision`,
    `trust_remote_code`, `random_weights`, `pin_memory`, `gpu_memory`, `host_memory`, `zero_config`, `tensor_parallel`
    (a TensorParallel).

        pipe = zeroinf.pipeline("HuggingFaceTB/SmolLM2-135M-Instruct", offload="cpu")
        pipe("The capital of France is", max_new_tokens=8)     # [{"generated_text": "The capital of France is ..."}]
        pipe(["one", "two"], return_full_text=False)            # a list of such lists
        pipe.close()

    Under a launcher (`deepspeed`, torchrun) every rank makes the pipeline and calls it with the same prompts.
    """
    sampling = _sampling(max_new_tokens, {})
    run_options, source = _resolve(model, batch_size, sampling, options)
    lengths = Lengths(prompt_tokens=max_prompt_tokens, new_tokens=max_new_tokens)
    return Pipeline(_open(run_options, source, lengths, None), max_new_tokens)


class Pipeline:
    """A loaded model, called as transformers' text-generation pipeline is. Made by `zeroinf.pipeline`."""

    task = "text-generation"

    def __init__(self, session: Session, max_new_tokens: int) -> None:
        self._session = session
        self._max_new_tokens = max_new_tokens

    @property
    def plan(self) -> Plan:
        """How it runs."""
        plan: Plan = self._session.plan
        return plan

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model, None for random weights without one."""
        return self._session.tokenizer

    @overload
    def __call__(self, text_inputs: str, **how: Any) -> list[Generated]: ...
    @overload
    def __call__(self, text_inputs: Sequence[str], **how: Any) -> list[list[Generated]]: ...
    @overload
    def __call__(self, text_inputs: Chat, **how: Any) -> list[Generated]: ...
    @overload
    def __call__(self, text_inputs: Sequence[Chat], **how: Any) -> list[list[Generated]]: ...
    def __call__(self, text_inputs: Any, *, return_full_text: bool | None = None, **how: Any) -> Any:
        """Complete a prompt or a chat, or each of several.

        One input gives a list with one `{"generated_text": ...}`, several give a list of such lists. The text begins
        with the prompt unless `return_full_text` is False; a chat comes back with the answer as its last message.
        `how`: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`, `seed`, `stop` (a text or several) and
        `ignore_eos`. Raises UsageError for other arguments, InputError for a prompt longer than was planned for,
        RequestsFailedError where the model's scores for a prompt are not numbers.
        """
        sampling = _sampling(how.pop("max_new_tokens", self._max_new_tokens), how)
        single = isinstance(text_inputs, str) or _is_chat(text_inputs)
        inputs = [text_inputs] if single else list(text_inputs)
        full = True if return_full_text is None else return_full_text
        results = self._session.run([_request(number, one, sampling) for number, one in enumerate(inputs)])
        failed = [result for result in results if result.failed]
        if failed:
            raise RequestsFailedError(
                f"{len(failed)} of {len(results)} prompts failed; prompt {failed[0].index}: {failed[0].reason}",
                hint="zeroinf.generate returns what the others came to",
            )
        found = [[_generated(one, result, full)] for one, result in zip(inputs, results, strict=True)]
        return found[0] if single else found

    def close(self) -> None:
        """Free the model."""
        self._session.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _open(options: RunOptions, source: ModelSource, lengths: Lengths, requests: int | None) -> Session:
    world = world_from_environment()
    return Session(options, source, lengths, requests, world, pick_device(world))


def _resolve(
    model: str, batch_size: int | None, sampling: Sampling, options: dict[str, Any]
) -> tuple[RunOptions, ModelSource]:
    """The options of a run, and the model. Raises UsageError for names that no option has."""
    for name in ("gpu_memory", "host_memory"):
        if name in options:
            options[f"{name}_bytes"] = _bytes(options.pop(name))
    if "nvme_paths" in options:
        options["nvme_paths"] = tuple(map(Path, options["nvme_paths"]))
    known = {field.name for field in fields(RunOptions)} - _OF_JOBS
    if unknown := sorted(options.keys() - known):
        raise UsageError(
            f"unknown option {unknown[0]!r}",
            hint=f"one of {', '.join(sorted(n.removesuffix('_bytes') for n in known))}",
        )
    asked = RunOptions(model=model, sampling=sampling, batch_size=batch_size)
    engine, _ = choose_engine(options.get("engine", "auto"), own_zero_config="zero_config" in options)
    source = resolve_model(
        model,
        revision=options.get("revision"),
        trust_remote_code=options.get("trust_remote_code", False),
        random_weights=options.get("random_weights", False),
        in_full=needs_full_weights(engine, options.get("wire", "model")),
    )
    return replace(asked, **options), source


_OF_JOBS = {
    *("model", "sampling", "batch_size", "prompts", "input_files", "input_format", "output_file", "overwrite"),
    *("benchmark", "repetitions", "sampling_only", "resume", "resume_anyway", "resume_command", "max_error_rate"),
}


def _sampling(max_new_tokens: int, how: dict[str, Any]) -> Sampling:
    """Greedy unless `do_sample` is set or a temperature above 0 is given."""
    if unknown := sorted(how.keys() - set(_CALL_ARGUMENTS)):
        raise UsageError(f"unknown argument {unknown[0]!r}", hint=f"one of {', '.join(_CALL_ARGUMENTS)}")
    given = dict(how)
    do_sample = given.pop("do_sample", None)
    if do_sample is False and given.get("temperature"):
        raise UsageError("temperature has no effect with do_sample=False", hint="drop one of them")
    if do_sample:
        given.setdefault("temperature", 1.0)
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    try:
        sampling = Sampling(max_new_tokens=max_new_tokens, **{**given, "stop": tuple(given.get("stop", ()))})
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if sampling.is_greedy and (idle := [name for name in ("top_p", "top_k", "seed") if name in how]):
        raise UsageError(f"{', '.join(idle)} would change nothing: it is greedy", hint="add do_sample=True, or drop it")
    return sampling


def _request(number: int, prompt: Any, sampling: Sampling) -> Request:
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise InputError(f"prompt {number} is {type(prompt).__name__}", hint="give text, or a list of messages")
    messages = None if isinstance(prompt, str) else tuple(dict(message) for message in prompt)
    text = prompt if isinstance(prompt, str) else None
    return Request(index=number, line=None, id=str(number), prompt=text, messages=messages, sampling=sampling)


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _generated(asked: Any, result: Result, full: bool) -> Generated:
    if not full:
        return {"generated_text": result.completion}
    if isinstance(asked, str):
        return {"generated_text": asked + result.completion}
    return {"generated_text": [*(dict(m) for m in asked), {"role": "assistant", "content": result.completion}]}


def _bytes(size: Size | None) -> int | None:
    if not isinstance(size, str):
        return size
    try:
        return parse_size(size)
    except ValueError as error:
        raise UsageError(str(error)) from error


__all__ = ["Generated", "Pipeline", "Plan", "Result", "TensorParallel", "generate", "pipeline", "plan"]
