"""Machines from files: presets, and what a doctor elsewhere has saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zeroinf.errors import UsageError
from zeroinf.hardware.presets import load_machine, preset_names
from zeroinf.paths import configs_directory

GIB = 1 << 30
# Bytes a second of one PCIe lane, by generation, after its line code (PCI Express Base Specification).
LANE_GBPS = {3: 0.985, 4: 1.969, 5: 3.938}


def preset_text(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((configs_directory() / "machines" / f"{name}.json").read_text())
    return document


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_the_machine_its_name_says_with_published_rates(name: str) -> None:
    machine, rates = (found := load_machine(name)).machine, found.rates
    count, _, card = name.partition("-")[0].partition("x")
    assert len(machine.gpus) == int(count)
    for index, gpu in enumerate(machine.gpus):
        assert gpu.index == index
        assert card in gpu.name.replace(" ", "").replace("GeForce", "")
        assert 0.9 * gpu.total_bytes < gpu.free_bytes < gpu.total_bytes, "the driver keeps a little for itself"
        assert gpu.capability is not None
        published = LANE_GBPS[gpu.pcie_generation or 0] * (gpu.pcie_width or 0)
        is_measured = rates.origin("link_gbps") == "measured"
        assert rates.link_gbps == pytest.approx(published, rel=0.15 if is_measured else 0.001)
        assert rates.link_gbps is not None and rates.link_gbps < 1.001 * published
    sizes = [int(part.removesuffix("GiB").removesuffix("GB")) for part in name.split("-")[1:]]
    if sizes:
        assert machine.gpus[0].total_bytes / GIB == pytest.approx(sizes[0], rel=0.07)
    if name.endswith("GiB"):
        assert machine.memory.total_bytes == sizes[1] * GIB
    assert machine.memory.available_bytes < machine.memory.total_bytes
    about, origins = preset_text(name)["about"], {rates.origin(rate) for rate in rates.known}
    assert origins <= {"data sheet", "measured"}
    assert about and ("measured" in about) == ("measured" in origins)


def test_the_machines_that_others_published_results_of_are_there() -> None:
    assert len(preset_names()) >= 11
    zero_inference = load_machine("1xa6000-48gb-252gib")
    assert zero_inference.rates.of_disk(zero_inference.machine.disks[0]) == 5.6


def test_unknown_name_lists_the_presets_and_the_nearest() -> None:
    with pytest.raises(UsageError, match="no machine '8xH100'") as caught:
        load_machine("8xH100")
    assert caught.value.hint is not None
    assert "did you mean 8xH100-80GB?" in caught.value.hint
    assert all(name in caught.value.hint for name in preset_names())


def test_folder_is_no_machine(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        load_machine(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.update(gpu_memory=1), "gpu_memory: unknown key"),
        (lambda file: file.pop("machine"), "machine: Field required"),
        (lambda file: file.update(schema=2), "schema: Input should be 1"),
        (lambda file: file["machine"]["gpus"][1].update(vram=1), "machine.gpus.1.vram: unknown key"),
        (lambda file: file["machine"]["memory"].update(total_bytes="much"), "machine.memory.total_bytes: Input"),
        (lambda file: file["machine"]["disks"][0].update(free_bytes=-1), "machine.disks.0: .*free_bytes cannot be -1"),
        (lambda file: file["rates"].update(link_gbps=0), "rates: .*link_gbps cannot be 0"),
        (lambda file: file["rates"].update(bandwidth=1), "rates.bandwidth: unknown key"),
        (lambda file: file["rates"]["origins"].update(hbm_gbps="rumour"), "rates.origins.hbm_gbps: Input should be"),
        (lambda file: file["rates"]["origins"].update(launch_s="given"), "rates: .*launch_s, but no rate"),
    ],
)
def test_bad_file_is_refused_with_its_key(change: Any, message: str, tmp_path: Path) -> None:
    document = preset_text("4xH200")
    change(document)
    path = tmp_path / "box.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=message) as caught:
        load_machine(str(path))
    assert str(path) in caught.value.message


def test_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    path.write_text("ok   python 3.11")
    with pytest.raises(UsageError, match="Invalid JSON"):
        load_machine(str(path))


def test_a_copy_of_a_preset_is_the_same_machine(tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    path.write_text(json.dumps(preset_text("8xH100-80GB")))
    assert load_machine(str(path)) == load_machine("8xH100-80GB")
