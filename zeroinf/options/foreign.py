"""Names that options have in vLLM, transformers, accelerate, DeepSpeed, llama.cpp and FlexGen, and what zeroinf calls
them.

`advice` answers for flags of the command line and for keywords of Python alike. It is needed only once a name was
refused, so nothing else imports this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

_ALIKE = 0.7


@dataclass(frozen=True, slots=True)
class ForeignOption:
    """An option elsewhere. Our options are written as flags without dashes in front, with underscores."""

    ours: tuple[str, ...] = ()
    """What does the same here; where a command lacks the first, the next."""
    note: str = ""
    """What to write there, where it is more than another name; `{option}` stands for one of ours."""
    otherwise: str = ""
    """What to do where nothing of ours does the same."""


def advice(name: str, known: Mapping[str, str]) -> str | None:
    """Advice on what to write instead of the unknown option `name`; None where nothing is like it.

    `known` are the options that may be written, by their flags without dashes in front and with underscores, each as it
    is written: `{"gpu_memory": "--gpu-memory"}` on the command line.
    """
    plain = name.strip("-").replace("-", "_")
    if plain in known:
        return f"zeroinf calls it {known[plain]}"
    found = _FOREIGN.get(plain) or _FOREIGN.get(plain.lower())
    if found is not None:
        written = next((known[one] for one in found.ours if one in known), None)
        if written is not None:
            note = found.note.format_map(_Written(known))
            return f"zeroinf calls it {written}{f': {note}' if note else ''}"
        if found.otherwise:
            return found.otherwise.format_map(_Written(known))
    near = get_close_matches(plain, known, n=1, cutoff=_ALIKE)
    return f"did you mean {known[near[0]]}?" if near else None


def is_foreign(name: str) -> bool:
    """Whether `name` is an option elsewhere, in so many letters."""
    return name.strip("-").replace("-", "_") in _FOREIGN


class _Written(dict[str, str]):
    """Writes options as the user does; those that a command lacks, as flags."""

    def __missing__(self, name: str) -> str:
        return f"--{name.replace('_', '-')}"


def _rows() -> Iterator[tuple[str, ForeignOption]]:
    """Names elsewhere, between blanks, each line with what it is here."""

    def same(names: str, ours: str, note: str = "", otherwise: str = "") -> tuple[str, ForeignOption]:
        return names, ForeignOption(tuple(ours.split()), note, otherwise)

    def none(names: str, otherwise: str) -> tuple[str, ForeignOption]:
        return names, ForeignOption(otherwise=otherwise)

    # Which model
    yield same("model_name_or_path pretrained_model_name_or_path model_name model_id model_path", "model")
    yield same("hf hf_repo hfr hff hf_file", "model", "a hub id, a folder or a .gguf file")
    yield same("torch_dtype data_type precision", "dtype")
    yield same("fp16 half", "dtype", "{dtype} float16")
    yield same("bf16", "dtype", "{dtype} bfloat16")
    yield same("fp32", "dtype", "{dtype} float32")
    yield same("load_in_8bit", "wire", "{wire} int8")
    yield same("load_in_4bit compress_weight quant_bits quant_bit num_bits", "wire", "{wire} int4, or int8")
    yield same("quantization quantization_config", "wire", "for weights that are not quantized; others are recognised")
    yield none("tokenizer tokenizer_name tokenizer_mode", "the model's own is used: put yours into its folder")
    yield none("cache_dir download_dir", "set HF_HOME in the environment: the folder of Hugging Face's libraries")
    yield none("local_files_only offline", "set HF_HUB_OFFLINE=1 in the environment")
    yield none("token hf_token use_auth_token", "log in with `hf auth login`, or set HF_TOKEN in the environment")
    # Memory
    sized = "90% where 0.9 stands elsewhere, or a size"
    yield same("gpu_memory_utilization mem_fraction_static gpu_memory_fraction", "gpu_memory", sized)
    yield same("max_memory max_gpu_memory", "gpu_memory", "a size such as 20GiB; {host_memory} bounds host memory")
    yield same("max_cpu_memory cpu_memory", "host_memory")
    yield same("cpu_offload offload_params", "offload", "{offload} cpu")
    yield same("cpu_offload_gb", "offload", "{offload} cpu; what fits stays on the GPU by itself")
    yield same("disk_offload nvme_offload", "offload", "{offload} nvme, with {nvme_path} DIR")
    yield same("offload_dir offload_folder offload_directory nvme_offload_dir nvme_dir swap_dir", "nvme_path")
    yield same("kv_offload no_kv_offload nkvo swap_space pin_kv_cache", "kv", "{kv} host")
    yield same("kv_cache_dtype cache_type_k cache_type_v ctk ctv", "kv_dtype", "{kv_dtype} int8")
    yield same("n_gpu_layers gpu_layers ngl", "resident_blocks", "layers that stay on the GPU; the plan knows them")
    yield none("device_map", "the plan places layers; {gpu_memory} and {host_memory} bound it")
    yield none("low_cpu_mem_usage no_mmap mmap mlock", "nothing: weights are held once, in locked memory")
    plans = "memory is planned for the prompts of the job; {max_new_tokens} bounds what is added"
    whole = "max_seq_len max_position_embeddings ctx_size c context_length max_context_len max_model_len"
    yield same(whole, "max_model_len max_prompt_tokens input_len", "", plans)
    yield same("prompt_len prompt_length max_input_len max_prompt_len", "input_len max_prompt_tokens", "", plans)
    yield same("input_len input_length", "input_len max_prompt_tokens", "", plans)
    # Speed
    yield same("max_num_seqs per_device_eval_batch_size bs batch gpu_batch_size parallel np", "batch_size")
    yield none("max_num_batched_tokens ubatch_size ub enable_chunked_prefill", "nothing: the plan sizes each pass")
    yield same("enable_prefix_caching cache_prompt", "share_prefixes")
    yield none("threads t cpu_threads", "set OMP_NUM_THREADS in the environment")
    yield none("enforce_eager attn_implementation flash_attn fa use_flash_attention use_cache", "nothing: it is chosen")
    yield none("percent", "nothing: the plan chooses the shares; {gpu_memory} and {host_memory} bound it")
    # Several GPUs
    ranks = "an independent stream on each GPU"
    yield same("num_gpu n_gpu gpus nproc_per_node world_size data_parallel_size dp dp_size", "num_gpus", ranks)
    yield same("tp_size tensor_parallel tensor_parallel_size tp", "num_gpus", ranks)
    yield same("pipeline_parallel_size pp pp_size", "num_gpus", ranks)
    yield none("device main_gpu mg", "set CUDA_VISIBLE_DEVICES, or DS_ACCELERATOR=cpu, in the environment")
    yield none("distributed_executor_backend", "nothing: {num_gpus} or {hostfile} start ranks, {ray} runs on a cluster")
    # DeepSpeed
    yield same("deepspeed_config ds_config", "zero_config")
    yield same("pin_weight pinned", "pin_memory")
    yield same("replace_with_kernel_inject replace_method use_kernel", "kernel_inject")
    # Input and output
    yield same("file f in input prompts_file prompt_file dataset dataset_name dataset_path data", "input_file")
    yield same("output out output_path save_path results", "output_file")
    yield same("p prompts text query", "prompt", "it may be given many times")
    yield same("json jsonl", "format", "", "JSON lines on standard output: {output_file} -")
    yield same("system_prompt sys", "system")
    yield same("apply_chat_template conversation cnv", "chat")
    yield none("chat_template", "the model's own is used: put yours into its folder; {template} is for plain prompts")
    yield same("num_prompts max_samples num_samples max_examples", "requests limit")
    yield same("log_file metrics_file json_file", "report")
    # Sampling
    new = "it counts new tokens only"
    yield same("max_length", "max_new_tokens output_len", new)
    yield same("n_predict predict num_predict n", "max_new_tokens output_len")
    yield same("max_tokens max_new_tokens max_completion_tokens max_output_tokens", "max_new_tokens output_len")
    yield same(
        "gen_len max_gen_len max_gen_toks generation_length output_len output_length", "max_new_tokens output_len"
    )
    yield same("min_length", "min_tokens", new)
    yield same("min_new_tokens", "min_tokens")
    yield same("temp", "temperature")
    yield same("do_sample", "temperature", "above 0 it samples")
    yield same("repeat_penalty", "repetition_penalty")
    yield same("random_seed s", "seed")
    yield same("num_return_sequences best_of", "samples")
    yield same("stop_sequences stop_strings stop_sequence reverse_prompt antiprompt", "stop")
    yield same("guided_json structured_outputs response_format", "json_schema")
    yield same("guided_regex", "regex")
    yield same("guided_choice", "choices")
    yield none(
        "guided_grammar grammar grammar_file",
        "requests have it, as their response_format; for all: {json_schema}, {regex} and {choices}",
    )
    yield none("num_beams use_beam_search", "there is no beam search; {samples} asks for several samples of a prompt")
    yield none("typical_p mirostat tfs", "not supported; {temperature}, {top_p}, {top_k} and {min_p} are")
    yield none("sampling_params generation_config", "its settings are options of their own, such as {temperature}")
    # The program
    yield same("verbose v verbosity log_level", "explain", "", "nothing: notes stand on stderr")
    yield same("disable_log_stats disable_log_requests log_disable silent no_progress", "quiet")
    yield same("num_trials trials num_iters iterations", "repetitions")
    yield same("perf_mode bench", "benchmark")


_FOREIGN = {name: row for names, row in _rows() for name in names.split()}
