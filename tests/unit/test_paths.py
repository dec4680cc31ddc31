"""Where the cache and the configs are."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeroinf import paths
from zeroinf.paths import cache_directory, configs_directory


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ZEROINF_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "zeroinf"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "zeroinf"
    monkeypatch.setenv("ZEROINF_CACHE", "~/own")
    assert cache_directory() == tmp_path / "own"


def test_configs_of_an_installed_package_come_before_those_of_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (configs_directory() / "models").is_dir()
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "zeroinf" / "paths.py"))
    assert configs_directory() == tmp_path / "configs"
    (tmp_path / "zeroinf" / "configs").mkdir(parents=True)
    assert configs_directory() == tmp_path / "zeroinf" / "configs"
