"""The wheel and the source distribution hold what they need, and the wheel works where only it is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import zeroinf

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both distributions."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def tracked(*folders: str) -> set[str]:
    """Files of the checkout that git knows."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_the_wheel_has_every_module_and_every_data_file(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name == f"zeroinf-{zeroinf.__version__}-py3-none-any.whl"
    assert {"zeroinf/py.typed", "zeroinf/serve/page/index.html"} <= tracked("zeroinf") <= held
    assert {f"zeroinf/{name}" for name in tracked("configs")} <= held


def test_the_source_distribution_is_the_checkout(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked("zeroinf", "configs", "docs", "examples", "scripts", "tests", "README.md", "LICENSE") <= held


def test_extras_are_documented() -> None:
    page = (ROOT / "docs" / "guide" / "install.md").read_text(encoding="utf-8")
    assert [name for name in PROJECT["optional-dependencies"] if f"`{name}`" not in page] == []


def test_the_dockerfile_copies_what_is_there_and_installs_extras_that_are() -> None:
    """There is no daemon where tests run: what can be said of the file without one."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert copied
    assert all((ROOT / name).exists() and f"!{name}" in kept for name in copied)
    (extras,) = re.findall(r"\$wheel\[([a-z,]+)\]", text)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.full
def test_the_wheel_works_in_an_environment_that_has_only_it(built: Path, tmp_path: Path) -> None:
    """Its dependencies come from this environment's folder, through a path that does not see this checkout."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)],
        check=True,
    )
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def says(*words: str) -> str:
        command = [str(tmp_path / "venv" / "bin" / "zeroinf"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [str(python), "-c", "import zeroinf; print(zeroinf.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    assert where.stdout.decode().startswith(str(tmp_path))
    assert zeroinf.__version__ in says("--version")
    assert "tokens/s" in says("plan", "--model", "llama-2-7b", "--machine", "1xRTX4090-24GB-64GiB")
    assert "Paris" in says("run", "-m", "demo", "--prompt", "The capital of France is", "--max-new-tokens", "3")
