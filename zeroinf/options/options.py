"""Defines every option of a run and of a plan: name, type, default, help and bounds, in groups.

The command line makes its flags of these, the Python API's keywords are checked against them, and the planner's
constraints and the fingerprint of a job are filled from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zeroinf.engines.registry import ENGINE_NAMES
from zeroinf.generation.row import MOST_LOGPROBS, Sampling
from zeroinf.jobs.export import OutputFormat
from zeroinf.jobs.formats import InputFormat
from zeroinf.jobs.shape import EntryShape
from zeroinf.model.anatomy import KvDtype
from zeroinf.options.definition import Option, Options, option, parts
from zeroinf.planner.choice import Fetch, Offload
from zeroinf.planner.kv import Kv
from zeroinf.planner.plan import AioSettings, TensorParallel
from zeroinf.planner.wire import Wire
from zeroinf.service.requests import ChatOptions
from zeroinf.sizes import DEFAULT_NEW_TOKENS

_DIRECT_IO_BYTES = 4096
"""O_DIRECT reads whole device sectors, which are 512 or 4096 bytes."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model."""

    model: str = option(
        flags=("-m", "--model"),
        help="Hub id, local folder, .gguf file or `demo`; where only shapes matter, also a name of configs/models.",
    )
    revision: str | None = option(None, help="Branch, tag or commit on the hub.")
    dtype: str = option(
        "auto",
        choices=("auto", "bfloat16", "float16", "float32", "int8"),
        fingerprint="dtype",
        help="Type of the weights and of the arithmetic; auto takes the model's own.",
    )
    trust_remote_code: bool = option(False, help="Run Python code that comes with the model.")


@dataclass(frozen=True, kw_only=True)
class RandomWeightsOptions(Options):
    """Weights without a checkpoint."""

    random_weights: bool = option(False, help="Real shapes, random weights, no checkpoint: for benchmarks.")


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """What runs the model, and how."""

    engine: str = option(
        "auto",
        choices=("auto", *ENGINE_NAMES),
        fingerprint="engine",
        help="stream is ours, zero is DeepSpeed's ZeRO-3; resident (the whole model on each GPU), accelerate and "
        "tensor-parallel (DeepSpeed-Inference) are for comparison. auto takes stream wherever it can run the request.",
    )
    fetch: Fetch | Literal["auto"] = option(
        "auto",
        engine_specific=True,
        help="With several GPUs and the stream engine: each pulls all weights over its own link, or its part of "
        "them, gathered between GPUs. auto takes what is faster; only GPUs that reach each other are partitioned.",
    )
    wire: Wire = option(
        "model",
        engine_specific=True,
        fingerprint="wire",
        help="How weights of layers are stored and transferred: in the model's dtype, or packed as int8 or int4, which "
        "is lossy: `zeroinf eval` measures how much. With the stream engine.",
    )
    kv: Kv = option(
        "auto",
        engine_specific=True,
        help="Where the KV cache is: on the GPU, or in host memory, from which it is transferred layer by layer; "
        "auto takes host memory for as many sequences as make more tokens/s. With the stream engine.",
    )
    kv_dtype: KvDtype = option(
        "model",
        engine_specific=True,
        fingerprint="keys and values",
        help="The KV cache in host memory: in the model's dtype, or quantized to int8, which is lossy.",
    )
    resident_blocks: int | None = option(
        None,
        engine_specific=True,
        auto=True,
        minimum=0,
        help="Layers that never leave the GPU; the others stream. With the stream engine and accelerate.",
    )
    batch_size: int | None = option(
        None,
        flags=("-b", "--batch-size"),
        auto=True,
        minimum=1,
        help="Sequences that run at once on each GPU; auto takes what gives most tokens/s without running out of "
        "memory.",
    )
    micro_batch_rows: int | None = option(
        None,
        auto=True,
        minimum=1,
        help="Most sequences that run one forward together; several such micro-batches of equal size share a "
        "pass over the weights. With the stream engine.",
    )


@dataclass(frozen=True, kw_only=True)
class RestOptions(Options):
    """Where weights rest."""

    offload: Offload | Literal["auto"] = option(
        "auto",
        help="Where weights rest: on the GPUs, in host memory, or in files below --nvme-path; auto takes the fastest "
        "that fits.",
    )
    nvme_paths: tuple[Path, ...] = option(
        (),
        flags=("--nvme-path",),
        help="Folder on a fast local disk. With --offload nvme; weights are striped over several.",
    )


@dataclass(frozen=True, kw_only=True)
class TransferOptions(Options):
    """How offloaded weights are held and read."""

    pin_memory: bool = option(
        True,
        engine_specific=True,
        help="Keep host weights page-locked: full link speed, but they cannot be swapped out.",
    )
    aio: AioSettings = parts(
        AioSettings(),
        block_size_bytes=Option(
            flags=("--aio-block-size",),
            engine_specific=True,
            is_size=True,
            multiple_of=_DIRECT_IO_BYTES,
            help="Bytes of one disk request; smaller weights stay in host memory. With --engine zero --offload nvme.",
        ),
        queue_depth=Option(
            flags=("--aio-queue-depth",),
            engine_specific=True,
            minimum=1,
            help="Disk requests in flight for each thread. With --engine zero --offload nvme.",
        ),
        threads=Option(
            flags=("--aio-threads",),
            engine_specific=True,
            minimum=1,
            help="Threads that share the reading of one weight. With --engine zero --offload nvme.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class OffloadOptions(RestOptions, TransferOptions):
    """Where weights rest, and how they are held and read there."""


@dataclass(frozen=True, kw_only=True)
class ParallelOptions(Options):
    """How DeepSpeed-Inference splits a model."""

    tensor_parallel: TensorParallel = parts(
        TensorParallel(size=0),
        size=Option(
            flags=("-tp", "--tensor-parallel-size"),
            engine_specific=True,
            default=None,
            convert=lambda size: size or 0,
            minimum=1,
            help="Ranks that hold one model together. With --engine tensor-parallel. [default: all]",
        ),
        injection_policy=Option(
            flags=("--injection-policy",),
            engine_specific=True,
            fingerprint="injection policy",
            help="Block=attention.output,mlp.output: the layers whose results are summed, for models that DeepSpeed "
            "does not know. With --engine tensor-parallel.",
        ),
        checkpoint=Option(
            flags=("--checkpoint-json",),
            engine_specific=True,
            path="existing file",
            fingerprint="checkpoint listing",
            help="Weights listed in DeepSpeed's format (BLOOM, ds_model, Megatron), saved by any number of ranks. With "
            "--engine tensor-parallel.",
        ),
        save_to=Option(
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

    gpu_memory: int | None = option(
        None,
        is_size=True,
        help="The most that each rank may take of its GPU, such as 24GiB; enforced. [default: what is free]",
    )
    host_memory: int | None = option(
        None,
        is_size=True,
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
        help="Your own DeepSpeed JSON (ZeRO stage 3) instead of the one that follows from the model.",
    )


def _chat_options(variables: dict[str, Any] | None) -> ChatOptions:
    return ChatOptions().with_variables(variables or {})


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class JobOptions(Options):
    """What goes in, and where results go."""

    prompts: tuple[str, ...] = option((), flags=("--prompt",), help="A prompt; may be given many times.")
    input_files: tuple[str, ...] = option(
        (),
        flags=("-i", "--input-file"),
        help="Prompts: text (one a line), JSONL (`prompt` or `messages`), OpenAI batch lines, a JSON array, CSV, TSV, "
        "Parquet or Arrow, also packed by gzip or zstd; a file, folder, pattern or URL; - is stdin; may be given "
        "often.",
    )
    output_file: Path | None = option(
        None,
        flags=("-o", "--output-file"),
        help="Results, in input order: JSONL, Parquet or CSV by its ending; - is JSONL to stdout. Without it, in=/out= "
        "pairs go there.",
    )
    output_format: OutputFormat = option(
        "auto", help="What -o holds; auto goes by its ending, and answers OpenAI batches as OpenAI does."
    )
    input_format: InputFormat = option(
        "auto", help="What -i holds; auto goes by each file's ending and its first bytes."
    )
    shape: EntryShape = parts(
        EntryShape(),
        prompt_column=Option(
            flags=("--prompt-column",), help="The column (or key) that holds the prompt. [default: prompt]"
        ),
        messages_column=Option(
            flags=("--messages-column",), help="The column that holds chat messages. [default: messages]"
        ),
        id_column=Option(flags=("--id-column",), help="The column that holds the id. [default: id]"),
        template=Option(
            flags=("--template",),
            help="Make the prompt of an entry's columns, in Jinja2: 'Translate: {{ text }}', or @FILE; none may be "
            "missing.",
        ),
        chat=Option(flags=("--chat",), help="Prompts are user messages, and go through the model's chat template."),
        system=Option(flags=("--system",), help="The system message of chats that begin with none, or @FILE."),
        chat_options=Option(
            flags=("--chat-template-kwargs",),
            default=None,
            written=dict,
            convert=_chat_options,
            help="Variables of the model's chat template as JSON, such as '{\"enable_thinking\": false}'.",
        ),
        keep=Option(
            flags=("--keep-columns",),
            default=None,
            written=str,
            convert=_names,
            help="Columns of the input that the output has as well: NAME,NAME or all.",
        ),
        limit=Option(flags=("--limit",), minimum=1, help="Read so many entries only."),
        samples=Option(
            flags=("-n", "--samples"), minimum=1, maximum=128, help="Completions of each prompt. With --temperature."
        ),
    )
    overwrite: bool = option(False, help="Start anew: replace an existing output file and its journal.")
    resume: bool = option(False, help="Go on with a job that was stopped or killed; start it if there is none.")
    resume_anyway: bool = option(
        False,
        help="Go on although model, settings or input have changed: requests whose id and prompt are as before keep "
        "their results, the others run.",
    )
    max_error_rate: float = option(
        1.0, minimum=0, maximum=1, help="Run nothing if a larger share of the requests than this is refused."
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """How tokens are chosen, and when a completion ends."""

    sampling: Sampling = parts(
        max_new_tokens=Option(
            flags=("--max-new-tokens", "--max-tokens"),
            default=DEFAULT_NEW_TOKENS,
            minimum=1,
            help="Most tokens of a completion.",
        ),
        temperature=Option(flags=("--temperature",), minimum=0, help="0 is greedy."),
        top_p=Option(flags=("--top-p",), minimum=0, maximum=1, above=True, help="1 does not filter."),
        top_k=Option(flags=("--top-k",), minimum=0, help="0 does not filter."),
        min_p=Option(flags=("--min-p",), minimum=0, maximum=1, help="Least likelihood, as a share of the highest."),
        seed=Option(flags=("--seed",), help="A row's sample depends on the seed and its place in the input only."),
        stop=Option(flags=("--stop",), help="End a row at this text, which is left out; may be given many times."),
        ignore_eos=Option(flags=("--ignore-eos",), help="Go on past the end-of-sequence token."),
        presence_penalty=Option(
            flags=("--presence-penalty",), minimum=-2, maximum=2, help="Taken off scores of tokens generated before."
        ),
        frequency_penalty=Option(
            flags=("--frequency-penalty",), minimum=-2, maximum=2, help="The same, for each time."
        ),
        repetition_penalty=Option(
            flags=("--repetition-penalty",),
            minimum=0,
            maximum=100,
            above=True,
            help="Divides scores of tokens of prompt and completion; 1 does nothing.",
        ),
        min_tokens=Option(flags=("--min-tokens",), minimum=0, help="No end of a sequence, nor a stop, before so many."),
        logprobs=Option(
            flags=("--logprobs",),
            minimum=0,
            maximum=MOST_LOGPROBS,
            help="Tell each token's log-probability, and those of so many of the likeliest tokens. With -o.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(Options):
    """How many ranks are started, and where."""

    num_gpus: int | None = option(
        None, minimum=1, help="Start this many ranks, an independent stream on each GPU. [default: one]"
    )
    hostfile: Path | None = option(
        None,
        path="existing file",
        help="Start ranks on all nodes that it names, in DeepSpeed's form: `host slots=8` a line. Needs ssh and pdsh.",
    )


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(Options):
    """What is measured."""

    static_batches: bool = option(
        False,
        engine_specific=True,
        hidden=True,
        help="Admit sequences only when no other runs, to measure the gain.",
    )
    benchmark: bool = option(False, help="Warm up once and print the four figures of the BLOOM scripts.")
    repetitions: int = option(
        1,
        flags=("-r", "--repetitions"),
        minimum=1,
        help="Run the same requests so often once weights are loaded, each time measured. With --benchmark.",
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions(
    ModelOptions, RandomWeightsOptions, EngineOptions, OffloadOptions, ParallelOptions, LimitOptions, ZeroOptions
):
    """How a model is loaded and run, whatever for: what `zeroinf run` and the Python API have in common."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(LoadOptions, JobOptions, SamplingOptions, MeasureOptions):
    """One run, as it was asked for; nothing is resolved yet."""

    to_stdout: bool = False
    """Write JSON lines to standard output; without it and a file, in=/out= pairs go there."""
    resume_command: str = ""
    """What the user types to go on with this run."""


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Options):
    """What a plan is made for; None leaves it to the machine."""

    input_len: int = option(512, minimum=1, help="Tokens of the longest prompt.")
    output_len: int = option(
        128, flags=("--output-len", "--max-new-tokens"), minimum=1, help="Most tokens of a completion."
    )
    requests: int | None = option(None, minimum=1, help="Requests in all. [default: plenty]")
    num_gpus: int | None = option(None, minimum=1, help="Ranks, one on each GPU. [default: all GPUs]")
    tensor_parallel_size: int | None = option(
        None,
        flags=("-tp", "--tensor-parallel-size"),
        engine_specific=True,
        minimum=1,
        help="Ranks that hold one model together. With --engine tensor-parallel. [default: all]",
    )
    machine: str | None = option(None, help="A machine that is not here: a name in configs/machines, or doctor's JSON.")
    gpu_memory: int | None = option(None, is_size=True, help="Plan with at most this much of each GPU, such as 24GiB.")
    host_memory: int | None = option(None, is_size=True, help="Plan with this much host memory.")
    nvme_space: int | None = option(None, is_size=True, help="Plan with this much room on the disk.")
    link_gbps: float | None = option(None, minimum=0, above=True, help="Rate of each GPU's link, GB/s.")
    nvme_gbps: float | None = option(None, minimum=0, above=True, help="Rate of the disk, GB/s.")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ModelOptions, EngineOptions, OffloadOptions, MachineOptions):
    """A plan without a run, of this machine or another one."""

    @property
    def tensor_parallel(self) -> TensorParallel:
        return TensorParallel(size=self.tensor_parallel_size or 0)


@dataclass(frozen=True, kw_only=True)
class EvaluationLimits(LimitOptions):
    """The most that an evaluation may take of a machine."""

    gpu_memory: int | None = option(None, is_size=True, help="The most that may be taken of the GPU; enforced.")
    host_memory: int | None = option(None, is_size=True, help="The most host memory that may be taken.")


@dataclass(frozen=True, kw_only=True)
class ZeroRestOptions(RestOptions):
    """Where DeepSpeed's ZeRO leaves weights, with nothing to choose by itself."""

    offload: Offload = option(
        "cpu", help="Where weights rest: on the GPUs, in host memory, or in files below --nvme-path."
    )


@dataclass(frozen=True, kw_only=True)
class ZeroRankOptions(Options):
    """The ranks that a configuration of DeepSpeed is made for."""

    num_gpus: int = option(1, minimum=1, help="Ranks that share the weights; the numbers hold for just that many.")
    batch_size: int = option(8, flags=("-b", "--batch-size"), minimum=1, help="Rows that run together on each GPU.")


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(ModelOptions, ZeroRestOptions, OffloadOptions, ZeroRankOptions):
    """A configuration of DeepSpeed's ZeRO for a model."""
