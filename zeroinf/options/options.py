"""Defines every option of a run and of a plan: name, type, default, help and bounds, in groups.

The command line makes its flags of these, the Python API's keywords are checked against them, and the planner's
constraints and the fingerprint of a job are filled from them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from zeroinf.engines.registry import ENGINE_NAMES
from zeroinf.errors import UsageError
from zeroinf.generation.row import MOST_LOGPROBS, Sampling
from zeroinf.jobs.export import OutputFormat
from zeroinf.jobs.formats import InputFormat
from zeroinf.jobs.shape import EntryShape
from zeroinf.model.cache_layout import KvDtype
from zeroinf.options.definition import Option, Options, option, parts
from zeroinf.planner.choice import Embeddings, Fetch, Offload
from zeroinf.planner.kv import Kv, KvAttention
from zeroinf.planner.plan import AioSettings, TensorParallel
from zeroinf.planner.wire import Wire
from zeroinf.service.requests import ChatOptions
from zeroinf.sizes import DEFAULT_NEW_TOKENS, Share, parse_share
from zeroinf.structured.answer_format import AnswerFormat, of_choices, of_file, of_regex

_DIRECT_IO_BYTES = 4096
"""O_DIRECT reads whole device sectors, which are 512 or 4096 bytes."""


DTYPE_ALIASES = {
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "f16"), "float16"),
    **dict.fromkeys(("fp32", "float", "f32"), "float32"),
}
"""What vLLM, torch and llama.cpp call the dtypes."""
_SHARES = {"--gpu-memory-utilization": parse_share}
"""vLLM's limit of GPU memory."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The model."""

    model: str = option(
        flags=("-m", "--model"),
        positional=True,
        section="everyday options",
        help="Hub id, local folder, .gguf file or `demo`; where only shapes matter, also a name of configs/models.",
    )
    revision: str | None = option(None, section="model", help="Branch, tag or commit on the hub.")
    dtype: str = option(
        "auto",
        choices=("auto", "bfloat16", "float16", "float32", "int8"),
        aliases=DTYPE_ALIASES,
        fingerprint="dtype",
        section="everyday options",
        help="Type of the weights and of the arithmetic; auto takes the model's own.",
    )
    trust_remote_code: bool = option(False, section="model", help="Run Python code that comes with the model.")


@dataclass(frozen=True, kw_only=True)
class RandomWeightsOptions(Options):
    """Weights without a checkpoint."""

    random_weights: bool = option(
        False, section="engines and baselines", help="Real shapes, random weights, no checkpoint: for benchmarks."
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """The engine that runs the model, and its settings."""

    engine: str = option(
        "auto",
        choices=("auto", *ENGINE_NAMES),
        fingerprint="engine",
        section="engines and baselines",
        help="stream is ours, zero is DeepSpeed's ZeRO-3; resident (the whole model on each GPU), accelerate and "
        "tensor-parallel (DeepSpeed-Inference) are for comparison. auto takes stream wherever it can run the request.",
    )
    fetch: Fetch | Literal["auto"] = option(
        "auto",
        engine_specific=True,
        section="several GPUs",
        help="With several GPUs and the stream engine: each pulls all weights over its own link, or its part of "
        "them, gathered between GPUs. auto takes what is faster; only GPUs that reach each other are partitioned.",
    )
    wire: Wire = option(
        "model",
        engine_specific=True,
        fingerprint="wire",
        section="everyday options",
        help="How weights of layers are stored and transferred: in the model's dtype, or packed as int8 or int4, which "
        "is lossy: `zeroinf eval` measures how much. With the stream engine.",
    )
    kv: Kv = option(
        "auto",
        engine_specific=True,
        section="memory",
        help="Where the KV cache is: on the GPU, or in host memory, from which it is transferred layer by layer; "
        "auto takes host memory for as many sequences as make more tokens/s. With the stream engine.",
    )
    kv_dtype: KvDtype = option(
        "model",
        engine_specific=True,
        fingerprint="keys and values",
        section="memory",
        help="The KV cache in host memory: in the model's dtype, or quantized to int8, which is lossy.",
    )
    kv_attention: KvAttention = option(
        "auto",
        engine_specific=True,
        section="memory",
        help="Who attends to a KV cache in host memory: the GPU, to which it is copied, or, for decode steps, the CPU, "
        "where it is. auto compares both once host memory has been measured: by `zeroinf doctor --measure`, or "
        "before a run of five minutes or more whose weights do not all fit the GPU. With the stream engine.",
    )
    embeddings: Embeddings | Literal["auto"] = option(
        "auto",
        engine_specific=True,
        section="memory",
        help="Where input embeddings and other tables that tokens read by row are: with the other weights; in host "
        "memory, where the CPU gathers the rows of each forward; or in the checkpoint's files (disk), from which it "
        "reads them. auto takes what makes more tokens/s, and disk where host memory is short. With the stream engine.",
    )
    expert_parts: int | None = option(
        None,
        engine_specific=True,
        auto=True,
        minimum=1,
        section="memory",
        help="Parts in which the experts of a layer are transferred and computed, one after the other, so that layers "
        "may be larger than the GPU; auto takes parts where whole layers leave too little. With the stream engine.",
    )
    routed_tokens: int | None = option(
        None,
        engine_specific=True,
        auto=True,
        minimum=0,
        section="speed",
        help="Passes of so many tokens or fewer transfer only the experts that these tokens are routed to, once they "
        "are known, from layers whose experts come in parts; auto takes as many tokens as less than half of the "
        "experts are expected for, where that is faster. With the stream engine.",
    )
    resident_blocks: int | None = option(
        None,
        engine_specific=True,
        auto=True,
        minimum=0,
        section="speed",
        help="Layers that never leave the GPU; the others stream. With the stream engine and accelerate.",
    )
    batch_size: int | None = option(
        None,
        flags=("-b", "--batch-size"),
        auto=True,
        minimum=1,
        section="speed",
        help="Sequences that run at once on each GPU; auto takes what gives most tokens/s without running out of "
        "memory.",
    )
    micro_batch_rows: int | None = option(
        None,
        auto=True,
        minimum=1,
        section="speed",
        help="Most sequences that run one forward together; several such micro-batches of equal size share a "
        "pass over the weights. With the stream engine.",
    )
    share_prefixes: bool = option(
        True,
        engine_specific=True,
        section="speed",
        help="Compute what prompts begin with in common once, and share its keys and values. With the stream and "
        "resident engines.",
    )


@dataclass(frozen=True, kw_only=True)
class RestOptions(Options):
    """The places of the weights."""

    offload: Offload | Literal["auto"] = option(
        "auto",
        section="everyday options",
        help="Where weights are kept: on the GPUs, in host memory, or in files below --nvme-path; auto takes the "
        "fastest that fits.",
    )
    nvme_paths: tuple[Path, ...] = option(
        (),
        flags=("--nvme-path",),
        section="everyday options",
        help="Folder on a fast local disk. With --offload nvme; weights are striped over several.",
    )


@dataclass(frozen=True, kw_only=True)
class TransferOptions(Options):
    """The ways in which offloaded weights are held and read."""

    pin_memory: bool = option(
        True,
        engine_specific=True,
        section="memory",
        help="Keep host weights page-locked: full link speed, but they cannot be swapped out.",
    )
    aio: AioSettings = parts(
        AioSettings(),
        block_size_bytes=Option(
            section="engines and baselines",
            flags=("--aio-block-size",),
            engine_specific=True,
            is_size=True,
            multiple_of=_DIRECT_IO_BYTES,
            help="Bytes of one disk request; smaller weights stay in host memory. With --engine zero --offload nvme.",
        ),
        queue_depth=Option(
            section="engines and baselines",
            flags=("--aio-queue-depth",),
            engine_specific=True,
            minimum=1,
            help="Disk requests in flight for each thread. With --engine zero --offload nvme.",
        ),
        threads=Option(
            section="engines and baselines",
            flags=("--aio-threads",),
            engine_specific=True,
            minimum=1,
            help="Threads that share the reading of one weight. With --engine zero --offload nvme.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class OffloadOptions(RestOptions, TransferOptions):
    """The places of the weights, and the ways they are held and read there."""


@dataclass(frozen=True, kw_only=True)
class ParallelOptions(Options):
    """The split of a model by DeepSpeed-Inference."""

    tensor_parallel: TensorParallel = parts(
        TensorParallel(size=0),
        size=Option(
            section="engines and baselines",
            flags=("-tp", "--tensor-parallel-size"),
            engine_specific=True,
            default=None,
            convert=lambda size: size or 0,
            minimum=1,
            help="Ranks that hold one model together. With --engine tensor-parallel. [default: all]",
        ),
        injection_policy=Option(
            section="engines and baselines",
            flags=("--injection-policy",),
            engine_specific=True,
            fingerprint="injection policy",
            help="Block=attention.output,mlp.output: the layers whose results are summed, for models that DeepSpeed "
            "does not know. With --engine tensor-parallel.",
        ),
        checkpoint=Option(
            section="engines and baselines",
            flags=("--checkpoint-json",),
            engine_specific=True,
            path="existing file",
            fingerprint="checkpoint listing",
            help="Weights listed in DeepSpeed's format (BLOOM, ds_model, Megatron), saved by any number of ranks. With "
            "--engine tensor-parallel.",
        ),
        save_to=Option(
            section="engines and baselines",
            flags=("--save-mp-checkpoint-path",),
            engine_specific=True,
            path="folder",
            help="Save each rank's part of the weights and ds_inference_config.json there. With --engine "
            "tensor-parallel.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class LimitOptions(Options):
    """The most that may be taken of a machine."""

    gpu_memory: int | Share | None = option(
        None,
        is_size=True,
        is_limit=True,
        foreign=_SHARES,
        section="everyday options",
        help="The most that each rank may take of its GPU, such as 24GiB or 90%; enforced. [default: what is free]",
    )
    host_memory: int | None = option(
        None,
        is_size=True,
        section="everyday options",
        help="The most host memory that all ranks together may take. [default: what is free]",
    )


@dataclass(frozen=True, kw_only=True)
class ZeroOptions(Options):
    """The user's own configuration of DeepSpeed."""

    zero_config: Path | None = option(
        None,
        path="existing file",
        engine_specific=True,
        fingerprint="ZeRO config",
        section="engines and baselines",
        help="Your own DeepSpeed JSON (ZeRO stage 3) instead of the one that follows from the model.",
    )


def _chat_options(variables: dict[str, Any] | None) -> ChatOptions:
    return ChatOptions().with_variables(variables or {})


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class InputOptions(Options):
    """The input of a job, and what is made of it."""

    input_files: tuple[str, ...] = option(
        (),
        flags=("-i", "--input-file"),
        section="everyday options",
        help="Prompts: text (one a line), JSONL (`prompt` or `messages`), OpenAI batch lines, a JSON array, CSV, TSV, "
        "Parquet or Arrow, also packed by gzip or zstd; a file, folder, pattern or URL; - is stdin; may be given "
        "often.",
    )
    input_format: InputFormat = option(
        "auto", section="input", help="What -i holds; auto goes by each file's ending and its first bytes."
    )
    shape: EntryShape = parts(
        EntryShape(),
        prompt_column=Option(
            section="input",
            flags=("--prompt-column",),
            help="The column (or key) that holds the prompt. [default: prompt]",
        ),
        messages_column=Option(
            section="input",
            flags=("--messages-column",),
            help="The column that holds chat messages. [default: messages]",
        ),
        id_column=Option(section="input", flags=("--id-column",), help="The column that holds the id. [default: id]"),
        template=Option(
            section="input",
            flags=("--template",),
            help="Make the prompt of an entry's columns, in Jinja2: 'Translate: {{ text }}', or @FILE; none may be "
            "missing.",
        ),
        chat=Option(
            section="everyday options",
            flags=("--chat",),
            help="Prompts are user messages, and go through the model's chat template.",
        ),
        system=Option(
            section="input",
            flags=("--system",),
            is_text=True,
            help="The system message of chats that begin with none, or @FILE.",
        ),
        chat_options=Option(
            section="input",
            flags=("--chat-template-kwargs",),
            default=None,
            written=dict,
            convert=_chat_options,
            help="Variables of the model's chat template as JSON, such as '{\"enable_thinking\": false}'.",
        ),
        keep=Option(
            section="output",
            flags=("--keep-columns",),
            default=None,
            written=str,
            convert=_names,
            help="Columns of the input that the output has as well: NAME,NAME or all.",
        ),
        limit=Option(section="input", flags=("--limit",), minimum=1, help="Read so many entries only."),
        samples=Option(
            section="sampling",
            flags=("-n", "--samples"),
            minimum=1,
            maximum=128,
            help="Completions of each prompt. With --temperature.",
        ),
    )
    max_model_len: int | None = option(
        None,
        minimum=2,
        section="input",
        help="Most tokens of a prompt and its completion together: longer requests are refused. [default: the model's "
        "context]",
    )


@dataclass(frozen=True, kw_only=True)
class JobOptions(InputOptions):
    """The input, and the place of the results."""

    prompts: tuple[str, ...] = option(
        (), flags=("--prompt",), is_text=True, section="everyday options", help="A prompt; may be given many times."
    )
    output_file: Path | None = option(
        None,
        flags=("-o", "--output-file"),
        section="everyday options",
        help="Results, in input order: JSONL, Parquet or CSV by its ending; - is JSONL to stdout. Without it, in=/out= "
        "pairs go there. A URL (s3://...) gets a copy of the file that is made here.",
    )
    output_format: OutputFormat = option(
        "auto",
        section="output",
        help="What -o holds; auto goes by its ending, and answers OpenAI batches as OpenAI does.",
    )
    overwrite: bool = option(
        False, section="output", help="Start anew: replace an existing output file and its journal."
    )
    resume: bool = option(
        False,
        section="everyday options",
        help="Go on with a job that was stopped or killed; start it if there is none.",
    )
    resume_anyway: bool = option(
        False,
        section="output",
        help="Go on although model, settings or input have changed: requests whose id and prompt are as before keep "
        "their results, the others run.",
    )
    max_error_rate: float = option(
        1.0,
        minimum=0,
        maximum=1,
        section="input",
        help="Run nothing if a larger share of the requests than this is refused.",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """The choice of tokens, and the end of a completion."""

    sampling: Sampling = parts(
        max_new_tokens=Option(
            section="everyday options",
            flags=("--max-new-tokens", "--max-tokens"),
            default=DEFAULT_NEW_TOKENS,
            minimum=1,
            help="Most tokens of a completion.",
        ),
        temperature=Option(section="everyday options", flags=("--temperature",), minimum=0, help="0 is greedy."),
        top_p=Option(
            section="sampling", flags=("--top-p",), minimum=0, maximum=1, above=True, help="1 does not filter."
        ),
        top_k=Option(section="sampling", flags=("--top-k",), minimum=0, help="0 does not filter."),
        min_p=Option(
            section="sampling",
            flags=("--min-p",),
            minimum=0,
            maximum=1,
            help="Least likelihood, as a share of the highest.",
        ),
        seed=Option(
            section="sampling",
            flags=("--seed",),
            help="A row's sample depends on the seed and its place in the input only.",
        ),
        stop=Option(
            section="sampling",
            flags=("--stop",),
            is_text=True,
            help="End a row at this text, which is left out; may be given many times.",
        ),
        ignore_eos=Option(section="sampling", flags=("--ignore-eos",), help="Go on past the end-of-sequence token."),
        presence_penalty=Option(
            section="sampling",
            flags=("--presence-penalty",),
            minimum=-2,
            maximum=2,
            help="Taken off scores of tokens generated before.",
        ),
        frequency_penalty=Option(
            section="sampling", flags=("--frequency-penalty",), minimum=-2, maximum=2, help="The same, for each time."
        ),
        repetition_penalty=Option(
            section="sampling",
            flags=("--repetition-penalty",),
            minimum=0,
            maximum=100,
            above=True,
            help="Divides scores of tokens of prompt and completion; 1 does nothing.",
        ),
        min_tokens=Option(
            section="sampling",
            flags=("--min-tokens",),
            minimum=0,
            help="No end of a sequence, nor a stop, before so many.",
        ),
        logprobs=Option(
            section="output",
            flags=("--logprobs",),
            minimum=0,
            maximum=MOST_LOGPROBS,
            help="Tell each token's log-probability, and those of so many of the likeliest tokens. With -o.",
        ),
    )


def _choices(text: str | None) -> tuple[str, ...] | None:
    """A JSON list, or texts with commas between them."""
    if text is None:
        return None
    if not text.lstrip().startswith("["):
        return tuple(choice.strip() for choice in text.split(","))
    try:
        return tuple(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(Options):
    """The format of answers."""

    json_schema: Path | None = option(
        None,
        path="existing file",
        section="sampling",
        help="Answers are JSON that is valid against the schema in this file. Needs zeroinf[structured].",
    )
    regex: str | None = option(
        None,
        section="sampling",
        help="Answers match this regular expression as a whole (Rust's syntax).",
    )
    choices: tuple[str, ...] | None = option(
        None,
        flags=("--choices",),
        written=str,
        convert=_choices,
        section="sampling",
        help="Answers are one of these: A,B,C, or a JSON list.",
    )

    def answer_format(self) -> AnswerFormat | None:
        """The format that is asked for, if any. Raises UsageError for what contradicts itself or cannot be carried
        out."""
        named = self.asked("json_schema", "regex", "choices")
        if not named:
            return None
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} contradict each other", hint="name one format of the answers")
        try:
            if self.json_schema is not None:
                return of_file(self.json_schema.read_text(encoding="utf-8-sig"))
            return of_regex(self.regex) if self.regex is not None else of_choices(self.choices)
        except OSError as error:
            raise UsageError(f"{named[0]} {self.json_schema}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"{named[0]}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(Options):
    """The ranks that are started, and their GPUs."""

    num_gpus: int | None = option(
        None,
        minimum=1,
        section="everyday options",
        help="Start this many ranks, an independent stream on each GPU. [default: one]",
    )
    hostfile: Path | None = option(
        None,
        path="existing file",
        section="several GPUs",
        help="Start ranks on all nodes that it names, in DeepSpeed's form: `host slots=8` a line. Needs ssh and pdsh.",
    )
    ray: str | None = option(
        None,
        section="several GPUs",
        help="Run on the nodes of a Ray cluster, each with all of its GPUs: `auto` is the cluster of this machine, "
        "HOST:PORT another one, `local` this machine alone.",
    )
    ray_nodes: str | None = option(
        None,
        section="several GPUs",
        help="Nodes of --ray: MIN:MAX, MIN: or MAX. The job begins when MIN are there, and those that join while it "
        "runs get work. [default: all, from one on]",
    )


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(Options):
    """The measurements."""

    static_batches: bool = option(
        False,
        engine_specific=True,
        hidden=True,
        section="engines and baselines",
        help="Admit sequences only when no other runs, to measure the gain.",
    )
    benchmark: bool = option(
        False, section="engines and baselines", help="Warm up once and print the four figures of the BLOOM scripts."
    )
    repetitions: int = option(
        1,
        flags=("-r", "--repetitions"),
        minimum=1,
        section="engines and baselines",
        help="Run the same requests so often once weights are loaded, each time measured. With --benchmark.",
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions(
    ModelOptions, RandomWeightsOptions, EngineOptions, OffloadOptions, ParallelOptions, LimitOptions, ZeroOptions
):
    """Loading and running a model, whatever for: what `zeroinf run` and the Python API have in common."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(LoadOptions, JobOptions, SamplingOptions, AnswerOptions, MeasureOptions):
    """One run, as it was asked for; nothing is resolved yet."""

    to_stdout: bool = False
    """Write JSON lines to standard output; without it and a file, in=/out= pairs go there."""
    upload_to: str | None = None
    """The URL to which the finished output file is copied."""
    resume_command: str = ""
    """What the user types to go on with this run."""

    def settings(self) -> Sampling:
        """Those of requests that say nothing else. Raises UsageError for a format of answers that does not hold."""
        asked = self.answer_format()
        try:
            return self.sampling if asked is None else replace(self.sampling, answer_format=asked)
        except ValueError as error:
            raise UsageError(str(error), hint="drop one of them") from error


@dataclass(frozen=True, kw_only=True)
class PlannedModelOptions(ModelOptions):
    """The model that is planned."""

    model: str = option(
        flags=("-m", "--model", "--models"),
        positional=True,
        section="everyday options",
        help="Hub id, local folder, .gguf file, `demo`, or a name of configs/models; NAME,NAME or `all` of the latter: "
        "a table of what fits.",
    )


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Options):
    """The machine and the job of a plan; None leaves it to the machine."""

    input_len: int = option(512, minimum=1, section="everyday options", help="Tokens of the longest prompt.")
    output_len: int = option(
        128,
        flags=("--output-len", "--max-new-tokens"),
        minimum=1,
        section="everyday options",
        help="Most tokens of a completion.",
    )
    requests: int | None = option(
        None, minimum=1, section="everyday options", help="Requests in all. [default: plenty]"
    )
    num_gpus: int | None = option(
        None, minimum=1, section="everyday options", help="Ranks, one on each GPU. [default: all GPUs]"
    )
    tensor_parallel_size: int | None = option(
        None,
        flags=("-tp", "--tensor-parallel-size"),
        engine_specific=True,
        minimum=1,
        section="engines and baselines",
        help="Ranks that hold one model together. With --engine tensor-parallel. [default: all]",
    )
    machine: str | None = option(
        None,
        section="everyday options",
        help="A machine that is not here: a name in configs/machines, or doctor's JSON.",
    )
    gpu: str | None = option(
        None,
        flags=("--gpu", "--gpus"),
        section="everyday options",
        help="Plan with this GPU in place of the machine's, such as RTX4090-24GB; NAME,NAME or `all`: a table of which "
        "would do.",
    )
    gpu_memory: int | Share | None = option(
        None,
        is_size=True,
        is_limit=True,
        foreign=_SHARES,
        section="everyday options",
        help="Plan with at most this much of each GPU, such as 24GiB or 90%.",
    )
    host_memory: int | None = option(
        None, is_size=True, section="everyday options", help="Plan with this much host memory."
    )
    nvme_space: int | None = option(None, is_size=True, section="machine", help="Plan with this much room on the disk.")
    link_gbps: float | None = option(
        None, minimum=0, above=True, section="machine", help="Rate of each GPU's link, GB/s."
    )
    nvme_gbps: float | None = option(None, minimum=0, above=True, section="machine", help="Rate of the disk, GB/s.")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(
    PlannedModelOptions, RandomWeightsOptions, EngineOptions, OffloadOptions, MachineOptions, InputOptions
):
    """A plan without a run, of this machine or another one."""

    @property
    def tensor_parallel(self) -> TensorParallel:
        return TensorParallel(size=self.tensor_parallel_size or 0)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt that is planned for, where no input says it."""
        return self.input_len if self.max_model_len is None else self.max_model_len - self.output_len


@dataclass(frozen=True, kw_only=True)
class EvaluationLimits(LimitOptions):
    """The most that an evaluation may take of a machine."""

    gpu_memory: int | Share | None = option(
        None,
        is_size=True,
        is_limit=True,
        foreign=_SHARES,
        section="everyday options",
        help="The most that may be taken of the GPU; enforced.",
    )
    host_memory: int | None = option(
        None, is_size=True, section="everyday options", help="The most host memory that may be taken."
    )


@dataclass(frozen=True, kw_only=True)
class ZeroRestOptions(RestOptions):
    """The places where DeepSpeed's ZeRO leaves weights, with nothing to choose by itself."""

    offload: Offload = option(
        "cpu",
        section="everyday options",
        help="Where weights are kept: on the GPUs, in host memory, or in files below --nvme-path.",
    )


@dataclass(frozen=True, kw_only=True)
class ZeroRankOptions(Options):
    """The ranks that a configuration of DeepSpeed is made for."""

    num_gpus: int = option(
        1,
        minimum=1,
        section="everyday options",
        help="Ranks that share the weights; the numbers hold for just that many.",
    )
    batch_size: int = option(
        8, flags=("-b", "--batch-size"), minimum=1, section="speed", help="Rows that run together on each GPU."
    )


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(ModelOptions, ZeroRestOptions, OffloadOptions, ZeroRankOptions):
    """A configuration of DeepSpeed's ZeRO for a model."""
