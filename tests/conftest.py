"""What every test may count on: the CPU unless it is marked `gpu`, no model hub, checkpoints made once a session."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch, transformers or deepspeed; processes that tests start inherit all of it.
# Sums of floats depend on how many threads share them, and cores are for test processes side by side.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["NO_COLOR"] = "1"
os.environ.pop("CI", None)  # transformers hands its log messages on to the root logger where it is set
for _name in [name for name in os.environ if name.startswith("ZEROINF_") and name != "ZEROINF_CACHE"]:
    del os.environ[_name]  # settings of the person who runs the tests are not theirs

# What a test takes a share of at random: another one each day, the same again with TEST_SEED.
os.environ.setdefault("TEST_SEED", str(date.today().toordinal()))

# A machine that is busy with other tests is no failure.
settings.register_profile("zeroinf", deadline=None, max_examples=25)
settings.register_profile("full", deadline=None, max_examples=100)
settings.load_profile("zeroinf")

# Under `nohup`, or behind a script's `&`, they are ignored, and so they would be by every process that a test starts.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

pytest_plugins = ["durations", "tiers"]

SharedFolder = Callable[[str, Callable[[Path], None]], Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/unit/test_golden_plans.py --update-golden` writes tests/golden anew, to be read in the diff."""
    parser.addoption("--update-golden", action="store_true", help="write what tests/golden should hold, and pass")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes in a test's id by their number: every worker must find the same ids, and gzip writes the time."""
    return f"{len(val)}_bytes" if isinstance(val, bytes) else None


def pytest_report_header() -> str:
    return f"TEST_SEED={os.environ['TEST_SEED']}"


@pytest.hookimpl(trylast=True)  # after tests were deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that take longest first, and skip tests marked `gpu` on a machine without an NVIDIA GPU.

    Workers take whole files: one that takes minutes must not be the last.
    """
    from durations import UNLISTED_S, measured_tests

    measured, takes_s = measured_tests(), defaultdict[Path, float](float)
    for item in items:
        takes_s[item.path] += measured.get(item.nodeid, UNLISTED_S)
    items.sort(key=lambda item: takes_s[item.path], reverse=True)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        from zeroinf.hardware.gpus import read_gpus

        if not read_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU is visible"))


@pytest.fixture(autouse=True)
def _accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `gpu` test starts its processes on the GPU."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.delenv("DS_ACCELERATOR")


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all pytest workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def _cache(session_folder: Path) -> None:
    """A cache of the session's own: the demo model is converted by the code that is tested, and once."""
    os.environ.setdefault("ZEROINF_CACHE", str(session_folder / "cache"))


@pytest.fixture(scope="session")
def shared_folder(session_folder: Path) -> SharedFolder:
    """`shared_folder(name, build)`: a folder that `build` fills once, however many pytest workers ask for it."""

    def get(name: str, build: Callable[[Path], None]) -> Path:
        from zeroinf.model.cache import build_once

        return build_once(session_folder / "shared" / name, build)

    return get


@pytest.fixture(scope="session")
def small_checkpoint(shared_folder: SharedFolder) -> Callable[[str], Path]:
    """`small_checkpoint(architecture)`: the folder of a random model of `small_models`, float32, with a tokenizer."""

    def get(architecture: str) -> Path:
        def build(folder: Path) -> None:
            from small_models import make_checkpoint

            make_checkpoint(architecture, folder)

        return shared_folder(f"small-{architecture}", build)

    return get
