"""Servers with names: deployed, found, asked and terminated; and those that do not come up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import zeroinf
from zeroinf.cli.main import cli
from zeroinf.errors import InputError, UsageError
from zeroinf.serve.named import ServerFailedError, find_server


def test_a_server_is_deployed_asked_and_terminated(small_checkpoint: Callable[[str], Path]) -> None:
    folder = str(small_checkpoint("llama"))
    lengths = {"max_prompt_tokens": 24, "max_new_tokens": 12, "batch_size": 4}
    with pytest.raises(UsageError, match="no server named small"):
        zeroinf.client("small")
    deployed = zeroinf.deploy(folder, name="small", api_key="s3cret", **lengths)
    try:
        with pytest.raises(UsageError, match="runs already"):
            zeroinf.deploy(folder, name="small")
        first, second = deployed.generate(["in the beginning", "b"], max_new_tokens=5, ignore_eos=True)
        assert (first.prompt_length, first.generated_length, first.finish_reason) == (16, 5, "length")
        assert second.prompt_length == 1
        found = zeroinf.client("small", api_key="s3cret")
        assert found.query({"query": "in the beginning"}, max_new_tokens=5, ignore_eos=True) == [first]
        with pytest.raises(InputError, match="--max-new-tokens"):
            found.generate("a", max_new_tokens=13)
        with pytest.raises(InputError, match="API key"):
            zeroinf.client("small", api_key="other").generate("a")
        listed = CliRunner().invoke(cli, ["ps"]).stdout
        assert f"small  ready  {deployed.server.address}  {folder}" in listed
    finally:
        zeroinf.terminate("small")
    assert find_server("small") is None
    listed = CliRunner().invoke(cli, ["ps"])
    assert (listed.stdout, "no server with a name runs here" in listed.stderr) == ("", True)


def test_a_server_that_does_not_come_up_says_why_at_once(tmp_path: Path) -> None:
    with pytest.raises(ServerFailedError, match="/none") as failed:
        zeroinf.deploy(str(tmp_path / "none"), name="dead")
    assert failed.value.exit_code == 2
    with pytest.raises(UsageError, match="letters"):
        zeroinf.deploy("x", name="../dead")
