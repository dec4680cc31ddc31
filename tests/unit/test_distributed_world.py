"""Who this process is among the ranks, as launchers tell it."""

from __future__ import annotations

import pytest

from zeroinf.distributed.world import World, world_from_environment
from zeroinf.errors import EnvironmentProblem

COMPLETE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_without_a_launcher_the_process_is_alone_and_speaks() -> None:
    world = world_from_environment({"PATH": "/bin"})
    assert world == World(rank=0, size=1, local_rank=0, launched=False)
    assert world.is_main


def test_a_launchers_words_are_taken() -> None:
    world = world_from_environment(COMPLETE)
    assert world == World(rank=3, size=4, local_rank=1, local_size=4, launched=True)
    assert not world.is_main


@pytest.mark.parametrize("missing", COMPLETE)
def test_half_of_a_launchers_words_is_an_error_that_names_the_missing_one(missing: str) -> None:
    words = {name: value for name, value in COMPLETE.items() if name != missing}
    with pytest.raises(EnvironmentProblem, match=f"but not {missing}$") as caught:
        world_from_environment(words)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("wrong", [{"LOCAL_WORLD_SIZE": "1"}, {"LOCAL_SIZE": "5"}, {"LOCAL_RANK": "-1"}])
def test_a_rank_that_its_node_does_not_have_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(EnvironmentProblem, match="on its node"):
        world_from_environment(COMPLETE | wrong)


def test_an_address_alone_does_not_make_a_launcher() -> None:
    assert not world_from_environment({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).launched
