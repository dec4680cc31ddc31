"""Simulations that plans of one test module share.

Simulating a model's passes is nearly all that a plan costs. It depends on the model and the lengths of its rows, not on
the machine or the user's wishes, which is what tests of plans vary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from zeroinf.simulation import make_plan
from zeroinf.simulation.workload import Simulator


@contextmanager
def shared_simulations() -> Iterator[None]:
    """Inside, plans of the same model and the same lengths use one `Simulator`."""
    known: dict[object, Simulator] = {}

    def simulator(config: Any, anatomy: Any, lengths: Any, *, expansion: Any = None, **how: Any) -> Simulator:
        if expansion is not None:
            return Simulator(config, anatomy, lengths, expansion=expansion, **how)
        key = (config.to_json_string(), anatomy, lengths, *sorted(how.items()))
        if key not in known:
            known[key] = Simulator(config, anatomy, lengths, **how)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_plan, "Simulator", simulator)
        yield
