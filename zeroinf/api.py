"""zeroinf from Python: `plan`, `generate` and `pipeline`, as `import zeroinf` offers them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from zeroinf.generation.row import Sampling
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import KvDtype
from zeroinf.model.source import ModelSource
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.options.definition import from_keywords
from zeroinf.options.keywords import with_known_keywords
from zeroinf.options.options import LoadOptions, PlanOptions, RunOptions
from zeroinf.options.plan_input import input_of_best_gpus
from zeroinf.planner.choice import Embeddings, Fetch, Offload
from zeroinf.planner.kv import Kv, KvAttention
from zeroinf.planner.plan import AioSettings, Plan, TensorParallel
from zeroinf.planner.prefixes import PrefixGroups
from zeroinf.planner.wire import Wire
from zeroinf.planner.workload import Lengths
from zeroinf.runs.calls import requests_of, sampling_of
from zeroinf.runs.pipeline import Generated, JsonSchema, Pipeline, Prompt
from zeroinf.runs.progress import ProgressObserver
from zeroinf.runs.session import open_session
from zeroinf.service.handles import Completion, Handle, TokenEvent
from zeroinf.service.requests import Result
from zeroinf.service.text import TextCodec, encode_prompt
from zeroinf.simulation.make_plan import make_plan

Engine: TypeAlias = Literal["auto", "stream", "zero", "resident", "accelerate", "tensor-parallel"]
Size: TypeAlias = int | str
"""Bytes, or text such as "24GiB"."""


@with_known_keywords
def plan(
    model: str,
    *,
    engine: Engine = "auto",
    offload: Offload | Literal["auto"] = "auto",
    fetch: Fetch | Literal["auto"] = "auto",
    batch_size: int | None = None,
    micro_batch_rows: int | None = None,
    share_prefixes: bool = True,
    wire: Wire = "model",
    kv: Kv = "auto",
    kv_dtype: KvDtype = "model",
    kv_attention: KvAttention = "auto",
    embeddings: Embeddings | Literal["auto"] = "auto",
    expert_parts: int | None = None,
    routed_tokens: int | None = None,
    resident_blocks: int | None = None,
    tensor_parallel_size: int | None = None,
    input_len: int = 512,
    output_len: int = 128,
    requests: int | None = None,
    machine: str | None = None,
    gpu: str | None = None,
    num_gpus: int | None = None,
    gpu_memory: Size | None = None,
    host_memory: Size | None = None,
    nvme_space: Size | None = None,
    link_gbps: float | None = None,
    nvme_gbps: float | None = None,
    nvme_paths: Iterable[str | Path] = (),
    random_weights: bool = False,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan as `zeroinf plan` does: where every byte goes (`terms`) and how long it takes (`timing`, seconds).

    `input_len` and `output_len` are tokens a row. `machine` is a name of configs/machines or a file of `zeroinf doctor
    --json`; without one it is this machine. `gpu` is one of those machines', which takes the place of its own. No
    weights are loaded. Raises DoesNotFitError when nothing fits, UsageError for what would have no effect.
    """
    return make_plan(input_of_best_gpus(from_keywords(PlanOptions, locals()))).plan


@with_known_keywords
def generate(
    model: str,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
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
    engine: Engine = "auto",
    offload: Offload | Literal["auto"] = "auto",
    nvme_paths: Iterable[str | Path] = (),
    fetch: Fetch | Literal["auto"] = "auto",
    batch_size: int | None = None,
    micro_batch_rows: int | None = None,
    share_prefixes: bool = True,
    wire: Wire = "model",
    kv: Kv = "auto",
    kv_dtype: KvDtype = "model",
    kv_attention: KvAttention = "auto",
    embeddings: Embeddings | Literal["auto"] = "auto",
    expert_parts: int | None = None,
    routed_tokens: int | None = None,
    resident_blocks: int | None = None,
    tensor_parallel: TensorParallel | None = None,
    num_gpus: int | None = None,
    gpu_memory: Size | None = None,
    host_memory: Size | None = None,
    pin_memory: bool = True,
    aio: AioSettings | None = None,
    zero_config: str | Path | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    progress: bool | None = None,
) -> list[Result]:
    """Load `model`, complete each of `prompts`, and free it again: a result for each, in order.

    A prompt is text, a chat, or what a line of `zeroinf run -i` may be: `{"prompt": ..., "max_new_tokens": 8}`, whose
    settings hold for it alone. Sampling is as in calls of a `Pipeline`, how to run as in `pipeline`; `n` completions
    a prompt are so many results, and with `echo` the `text` of each begins with its prompt. Memory is planned for these
    prompts. Answers are JSON that is valid against `json_schema`, match `regex`, are one of `choices`, or are what
    OpenAI's `response_format` says. Where the model's scores for a prompt are not numbers, or nothing follows that its
    answer's format allows, the `finish_reason` of its result is "error". Raises InputError for prompts that cannot be
    run, and whatever else a run raises, with message and hint.
    """
    sampling = sampling_of(locals(), max_new_tokens)
    options = from_keywords(RunOptions, locals(), LoadOptions, sampling=sampling)
    requests = requests_of(prompts, sampling, n=n, echo=echo)
    if not requests:
        return []

    def lengths(source: ModelSource, anatomy: Anatomy) -> Lengths:
        codec = TextCodec(load_tokenizer(source), anatomy)
        prompts = [array("i", encode_prompt(codec, request)) for request in requests]
        most = [request.sampling.max_new_tokens for request in requests]
        rows = list(zip(map(len, prompts), most, strict=True))
        asked = [count for request in requests if (count := request.sampling.logprobs) is not None]
        return replace(
            Lengths.of(anatomy, rows, max(asked, default=None)),
            prefixes=PrefixGroups([prompt.tobytes() for prompt in prompts]).shared(anatomy, rows)
            if share_prefixes
            else None,
            sampled=any(not request.sampling.is_greedy for request in requests),
            penalized=any(request.sampling.weighs_tokens for request in requests),
            structured=any(request.sampling.answer_format is not None for request in requests),
        )

    observer = ProgressObserver(progress)
    with open_session(options, lengths, len(requests), observer, num_gpus) as session:
        results = observer.counted(session.results(requests), len(requests))
        return sorted(results, key=lambda result: result.index)


@with_known_keywords
def pipeline(
    model: str,
    *,
    max_prompt_tokens: int = 512,
    max_new_tokens: int = 128,
    logprobs: int | None = None,
    engine: Engine = "auto",
    offload: Offload | Literal["auto"] = "auto",
    nvme_paths: Iterable[str | Path] = (),
    fetch: Fetch | Literal["auto"] = "auto",
    batch_size: int | None = None,
    micro_batch_rows: int | None = None,
    share_prefixes: bool = True,
    wire: Wire = "model",
    kv: Kv = "auto",
    kv_dtype: KvDtype = "model",
    kv_attention: KvAttention = "auto",
    embeddings: Embeddings | Literal["auto"] = "auto",
    expert_parts: int | None = None,
    routed_tokens: int | None = None,
    resident_blocks: int | None = None,
    tensor_parallel: TensorParallel | None = None,
    num_gpus: int | None = None,
    gpu_memory: Size | None = None,
    host_memory: Size | None = None,
    pin_memory: bool = True,
    aio: AioSettings | None = None,
    zero_config: str | Path | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    progress: bool | None = None,
) -> Pipeline:
    """Load `model` once, for calls as of transformers' text-generation pipeline, and for single requests.

    `max_prompt_tokens`, `max_new_tokens` and `logprobs` (the most that a request may ask for) are what is planned
    for. `batch_size` None lets the planner choose, for prompts of all lengths up to that; a number has room for so many
    of the longest. The others say how to run, with the names and meanings of the flags
    of `zeroinf run`. `progress` shows loading and results on stderr or in a notebook; None: where somebody looks.

        pipe = zeroinf.pipeline("HuggingFaceTB/SmolLM2-135M-Instruct", offload="cpu")
        pipe("The capital of France is", max_new_tokens=8)     # [{"generated_text": "The capital of France is ..."}]
        pipe(["one", "two"], return_full_text=False)            # a list of such lists
        pipe.close()

    `num_gpus` starts a rank for each GPU but the first, as processes of their own; without it, one GPU is used. Under a
    launcher (`deepspeed`, torchrun) every rank makes the pipeline and calls it alike instead: all ranks run rank 0's
    prompts, and get the results.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens)
    options = from_keywords(RunOptions, locals(), LoadOptions, sampling=sampling)

    def lengths(source: ModelSource, anatomy: Anatomy) -> Lengths:
        return Lengths.up_to(
            anatomy,
            max_prompt_tokens,
            max_new_tokens,
            rows=batch_size,
            logprobs=logprobs,
            sampled=True,
            penalized=True,
            structured=True,
        )

    observer = ProgressObserver(progress)
    return Pipeline(open_session(options, lengths, None, observer, num_gpus), max_new_tokens, observer)


__all__ = [
    "AioSettings",
    "Completion",
    "Generated",
    "Handle",
    "Pipeline",
    "Plan",
    "Result",
    "TensorParallel",
    "TokenEvent",
    "generate",
    "pipeline",
    "plan",
]
