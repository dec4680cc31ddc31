"""`zeroinf plan` on the command line: what it prints, what it refuses, and with which code it ends."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from simulating import shared_simulations

from zeroinf.cli.main import cli
from zeroinf.errors import DoesNotFitError, UsageError, ZeroinfError
from zeroinf.model import inspect
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.catalog import catalog_config
from zeroinf.model.inspect import read_anatomy

MODEL = ("--model", "pythia-70m")
BOX = ("--gpu-memory", "2GiB", "--host-memory", "16GiB", "--nvme-space", "10GiB")
BLOOM = ("--model", "bloom-176b", "--machine", "8xA100-80GB-512GiB", "--engine", "zero", "--offload", "none")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments])


def printed(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exception is None, result.exception
    assert result.exit_code == 0
    return result.stdout


def refused(*arguments: str, error: type[ZeroinfError] = UsageError) -> ZeroinfError:
    found = run(*arguments).exception
    assert isinstance(found, error), found
    return found


def document(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(*arguments, "--json", "--no-advice"))
    return found


@pytest.fixture(scope="module", autouse=True)
def _each_model_is_counted_and_simulated_once() -> Iterator[None]:
    """Counting a large model takes longer than all else that a plan does."""
    known: dict[tuple[str, str], Anatomy] = {}

    def once(config: Any, *, dtype: str, **more: Any) -> Anatomy:
        key = (config.to_json_string(), dtype)
        if key not in known:
            known[key] = read_anatomy(config, dtype=dtype, **more)
        return known[key]

    with pytest.MonkeyPatch.context() as patch, shared_simulations():
        patch.setattr(inspect, "read_anatomy", once)
        yield


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return document(*MODEL, *BOX)


def test_json_has_the_keys_that_the_readme_documents(plan: dict[str, Any]) -> None:
    assert list(plan) == ["schema", "model", "machine", "job", "plan", "alternatives", "rates"]
    assert plan["schema"] == 1
    assert {
        "architecture",
        "dtype",
        "parameters",
        "weight_bytes",
        "blocks",
        "block_bytes",
        "kv_bytes_per_token",
    } <= set(plan["model"])
    assert {
        "engine", "offload", "fetch", "batch_size", "micro_batch_rows", "prefill_tokens", "forward_tokens",
        "graph_tokens", "host_rows", "kv_dtype", "embeddings", "expert_parts", "routed_tokens",
        "resident_blocks", "nvme_blocks", "host_units", "wire",
        "world_size", "load_s", "prefill_s", "decode_s", "tokens_per_second", "streamed_bytes",
        "fetched_bytes", "binds", "entering_rows", "memory",
    } == set(plan["plan"])  # fmt: skip
    assert set(plan["rates"]) >= {"link_gbps", "disk_gbps", "tflops", "projected"}


def test_what_vllm_calls_lengths_and_gpu_memory_is_taken() -> None:
    card = (*MODEL, "--machine", "1xRTX4090-24GB-64GiB", "--output-len", "28")
    theirs = document(*card, "--max-model-len", "128", "--gpu-memory-utilization", "0.5")
    assert (theirs["job"]["prompt_tokens"], theirs["job"]["new_tokens"]) == (100, 28)
    ours = document(*card, "--input-len", "100", "--gpu-memory", "50%")
    assert theirs == ours
    whole = document(*card, "--input-len", "100")
    limits = [one["plan"]["memory"]["gpu"]["available_bytes"] for one in (ours, whole)]
    assert limits[0] < 0.51 * limits[1]


def test_json_has_the_advice_of_the_page() -> None:
    page, found = printed(*MODEL, *BOX), json.loads(printed(*MODEL, *BOX, "--json"))
    assert found["advice"]
    for one in found["advice"]:
        assert list(one) == [
            "flags", "quality", "offload", "batch_size", "tokens_per_second", "first_token_s", "job_s",
        ]  # fmt: skip
        (line,) = (line for line in page.splitlines() if line.startswith(f"     {one['flags']}  "))
        assert f"{one['tokens_per_second']:,.0f} tokens/s" in line
        assert line.endswith(one["quality"])
        assert one["job_s"] > one["first_token_s"] > 0


def test_json_terms_add_up_to_what_is_needed_and_fit(plan: dict[str, Any]) -> None:
    for one in (plan["plan"], *(one for one in plan["alternatives"] if one["fits"])):
        assert set(one["memory"]) == {"gpu", "host", "disk"}
        for place in one["memory"].values():
            assert sum(term["bytes"] for term in place["terms"]) == place["needed_bytes"] <= place["available_bytes"]
            assert all(term["origin"] and term["name"] for term in place["terms"])


def test_json_says_what_the_others_would_give_or_lack() -> None:
    machine = ("--gpu-memory", "6GiB", "--host-memory", "32GiB")
    found = document("--model", "llama-3-8b", *machine, "--input-len", "32", "--output-len", "8", "-b", "1")
    by_offload = {one["offload"]: one for one in found["alternatives"]}
    assert not by_offload["none"]["fits"]
    (shortage,) = by_offload["none"]["shortages"]
    assert shortage["place"] == "gpu"
    assert shortage["needed_bytes"] > shortage["available_bytes"] == 6 << 30
    assert by_offload["none"]["reason"].startswith("1 sequence needs")


def test_the_page_shows_plan_bars_and_what_was_not_measured() -> None:
    page = printed(*MODEL, *BOX)
    for words in (
        "plan     stream engine, offload",
        "; batch ",
        "first token after ",
        "1,000 requests in ",
        "tokens/s expected",
        "gpu  [#",
        "host [#",
        "estimated (this machine was not measured: run `zeroinf doctor --measure`)",
    ):
        assert words in page


def test_explain_prints_every_term_and_every_rate(plan: dict[str, Any]) -> None:
    page = printed(*MODEL, *BOX, "--explain")
    for place in plan["plan"]["memory"].values():
        for term in place["terms"]:
            assert f"{term['name']} ({term['origin']})" in page
    for rate in ("link", "disk", "all-gather", "TFLOPS", "GPU memory", "a launch"):
        assert rate in page.partition("rates: ")[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--json", "--explain"], "--explain"),
        (["--emit-zero-config"], "--emit-zero-config"),
        (["--engine", "zero", "--emit-zero-config", "--json"], "--emit-zero-config"),
        (["--engine", "zero", "--fetch", "replicated"], "--fetch"),
        (["--engine", "zero", "--wire", "int8"], "--wire"),
        (["--engine", "zero", "--resident-blocks", "1"], "--resident-blocks"),
        (["--offload", "none", "--resident-blocks", "1"], "--resident-blocks"),
        (["--offload", "none", "--num-gpus", "2", "--fetch", "replicated"], "--fetch"),
        (["--offload", "none", "--link-gbps", "5"], "--link-gbps"),
        (["--offload", "none", "--no-pin-memory"], "pin-memory"),
        (["--offload", "cpu", "--nvme-space", "1GiB"], "--nvme-space"),
        (["--offload", "cpu", "--nvme-gbps", "3"], "--nvme-gbps"),
        (["--offload", "cpu", "--nvme-path", "."], "--nvme-path"),
        (["--offload", "cpu", "--aio-threads", "2"], "--aio-threads"),
        (["--offload", "nvme"], "--nvme-path"),
        (["--nvme-gbps", "3"], "--nvme-gbps"),
        (["--no-pin-memory"], "--no-pin-memory"),
        (["--fetch", "partitioned"], "--fetch partitioned"),
        (["--resident-blocks", "7"], "--resident-blocks 7, but the model has 6 layers"),
        (["--input-len", "2000", "--output-len", "49"], "2049 positions, the model's context is 2048"),
        (["--machine", "1xH200", "--nvme-path", "."], "--nvme-path"),
        (["--nvme-path", "no/such/folder"], "--nvme-path no/such/folder"),
        (["--plot", "no/such/folder/plan.png"], "--plot"),
        (["--html", "no/such/folder/plan.html"], "--html"),
        (["--dark"], "--dark"),
    ],
)
def test_what_contradicts_itself_or_would_have_no_effect_is_refused_by_name(arguments: list[str], named: str) -> None:
    machine = () if "--machine" in arguments else ("--gpu-memory", "2GiB", "--host-memory", "16GiB")
    error = refused(*MODEL, *machine, *arguments)
    assert error.exit_code == 2
    assert named in error.message
    assert error.hint


def test_an_unknown_machine_names_those_that_are_known() -> None:
    error = refused(*MODEL, "--machine", "8xA100-80GB")
    assert "8xA100-80GB-512GiB" in (error.hint or "")
    assert error.exit_code == 2


def test_without_a_gpu_flags_of_gpus_are_refused_and_a_plan_is_made_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--num-gpus" in refused(*MODEL, "--num-gpus", "2").message
    assert "no GPU: computes on the CPU" in printed(*MODEL, "--host-memory", "8GiB", "--input-len", "16")


def test_what_does_not_fit_ends_with_3_and_a_hint_that_is_true() -> None:
    small = ("--gpu-memory", "2GiB", "--host-memory", "1GiB")
    error = refused(*MODEL, *small, error=DoesNotFitError)
    assert error.exit_code == 3
    assert "1.00 GiB are there" in error.message
    more = re.search(r"([\d.]+) GiB more host memory: [\d.,]+ tokens/s or more", error.hint or "")
    assert more is not None, error.hint
    printed(*MODEL, "--gpu-memory", "2GiB", "--host-memory", f"{ceil((1 + float(more[1])) * 1024)}MiB")


def test_a_batch_that_is_too_large_is_told_what_would_fit() -> None:
    tight = ("--gpu-memory", "2GiB", "--host-memory", "16GiB", "--input-len", "1900", "--output-len", "100")
    error = refused(*MODEL, *tight, "-b", "4000", error=DoesNotFitError)
    assert "offload cpu: 4000 sequences, KV cache of 4000 in host memory, need" in error.message
    assert "--batch-size auto: " in (error.hint or "")
    printed(*MODEL, *tight)


@pytest.mark.parametrize(("new", "rows"), [(1, 2), (2, 2)])
def test_the_shortest_generations_can_be_planned(new: int, rows: int) -> None:
    found = document(*MODEL, *BOX, "--output-len", str(new), "-b", str(rows))
    assert (found["job"]["new_tokens"], found["plan"]["batch_size"]) == (new, rows)


@pytest.mark.parametrize("model", ["falcon-7b", "mixtral-8x7b"])
def test_dtypes_other_than_the_models_own_can_be_planned(model: str) -> None:
    machine = ("--machine", "1xH200", "-b", "1", "--input-len", "8", "--output-len", "3")
    assert document("--model", model, *machine, "--dtype", "float16")["model"]["dtype"] == "float16"


def test_what_the_user_says_of_the_machine_is_planned_with() -> None:
    given = ("--offload", "cpu", "--resident-blocks", "2", "-b", "3", "--num-gpus", "2", "--fetch", "replicated")
    found = document(*MODEL, "--gpu-memory", "4GiB", "--host-memory", "16GiB", "--link-gbps", "7", *given)
    plan = found["plan"]
    assert [gpu["free_bytes"] for gpu in found["machine"]["gpus"]] == [4 << 30] * 2
    assert (plan["offload"], plan["fetch"], plan["batch_size"], plan["resident_blocks"]) == ("cpu", "replicated", 3, 2)
    assert found["rates"]["link_gbps"] == 7
    assert plan["memory"]["gpu"]["available_bytes"] == 4 << 30


def test_a_disk_of_another_machine_can_be_planned_with() -> None:
    found = document(*MODEL, "--machine", "1xH200", "--offload", "nvme", "--nvme-space", "2GiB", "--nvme-gbps", "3")
    assert found["plan"]["nvme_blocks"] > 0
    assert found["plan"]["memory"]["disk"]["available_bytes"] == 2 << 30
    assert found["rates"]["disk_gbps"] == 3


@pytest.mark.parametrize("offload", [["cpu"], ["nvme", "--nvme-path", "."]])
def test_the_zero_config_is_the_one_that_config_prints(offload: list[str]) -> None:
    asked = (*MODEL, "-b", "4", "--offload", *offload, "--num-gpus", "2")
    machine = ("--gpu-memory", "4GiB", "--host-memory", "32GiB")
    emitted = json.loads(printed(*asked, *machine, "--engine", "zero", "--emit-zero-config"))
    assert emitted == json.loads(CliRunner().invoke(cli, ["config", *asked]).stdout)


def test_plot_writes_a_png_of_memory_by_kind_and_of_tokens_against_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from zeroinf.bench.plot_style import DARK, KINDS, LIGHT
    from zeroinf.cli import plan_plot

    drawn: list[Any] = []
    draw = plan_plot.plan_drawing
    monkeypatch.setattr(plan_plot, "plan_drawing", lambda *asked: drawn.append(draw(*asked)) or drawn[-1])
    file = tmp_path / "plan"
    page = tmp_path / "plan.html"
    printed(*MODEL, *BOX, "--no-advice", "--plot", str(file), "--dark", "--html", str(page))
    assert file.read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    assert drawn[0].get_suptitle() == "pythia-70m on generic GPU"
    assert "512 prompt and 128 new tokens" in drawn[0].texts[-1].get_text()
    kinds = [text.get_text() for text in left.get_legend().get_texts()]
    assert kinds == [kind for kind in KINDS if kind in kinds], "each once, in the same order"
    assert any(re.fullmatch(r"GPU: [\d.]+ GiB of 2.00 GiB, \d+ %", text.get_text()) for text in left.texts)
    assert drawn[0].get_facecolor()[:3] != (1, 1, 1), "on dark ground"
    assert right.get_ylabel() == "tokens/s (estimated)"
    assert len(right.lines[0].get_xdata()) > 1
    assert [tick.get_text() for tick in right.get_xticklabels()][:1] == ["1"], "no powers"
    assert len(set(LIGHT.kinds)) == len(set(DARK.kinds)) == len(KINDS)
    check_page(page.read_text())


def check_page(page: str) -> None:
    """A page that needs nothing but itself, and that its own policy allows."""
    style = re.search(r"<style>(.*)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in page
    assert not re.search(r"<script|<link|<img|https?:|url\(|\sstyle=|\son\w+=", page)
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []
    for words in ("<h1>pythia-70m on generic GPU</h1>", "tokens a second", "for 1,000 requests", "KV cache</td>"):
        assert words in page


class _Balanced(HTMLParser):
    """The elements that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass


def test_a_page_shows_changes_with_bars_and_writes_names_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "<b>model"
    catalog_config("pythia-70m").save_pretrained(folder)
    page = tmp_path / "plan.html"
    few = ("-b", "2", "--input-len", "16", "--output-len", "4", "--offload", "cpu")
    printed("--model", str(folder), "--gpu-memory", "2GiB", "--host-memory", "16GiB", *few, "--html", str(page))
    found = page.read_text()
    assert "<h1>&lt;b&gt;model on generic GPU</h1>" in found
    assert "<code>--wire int4</code>" in found
    widths = [float(width) for width in re.findall(r'<rect class=(?:ours|other) rx=2 width="([\d.]+)%"', found)]
    assert len(widths) > 2
    assert max(widths) == 100


def needed(rows: int, prompt: int) -> tuple[int, int, int]:
    """Bytes of each GPU that BLOOM takes in DeepSpeed's engine, those of its cache among them, and those there are."""
    found = document(*BLOOM, "--input-len", str(prompt), "--output-len", "100", "-b", str(rows))
    gpu = found["plan"]["memory"]["gpu"]
    cache = next(term["bytes"] for term in gpu["terms"] if term["name"] == "KV cache")
    return gpu["needed_bytes"], cache, gpu["available_bytes"]


def test_bloom_whose_cache_grows_by_copies_runs_8_rows_and_dies_of_16() -> None:
    """The published table of the BLOOM inference scripts: prompts of a few words, 100 new tokens, ZeRO without offload.

    Their cache grew by concatenation, so that the old one lay beside the new one, or its holes did. From one pool, as
    it is now, 16 rows fit as well.
    """
    fewer, fewer_cache, available = needed(8, 10)
    more, more_cache, _ = needed(16, 10)
    assert fewer + fewer_cache <= available < more + more_cache
    assert more <= available


def test_bloom_with_prompts_of_128_tokens_takes_8_rows_and_not_16() -> None:
    needs, _, available = needed(8, 128)
    assert needs <= available
    error = refused(*BLOOM, "--input-len", "128", "--output-len", "100", "-b", "16", error=DoesNotFitError)
    assert "16 sequences need" in error.message


def test_a_model_with_an_encoder_is_planned_with_what_its_prompts_leave() -> None:
    found = document(
        *("--model", "flan-t5-small", "--machine", "1xT4-16GB", "--offload", "cpu", "--resident-blocks", "0"),
        *("--batch-size", "4", "--input-len", "100", "--output-len", "10"),
    )
    model, plan = found["model"], found["plan"]
    assert (model["parameters"], model["blocks"], model["context_limit"]) == (76_961_152, 16, None)
    gpu = {term["name"]: term["bytes"] for term in plan["memory"]["gpu"]["terms"]}
    # The state of a token, 512 numbers, and its keys and values in 8 layers, 6 heads of 64 each; float32.
    assert gpu["encoder's states, cross-attention"] == 4 * 100 * (512 + 8 * 2 * 6 * 64) * 4
    blocks = read_anatomy(catalog_config("flan-t5-small"), dtype="float32").blocks
    decoder, encoder = sum(block.nbytes for block in blocks[8:]), sum(block.nbytes for block in blocks[:8])
    assert decoder <= plan["streamed_bytes"] < decoder + encoder
    assert gpu["slots"] >= 3 * (blocks[0].nbytes + blocks[-1].nbytes), "each of the two stacks has slots"


@pytest.mark.parametrize("flags", [("--engine", "zero"), ("--num-gpus", "2", "--fetch", "partitioned")])
def test_what_models_with_an_encoder_do_without_is_named(flags: tuple[str, ...]) -> None:
    assert flags[-1] in str(refused("--model", "flan-t5-small", "--machine", "4xH200", *flags).message)
