"""The ZeRO config holds for every model shape and number of ranks; a user's own is refused where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.cli.config import config as config_command
from zeroinf.cli.params import SizeType
from zeroinf.engines.zero.config import (
    AIO_ALIGNED_BYTES,
    MIN_AIO_BYTES,
    NVME_POOL_TARGET_BYTES,
    build_zero_config,
    check_user_config,
    codes_of,
    nvme_pool_bytes,
)
from zeroinf.errors import OutputError, UsageError
from zeroinf.model.anatomy import Anatomy, Block, TensorSpec
from zeroinf.model.cache_layout import LayerCache
from zeroinf.model.dtypes import DTYPE_BYTES
from zeroinf.planner.choice import Offload
from zeroinf.planner.plan import AioSettings, Plan

REPOSITORY = Path(__file__).parents[2]
LAYERS = 3


def make_anatomy(
    *, hidden: int, inner: int, vocabulary: int, experts: int = 0, tied: bool = False, dtype: str = "bfloat16"
) -> Anatomy:
    """A Llama-like model; with `experts`, a Mixtral-like one, whose experts are two 3-D parameters of one module."""

    def spec(name: str, *shape: int, is_buffer: bool = False) -> TensorSpec:
        return TensorSpec(name=name, shape=shape, dtype=dtype, is_buffer=is_buffer)

    def block(index: int) -> Block:
        at = f"model.layers.{index}"
        tensors = [spec(f"{at}.self_attn.{p}_proj.weight", hidden, hidden) for p in "qkvo"]
        if experts:
            tensors.append(spec(f"{at}.mlp.gate.weight", experts, hidden))
            tensors.append(spec(f"{at}.mlp.experts.gate_up_proj", experts, 2 * inner, hidden))
            tensors.append(spec(f"{at}.mlp.experts.down_proj", experts, hidden, inner))
        else:
            tensors += [spec(f"{at}.mlp.{p}_proj.weight", inner, hidden) for p in ("gate", "up")]
            tensors.append(spec(f"{at}.mlp.down_proj.weight", hidden, inner))
        tensors += [spec(f"{at}.{norm}.weight", hidden) for norm in ("input_layernorm", "post_attention_layernorm")]
        return Block(index=index, tensors=tuple(tensors))

    outside = [
        spec("model.embed_tokens.weight", vocabulary, hidden),
        spec("model.norm.weight", hidden),
        spec("model.rotary_emb.inv_freq", hidden * 1000, is_buffer=True),
    ]
    if not tied:
        outside.append(spec("lm_head.weight", vocabulary, hidden))
    return Anatomy(
        architecture="LlamaForCausalLM",
        dtype=dtype,
        blocks_path="model.layers",
        blocks=tuple(block(i) for i in range(LAYERS)),
        outside=tuple(outside),
        tied=(("lm_head.weight", "model.embed_tokens.weight"),) if tied else (),
        cache=(LayerCache(fixed_bytes=0, bytes_per_token=4 * hidden),) * LAYERS,
        hidden_size=hidden,
        vocabulary=vocabulary,
        context_limit=None,
    )


def make_plan(anatomy: Anatomy, offload: Offload = "nvme", *, world_size: int = 1, **changes: Any) -> Plan:
    plan = Plan(
        anatomy=anatomy,
        engine="zero",
        offload=offload,
        dtype=anatomy.dtype,
        device="cuda",
        world_size=world_size,
        batch_size=8,
        nvme_paths=(Path("disk"),) if offload == "nvme" else (),
    )
    return replace(plan, **changes)


LLAMA_13B = make_anatomy(hidden=5120, inner=13824, vocabulary=32000)
MIXTRAL = make_anatomy(hidden=4096, inner=14336, vocabulary=32000, experts=8)
BLOOM = make_anatomy(hidden=14336, inner=4 * 14336, vocabulary=250880, tied=True)
HUGE_EMBEDDING = make_anatomy(hidden=64, inner=64, vocabulary=4_000_000)


@st.composite
def anatomies(draw: st.DrawFn) -> Anatomy:
    return make_anatomy(
        hidden=draw(st.integers(1, 5000)),
        inner=draw(st.integers(1, 20000)),
        vocabulary=draw(st.integers(1, 300_000)),
        experts=draw(st.sampled_from([0, 0, 4, 64])),
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    aio = AioSettings(
        block_size_bytes=draw(st.sampled_from([1 << 16, 1 << 20, 1 << 23])), threads=draw(st.integers(1, 32))
    )
    return make_plan(draw(anatomies()), world_size=draw(st.integers(1, 8)), aio=aio)


def zero_of(plan: Plan) -> dict[str, Any]:
    section: dict[str, Any] = build_zero_config(plan)["zero_optimization"]
    return section


def partition(numel: int, plan: Plan) -> int:
    return -(-numel // plan.world_size)


def disk_parameters(tensors: tuple[TensorSpec, ...], plan: Plan) -> list[TensorSpec]:
    least = max(MIN_AIO_BYTES, plan.aio.block_size_bytes)
    return [t for t in tensors if not t.is_buffer and partition(t.numel, plan) * DTYPE_BYTES[plan.dtype] >= least]


@given(plans())
def test_buffer_holds_the_largest_partition(plan: Plan) -> None:
    pool = zero_of(plan)["offload_param"]
    largest = max(partition(t.numel, plan) for t in plan.anatomy.tensors() if not t.is_buffer)
    alignment = AIO_ALIGNED_BYTES * plan.aio.threads // DTYPE_BYTES[plan.dtype]
    assert largest <= pool["buffer_size"] < largest + alignment
    assert pool["buffer_size"] % alignment == 0


@given(plans())
def test_a_fetch_finds_enough_buffers_and_one_to_read_ahead(plan: Plan) -> None:
    widest_module = 2 if any("experts" in t.name for t in disk_parameters(plan.anatomy.blocks[0].tensors, plan)) else 1
    anything = disk_parameters(tuple(plan.anatomy.tensors()), plan)
    assert zero_of(plan)["offload_param"]["buffer_count"] > (min(widest_module, len(anything)) if anything else 0)


def test_parameters_around_a_module_keep_their_buffers_while_it_runs() -> None:
    big = (2048, 2048)
    tensors = (
        TensorSpec(name="h.0.scale", shape=big, dtype="bfloat16"),
        TensorSpec(name="h.0.mlp.up", shape=big, dtype="bfloat16"),
        TensorSpec(name="h.0.mlp.down", shape=big, dtype="bfloat16"),
        TensorSpec(name="h.0.mlp_norm.weight", shape=big, dtype="bfloat16"),
    )
    anatomy = replace(LLAMA_13B, blocks=(Block(index=0, tensors=tensors),), outside=())
    pool = {"buffer_count": 2, "buffer_size": 2048 * 2048}
    with pytest.raises(UsageError, match="buffer_count is 2, but 3 parameters"):
        check_user_config(user_config(offload_param=pool), make_plan(anatomy))


@given(plans())
def test_pool_stays_small_unless_one_fetch_needs_more(plan: Plan) -> None:
    pool = zero_of(plan)["offload_param"]
    within_target = nvme_pool_bytes(plan) * plan.world_size <= NVME_POOL_TARGET_BYTES
    assert within_target or pool["buffer_count"] <= 3
    assert nvme_pool_bytes(plan) == pool["buffer_count"] * pool["buffer_size"] * DTYPE_BYTES[plan.dtype]


def test_pool_reads_two_blocks_ahead_where_there_is_room() -> None:
    assert zero_of(make_plan(LLAMA_13B))["offload_param"]["buffer_count"] == 1 + 2 * 7


def test_ranks_of_a_machine_share_the_pool() -> None:
    """Eight ranks with an eighth of every parameter each lock about as much as one rank with all."""
    one, eight = make_plan(LLAMA_13B), make_plan(LLAMA_13B, world_size=8)
    assert nvme_pool_bytes(eight) * 8 == pytest.approx(nvme_pool_bytes(one), rel=0.01)


def test_only_nvme_locks_a_pool() -> None:
    assert nvme_pool_bytes(make_plan(LLAMA_13B, "cpu")) == nvme_pool_bytes(make_plan(LLAMA_13B, "none")) == 0


@given(plans())
def test_live_parameters_never_starve_prefetch(plan: Plan) -> None:
    zero, anatomy = zero_of(plan), plan.anatomy
    modules = [t.numel for t in anatomy.outside if not t.is_buffer] + [b.parameters for b in anatomy.blocks]
    assert zero["stage3_max_live_parameters"] - max(modules) >= zero["stage3_prefetch_bucket_size"]
    assert zero["stage3_max_reuse_distance"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prefetch_counts_elements(dtype: str) -> None:
    """A prefetch in bytes would be two or four times two blocks, and the GPU memory for it."""
    block = 4 * 512 * 512 + 3 * 512 * 2048 + 2 * 512
    anatomy = make_anatomy(hidden=512, inner=2048, vocabulary=1000, dtype=dtype)
    assert zero_of(make_plan(anatomy))["stage3_prefetch_bucket_size"] == 2 * block


@given(plans())
def test_vectors_stay_on_the_gpu_and_little_else(plan: Plan) -> None:
    zero, anatomy = zero_of(plan), plan.anatomy
    parameters = [t for t in anatomy.tensors() if not t.is_buffer]
    threshold = zero["stage3_param_persistence_threshold"]
    assert all(t.numel <= threshold for t in parameters if len(t.shape) == 1)
    # DeepSpeed divides the bound on their sum by the ranks (`_update_persist_config`).
    bound = zero["stage3_model_persistence_threshold"] // plan.world_size
    assert bound == sum(t.numel for t in parameters if t.numel <= threshold)
    assert threshold == anatomy.hidden_size


@pytest.mark.parametrize("anatomy", [LLAMA_13B, MIXTRAL, BLOOM, HUGE_EMBEDDING])
@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_config_is_accepted_by_the_check_for_users(anatomy: Anatomy, offload: Offload, world_size: int) -> None:
    plan = make_plan(anatomy, offload, world_size=world_size)
    config = json.loads(json.dumps(build_zero_config(plan)))
    check_user_config(config, plan)
    assert nvme_pool_bytes(plan, config) == nvme_pool_bytes(plan)


def test_experts_are_fetched_together() -> None:
    """Both fused parameters of Mixtral's experts belong to one module, and one buffer holds the larger."""
    pool = zero_of(make_plan(MIXTRAL))["offload_param"]
    assert pool["buffer_size"] == 8 * 2 * 14336 * 4096
    assert pool["buffer_count"] >= 3


def test_aio_section_uses_keys_that_deepspeed_reads() -> None:
    aio = AioSettings(block_size_bytes=1 << 22, queue_depth=16, threads=4)
    config = build_zero_config(make_plan(LLAMA_13B, aio=aio))
    assert config["aio"] == {
        "block_size": 1 << 22,
        "queue_depth": 16,
        "intra_op_parallelism": 4,
        "single_submit": False,
        "overlap_events": True,
    }
    assert "max_in_cpu" not in config["zero_optimization"]["offload_param"]


@pytest.mark.parametrize(("dtype", "section"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", None)])
def test_dtype_section(dtype: str, section: str | None) -> None:
    config = build_zero_config(make_plan(make_anatomy(hidden=8, inner=8, vocabulary=8, dtype=dtype)))
    assert [key for key in ("bf16", "fp16") if key in config] == ([section] if section else [])


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
@pytest.mark.filterwarnings("default")
def test_deepspeed_accepts_and_reads_every_number(offload: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = build_zero_config(make_plan(LLAMA_13B, offload))
    read = DeepSpeedConfig(config)
    zero = config["zero_optimization"]
    assert read.zero_config.prefetch_bucket_size == zero["stage3_prefetch_bucket_size"]
    assert read.zero_config.max_live_parameters == zero["stage3_max_live_parameters"]
    assert read.zero_config.max_reuse_distance == 0
    assert read.zero_config.param_persistence_threshold == zero["stage3_param_persistence_threshold"]
    assert read.zero_config.model_persistence_threshold == zero["stage3_model_persistence_threshold"]
    assert read.bfloat16_config.enabled
    if offload == "none":
        assert read.zero_config.offload_param is None
    else:
        dumped = read.zero_config.offload_param.model_dump(mode="json")
        assert dumped | zero["offload_param"] == dumped
    if offload == "nvme":
        assert read.aio_config | config["aio"] == read.aio_config


def user_config(**zero: Any) -> dict[str, Any]:
    """A user's JSON that runs LLAMA_13B from NVMe, with `zero` changed; an `offload_param` is merged."""
    offload = {"device": "nvme", "nvme_path": "disk", "buffer_size": 2e8, "buffer_count": 5}
    offload |= zero.pop("offload_param", {})
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_param": offload, **zero},
    }


def coded(**codes: Any) -> dict[str, Any]:
    """The same with weights as DeepSpeed's own codes, with `codes` changed."""
    init = {"num_bits": 4, "group_size": 64, "group_dim": 1, "symmetric": False, **codes}
    config = user_config() | {"weight_quantization": {"quantized_initialization": init}}
    config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return config


def test_user_config_is_accepted() -> None:
    check_user_config(user_config(), make_plan(LLAMA_13B))
    assert codes_of(user_config()) == "model"


@pytest.mark.parametrize(("bits", "wire"), [(4, "int4"), (8, "int8")])
def test_deepspeeds_own_codes_are_accepted_and_named(bits: int, wire: str) -> None:
    check_user_config(coded(num_bits=bits), make_plan(LLAMA_13B, "cpu"))
    assert codes_of(coded(num_bits=bits)) == wire


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (user_config(stage=2), "stage is 2"),
        ({"bf16": {"enabled": True}}, "stage is 0"),
        (user_config(offload_param={"buffer_size": 1e8}), "buffer_size is 100000256 elements.* has 163840000"),
        (user_config(offload_param={"buffer_count": 0}), "buffer_count is 0, but 1 "),
        (user_config(offload_param={"max_in_cpu": 1e9}), "max_in_cpu is ignored"),
        (user_config(stage3_prefetch_bucket_size="auto"), "zero_optimization.stage3_prefetch_bucket_size is 'auto'"),
        (user_config(offload_optimizer={"device": "cpu"}), "zero_optimization.offload_optimizer has no effect"),
        (user_config() | {"aio": {"thread_count": 8}}, "aio.thread_count is ignored"),
        (user_config() | {"aio": {"queue_dept": 8}}, "aio.queue_dept is ignored"),
        (user_config() | {"aio": 8}, "aio is 8: an object is needed"),
        (user_config() | {"weight_quantization": {"post_init_quant": {}}}, "post_init_quant has no effect here"),
        (user_config() | {"optimizer": {"type": "Adam"}}, "optimizer has no effect"),
        (user_config() | {"scheduler": {"type": "WarmupLR"}}, "scheduler has no effect"),
        (user_config() | {"zero_optimisation": {}}, "zero_optimisation has no effect"),
        (user_config() | {"bf16": {"enabled": False}}, "bf16.enabled is false, but the model runs in bfloat16"),
        (user_config() | {"fp16": {"enabled": True}}, "fp16.enabled is true, but the model runs in bfloat16"),
    ],
)
def test_user_config_is_refused_by_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_user_config(config, make_plan(LLAMA_13B))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (coded(num_bits=3), "quantized_initialization.num_bits is 3"),
        (coded(symmetric=True), "quantized_initialization.symmetric is true"),
        (coded(group_dim=None), "quantized_initialization.group_dim is null"),
        (coded(group_size=0), "quantized_initialization.group_size is 0"),
        (coded(group_size=96), "group_size is 96, which does not divide .* with its shape"),
    ],
)
def test_codes_that_deepspeed_cannot_make_are_refused_by_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_user_config(config, make_plan(LLAMA_13B, "cpu"))


def test_codes_on_nvme_are_refused() -> None:
    config = user_config() | {"weight_quantization": coded()["weight_quantization"]}
    with pytest.raises(UsageError, match="has not been tried with offload_param"):
        check_user_config(config, make_plan(LLAMA_13B))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (user_config(offload_param={"device": "cpu"}), "nvme_path has no effect"),
        (user_config(offload_param={"device": "cpu"}) | {"aio": {"queue_depth": 8}}, "aio has no effect"),
    ],
)
def test_nvme_settings_without_nvme_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_user_config(config, make_plan(LLAMA_13B, "cpu"))


def test_users_buffer_may_be_as_small_as_a_partition() -> None:
    config = user_config(offload_param={"buffer_size": 82e6})
    check_user_config(config, make_plan(LLAMA_13B, world_size=2))
    with pytest.raises(UsageError, match="buffer_size"):
        check_user_config(config, make_plan(LLAMA_13B))


def test_users_pool_is_counted_from_the_users_numbers() -> None:
    plan = make_plan(LLAMA_13B)
    assert nvme_pool_bytes(plan, user_config(offload_param={"buffer_size": 512 * 10**6})) == 5 * 512 * 10**6 * 2
    left_out = user_config()
    del left_out["zero_optimization"]["offload_param"]["buffer_size"]
    assert nvme_pool_bytes(plan, left_out) == 5 * 100_000_256 * 2


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096B", 4096),
        ("4096B", 4096),
        ("24GiB", 24 << 30),
        ("512MiB", 512 << 20),
        ("1GB", 10**9),
        ("1.5GiB", 3 << 29),
        ("1 tib", 1 << 40),
        ("64kb", 64_000),
        ("3.6GiB", 3_865_470_566),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert SizeType()(text) == nbytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("24G", "'24G' is not a size: write 24GiB"),
        ("-1GiB", "is not a size"),
        ("much", "is not a size"),
        ("24", "24 what[?] write 24GiB"),
        ("24576", "24576 what[?] write 24576MiB"),
        ("25769803776", "25769803776 what[?] write 25769803776B"),
        ("0B", "must be a whole number of bytes above zero"),
        ("1.3B", "must be a whole number of bytes above zero"),
    ],
)
def test_sizes_that_are_none(text: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        SizeType()(text)


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(config_command, arguments, env=environment, auto_envvar_prefix="ZEROINF_CONFIG")


@pytest.fixture
def known_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """`--model` is LLAMA_13B; returns what was asked of `resolve_model`."""
    asked: dict[str, Any] = {}

    def resolve_model(name: str, **rest: Any) -> Any:
        asked.update(rest, name=name)
        return type("Source", (), {"config": None})

    monkeypatch.setattr("zeroinf.options.model.resolve_model", resolve_model)
    monkeypatch.setattr("zeroinf.options.model.pick_dtype", lambda requested, source, device: "bfloat16")
    monkeypatch.setattr("zeroinf.options.model.read_anatomy", lambda config, **rest: LLAMA_13B)
    return lambda: asked


@pytest.mark.usefixtures("known_model")
def test_command_prints_the_json_and_nothing_else() -> None:
    arguments = ["-m", "x", "--offload", "nvme", "--nvme-path", "disk", "--num-gpus", "2", "-b", "4"]
    result = invoke(*arguments, "--aio-block-size", "2MiB", "--aio-threads", "2")
    expected = make_plan(LLAMA_13B, world_size=2, batch_size=4, aio=AioSettings(block_size_bytes=2 << 20, threads=2))
    assert json.loads(result.stdout) == build_zero_config(expected)
    assert result.stderr == ""


@pytest.mark.usefixtures("known_model")
def test_command_writes_a_new_file_only(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    result = invoke("-m", "x", "-o", str(file))
    assert (result.exit_code, result.stdout) == (0, "")
    written = file.read_text()
    assert json.loads(written) == build_zero_config(make_plan(LLAMA_13B, "cpu"))
    assert isinstance(invoke("-m", "x", "-o", str(file)).exception, OutputError)
    assert isinstance(invoke("-m", "x", "-o", str(tmp_path / "none" / "zero.json")).exception, OutputError)
    assert file.read_text() == written


@pytest.mark.parametrize(("arguments", "catalog_will_do"), [((), True), (("--revision", "step1000"), False)])
def test_a_revision_is_never_answered_from_the_catalog(
    known_model: Callable[[], dict[str, Any]], arguments: tuple[str, ...], catalog_will_do: bool
) -> None:
    assert invoke("-m", "x", *arguments).exit_code == 0
    assert known_model()["random_weights"] is catalog_will_do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--offload", "nvme"], "--offload nvme needs --nvme-path"),
        (["--nvme-path", "disk"], "--nvme-path has no effect with --offload cpu"),
        (["--offload", "none", "--aio-threads", "8"], "--aio-threads has no effect with --offload none"),
        (["--aio-block-size", "1MiB", "--aio-queue-depth", "32"], "--aio-block-size, --aio-queue-depth has no effect"),
        (["--offload", "none", "--no-pin-memory"], "--no-pin-memory has no effect with --offload none"),
    ],
)
def test_options_without_effect_are_refused(arguments: list[str], message: str) -> None:
    error = invoke("-m", "x", *arguments).exception
    assert isinstance(error, UsageError)
    assert error.message.startswith(message)


def test_an_option_in_the_environment_counts_as_given() -> None:
    error = invoke("-m", "x", ZEROINF_CONFIG_AIO_THREADS="4").exception
    assert isinstance(error, UsageError)
    assert error.message == "--aio-threads has no effect with --offload cpu"


def test_block_size_must_suit_direct_io() -> None:
    result = invoke("-m", "x", "--offload", "nvme", "--nvme-path", "disk", "--aio-block-size", "1000000B")
    assert result.exit_code == 2
    assert "'1000000B' must be a multiple of 4096 bytes" in result.output


def test_committed_presets_are_what_the_builder_makes() -> None:
    path = REPOSITORY / "scripts" / "make-zero-presets"
    loader = SourceFileLoader("make_zero_presets", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    script = module_from_spec(spec)
    loader.exec_module(script)
    committed = {file.name: file.read_text(encoding="utf-8") for file in (REPOSITORY / "configs" / "zero").iterdir()}
    assert committed == script.render(), "run scripts/make-zero-presets"
