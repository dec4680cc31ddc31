"""Advice: what plans are told could be changed, and that each change which is named was planned and holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from fake_machines import CHAIN, GIB, machine_of

from zeroinf.cli.main import cli
from zeroinf.errors import DoesNotFitError, ZeroinfError
from zeroinf.paths import configs_directory
from zeroinf.planner.advice import Advice, alternatives, remedies, remedies_together, worthwhile
from zeroinf.planner.constraints import Constraints
from zeroinf.sizes import rate_text

MACHINE = machine_of(gpu_bytes=24 * GIB, host_bytes=64 * GIB)
AUTO = Constraints(host_share="auto")


def plan(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["plan", *arguments])


def flags(changes: Any) -> list[str]:
    return [change.flags for change in changes]


def test_a_plan_is_told_of_fewer_bytes_and_of_a_disk() -> None:
    found = list(alternatives(AUTO, MACHINE, CHAIN, {}))
    assert [(one.flags, one.quality) for one in found] == [
        ("--wire int8", "near lossless"),
        ("--wire int4", "lossy"),
        ("--kv-dtype int8", "near lossless"),
        ("--wire int4 --kv-dtype int8", "lossy"),
        ("--nvme-path DIR", "exact"),
    ]
    both = found[3].constraints
    assert (both.wire, both.kv_dtype) == ("int4", "int8")
    assert found[4].machine.disks and found[4].constraints.nvme_space_bytes
    elsewhere = replace(AUTO, names_folders=False)
    assert flags(alternatives(elsewhere, MACHINE, CHAIN, {}))[4] == "--nvme-space SIZE"


@pytest.mark.parametrize(("rate", "text"), [(1126.25, "1,126.2"), (4.02, "4.0"), (0.0341, "0.034"), (0.0, "0.0")])
def test_a_slow_plan_is_not_said_to_give_nothing(rate: float, text: str) -> None:
    assert rate_text(rate) == text


@pytest.mark.parametrize(("together", "is_told"), [(151.3, False), (154.9, False), (160.0, True)])
def test_changes_together_are_told_where_they_are_faster_than_one_of_them(together: float, is_told: bool) -> None:
    rates = {
        "--wire int8": 89.7, "--wire int4": 154.8, "--kv-dtype int8": 60.0, "--wire int4 --kv-dtype int8": together,
    }  # fmt: skip
    changes = {one.flags: one for one in alternatives(AUTO, MACHINE, CHAIN, {})}
    planned: list[Any] = [
        Advice(change=changes[flags], candidate=SimpleNamespace(timing=SimpleNamespace(tokens_per_second=rate)))  # type: ignore[arg-type]
        for flags, rate in rates.items()
    ]
    told = [one.change.flags for one in worthwhile(planned)]
    assert told == [flags for flags in rates if is_told or flags != "--wire int4 --kv-dtype int8"]


def test_quantized_checkpoints_are_named_where_they_would_run() -> None:
    published = {"a-awq": "maker/A-AWQ"}
    found = next(one for one in alternatives(AUTO, MACHINE, CHAIN, published) if one.checkpoint)
    assert (found.flags, found.checkpoint, found.quality) == ("--model maker/A-AWQ", "a-awq", "quality not measured")
    assert "--model maker/A-AWQ" in flags(remedies(AUTO, MACHINE, CHAIN, published))
    for other in (replace(AUTO, wire="int8"), Constraints(engine="zero")):
        assert "--model maker/A-AWQ" not in flags(alternatives(other, MACHINE, CHAIN, published))


def test_what_the_user_fixed_already_is_not_advised() -> None:
    fixed = replace(AUTO, wire="int8", kv_dtype="int8", offload="none")
    assert flags(alternatives(fixed, MACHINE, CHAIN, {})) == []
    assert flags(alternatives(Constraints(engine="zero"), MACHINE, CHAIN, {})) == []


def test_where_nothing_fits_settings_come_before_a_disk_and_single_changes_before_pairs() -> None:
    fixed = replace(AUTO, batch_size=64, offload="cpu")
    single = flags(remedies(fixed, MACHINE, CHAIN, {}))
    assert single == [
        "--batch-size auto", "--offload auto", "--wire int8", "--wire int4", "--offload auto --nvme-path DIR",
    ]  # fmt: skip
    assert "--wire int8 --batch-size auto" in flags(remedies_together(fixed, MACHINE, CHAIN))
    assert flags(remedies(Constraints(engine="resident", offload="none"), MACHINE, CHAIN, {}))[0] == "--engine stream"


BOX = ("--model", "pythia-1b", "--gpu-memory", "2GiB", "--input-len", "128", "--output-len", "16")


@cache
def refused() -> ZeroinfError:
    """A model of 1.9 GiB on a GPU that holds no half of it, with a host that does neither."""
    error = plan(*BOX, "--host-memory", "5400MiB").exception
    assert isinstance(error, DoesNotFitError), error
    return error


ROOMY = ("--host-memory", "16GiB", "--requests", "100")


@cache
def roomy() -> str:
    """The same model on a host that holds it."""
    return str(plan(*BOX, *ROOMY).stdout)


def test_the_resource_that_is_really_short_is_named() -> None:
    assert refused().message.startswith("nothing fits, host memory is short: ")
    assert re.search(r"offload cpu: .*? GiB of host memory, 5\.27 GiB are there(;|$)", refused().message)
    assert "GPU memory" not in (refused().hint or "")


def test_each_change_that_a_hint_names_does(tmp_path: Any) -> None:
    first, *lines = (refused().hint or "").splitlines()
    assert first.startswith("any of these would do, cheapest first")
    named = [line.strip().partition(": ")[0] for line in lines]
    assert named[0] == "--wire int8"
    settings = [words for words in named if words.startswith("--")]
    for words in settings:
        added = re.sub(r"--nvme-path DIR \(\d+ GiB there\)", "--nvme-space 10GiB", words).split()
        done = plan(*BOX, "--host-memory", "5400MiB", *added, "--no-advice")
        assert done.exit_code == 0, (words, done.exception)
    more = re.fullmatch(r"([\d.]+) GiB more host memory", named[-1])
    assert more is not None, named
    enough = 5400 + int(float(more[1]) * 1024) + 1
    assert plan(*BOX, "--host-memory", f"{enough}MiB", "--no-advice").exit_code == 0


@pytest.mark.full
def test_a_machine_of_a_file_is_advised_room_on_a_disk(tmp_path: Path) -> None:
    file, box = tmp_path / "box.json", json.loads((configs_directory() / "machines" / "1xT4-16GB.json").read_bytes())
    box["machine"]["disks"] = []
    file.write_text(json.dumps(box))
    there = (*BOX, "--machine", str(file), "--host-memory", "5200MiB")
    error = plan(*there).exception
    assert isinstance(error, DoesNotFitError), error
    found = re.search(r"--nvme-space \d+GiB(?=: )", error.hint or "")
    assert found is not None, error.hint
    assert "--nvme-path" not in (error.hint or "")
    done = plan(*there, *found[0].split(), "--no-advice")
    assert done.exit_code == 0, done.exception


@pytest.mark.full
def test_a_page_shows_changes_with_speed_duration_and_quality() -> None:
    page = roomy()
    assert re.search(r"first token after \d+:\d\d, 100 requests in \d+:\d\d", page)
    said = re.search(r"--wire int4 +([\d.,]+) tokens/s, 100 requests in \d+:\d\d, lossy", page)
    assert said is not None, page
    assert "zeroinf eval" in page
    own = re.search(r"([\d.,]+) tokens/s expected", plan(*BOX, *ROOMY, "--wire", "int4", "--no-advice").stdout)
    assert own is not None
    promised, planned = (float(found[1].replace(",", "")) for found in (said, own))
    assert planned >= 0.99 * promised, "advice is what a plan gives at least"
    assert planned < 2 * promised, "and no figure that says nothing"


def test_a_quantized_checkpoint_is_promised_what_its_own_plan_gives() -> None:
    few = ("--machine", "1xT4-16GB", "-b", "1", "--input-len", "8", "--output-len", "4", "--offload", "cpu")
    page = plan("--model", "meta-llama/Llama-2-7b-hf", *few).stdout
    promised = re.search(r"--model TheBloke/Llama-2-7B-AWQ +([\d.]+) tokens/s", page)
    assert promised is not None, page
    own = plan("--model", "TheBloke/Llama-2-7B-AWQ", *few, "--no-advice").stdout
    assert "quantized with awq" in own
    assert f"{promised[1]} tokens/s expected" in own


def test_without_advice_a_plan_is_just_that_and_a_hint_says_what_is_short() -> None:
    page = plan(*BOX, *ROOMY, "--no-advice").stdout
    assert "tokens/s expected" in page
    assert "--wire" not in page
    hint = plan(*BOX, "--host-memory", "5400MiB", "--no-advice").exception.hint
    assert re.fullmatch(r"[\d.]+ GiB more host memory would do for --offload cpu", hint), hint


def test_a_disk_on_which_nothing_would_rest_is_not_advised() -> None:
    assert "--nvme-path" not in roomy()


def assert_words(text: str, name: str, request: pytest.FixtureRequest) -> None:
    """The words of `text` are those of a golden file, which figures, and so how wide columns are, do not change.

    `--update-golden` writes it anew; the diff shows what a reader would read otherwise.
    """
    said = re.sub(r"[#.]{5,}", "BAR", text)
    words = "\n".join(" ".join(re.sub(r"(?<![\w-])\d[\d,.:]*", "N", line).split()) for line in said.splitlines()) + "\n"
    file = Path(__file__).parents[1] / "golden" / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text(words)
    assert words == file.read_text(), "read the diff; --update-golden writes it anew"


def test_a_plan_and_a_refusal_are_in_plain_words(request: pytest.FixtureRequest) -> None:
    assert_words(roomy(), "pythia-1b-in-words", request)
    assert_words(f"error: {refused().message}\n\nhint: {refused().hint}", "pythia-1b-refused-in-words", request)


@pytest.mark.full
def test_llama_2_70b_without_host_memory_is_told_of_packed_weights(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zeroinf.options.plan_input.read_machine", lambda paths: MACHINE)  # whatever is free here
    error = plan("--model", "llama-2-70b").exception
    assert_words(f"error: {error.message}\n\nhint: {error.hint}", "llama-2-70b-refused-in-words", request)
