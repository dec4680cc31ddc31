"""Names that options have elsewhere lead to ours, on the command line and from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import pytest
import torch

import zeroinf
from zeroinf.cli.main import cli
from zeroinf.errors import UsageError
from zeroinf.options import foreign
from zeroinf.options.definition import definitions, from_keywords
from zeroinf.options.foreign import advice
from zeroinf.options.options import LoadOptions, PlanOptions
from zeroinf.sizes import Share


def flags_of(name: str) -> dict[str, str]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    flags = [flag for one in command.params for flag in one.opts if flag.startswith("--")]
    return {flag[2:].replace("-", "_"): flag for flag in flags}


FLAGS = flags_of("run") | flags_of("plan") | flags_of("serve") | flags_of("bench")


def test_what_names_elsewhere_lead_to_is_there() -> None:
    """A flag that is renamed is renamed here, too, and no name leads to itself."""
    for name, row in foreign._FOREIGN.items():
        assert set(row.ours) <= FLAGS.keys(), name
        said = advice(name, FLAGS if name not in FLAGS else {})
        assert said is not None or name in FLAGS, name
        words = (said or "").replace(":", " ").replace(";", " ").replace(",", " ").split()
        assert {word for word in words if word.startswith("--")} <= set(FLAGS.values()), name


def test_a_command_is_told_of_flags_that_it_has() -> None:
    assert advice("--max-length", flags_of("run")) == "zeroinf calls it --max-new-tokens: it counts new tokens only"
    assert advice("--max-seq-len", flags_of("serve")) == "zeroinf calls it --max-model-len"
    assert advice("--num-prompts", flags_of("run")) == "zeroinf calls it --limit"
    assert advice("--num-prompts", flags_of("plan")) == "zeroinf calls it --requests"
    assert advice("--something-else", flags_of("run")) is None


@pytest.mark.parametrize(
    ("function", "keyword", "said"),
    [
        (zeroinf.generate, {"max_tokens": 8}, "zeroinf calls it max_new_tokens"),
        (zeroinf.generate, {"num_return_sequences": 2}, "zeroinf calls it n"),
        (zeroinf.pipeline, {"torch_dtype": "auto"}, "zeroinf calls it dtype"),
        (zeroinf.pipeline, {"tensor_parallel_size": 2}, "zeroinf calls it"),
        (zeroinf.pipeline, {"device_map": "auto"}, "the plan places layers; gpu_memory and host_memory bound it"),
        (zeroinf.plan, {"gpu_memory_utilization": 0.9}, "zeroinf calls it gpu_memory: 90% where 0.9 stands"),
        (zeroinf.plan, {"nvme_path": "x"}, "zeroinf calls it nvme_paths"),
        (zeroinf.plan, {"gpu_mem": "20GiB"}, "did you mean gpu_memory?"),
        (zeroinf.plan, {"unlike_anything": 1}, "it has model, engine, offload"),
    ],
)
def test_a_keyword_of_another_program_is_refused_with_ours(
    function: Callable[..., Any], keyword: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}\\(\\) has no keyword") as caught:
        function("demo", **keyword)
    assert isinstance(caught.value, UsageError)
    assert said in str(caught.value)


@pytest.mark.parametrize(("written", "dtype"), [("half", "float16"), ("fp32", "float32"), (torch.bfloat16, "bfloat16")])
def test_a_dtype_from_python_has_its_other_names(written: Any, dtype: str) -> None:
    assert from_keywords(LoadOptions, {"model": "demo", "dtype": written}).dtype == dtype


def test_a_size_without_a_unit_is_asked_about() -> None:
    with pytest.raises(UsageError, match="gpu_memory=24 is 24 bytes") as caught:
        from_keywords(PlanOptions, {"model": "demo", "gpu_memory": 24})
    assert caught.value.hint == 'write gpu_memory="24GiB"'
    with pytest.raises(UsageError, match="host_memory: 64 what\\? write 64GiB"):
        from_keywords(PlanOptions, {"model": "demo", "host_memory": "64"})
    assert from_keywords(PlanOptions, {"model": "demo", "gpu_memory": 24 << 30}).gpu_memory == 24 << 30


def test_a_share_of_the_gpu_is_written_with_its_sign() -> None:
    assert from_keywords(PlanOptions, {"model": "demo", "gpu_memory": "90%"}).gpu_memory == Share(0.9)
    with pytest.raises(UsageError) as caught:
        from_keywords(PlanOptions, {"model": "demo", "gpu_memory": 0.9})
    assert caught.value.hint == 'write gpu_memory="90%"'


def test_every_option_stands_in_a_section_of_help() -> None:
    unsorted = [
        one.flag for group in (LoadOptions, PlanOptions) for one in definitions(group) if one.option.section == "other"
    ]
    assert unsorted == []
