"""Plans simulate few forwards: nearly all that a plan costs is their number, which is counted here instead of time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_machines import GIB, MIB, machine_of
from quantized import MARKS
from small_models import small_config

from zeroinf.hardware.rates import Rates
from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.workload import Lengths, Shape
from zeroinf.simulation import workload
from zeroinf.simulation.make_plan import PlanInput, make_plan
from zeroinf.simulation.workload import Simulator

LENGTHS = Lengths(prompt_tokens=64, new_tokens=16)
PENALIZED = Lengths(prompt_tokens=64, new_tokens=16, penalized=True, sampled=True)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The forwards that were simulated."""
    found: list[object] = []
    real = workload.record_step

    def record(model: object, *given: object) -> object:
        found.append(model)
        return real(model, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(workload, "record_step", record)
    yield found


@pytest.mark.parametrize(
    ("name", "lengths", "most"),
    [
        ("llama", PENALIZED, 42),
        ("mixtral", LENGTHS, 42),  # whose experts are routed in every forward
        ("t5", LENGTHS, 12),  # whose rows start and end together
    ],
)
def test_a_plan_with_advice_simulates_few_forwards(
    name: str, lengths: Lengths, most: int, simulated: list[object]
) -> None:
    config = small_config(name)
    anatomy = read_anatomy(config, dtype="bfloat16")
    plan_input = PlanInput(
        config=config,
        anatomy=anatomy,
        machine=machine_of(gpus=1, gpu_bytes=1100 * MIB, host_bytes=64 * GIB),
        rates=Rates.of("given", link_gbps=25.0),
        constraints=Constraints(offload="cpu", host_share="auto" if anatomy.can_rest_on_host else 0.0),
        lengths=lengths,
        device="cuda",
    )
    found = make_plan(plan_input, advise=True)
    assert found.advice
    assert found.plan.batch_size > 1000
    assert len(simulated) <= most


def test_so_does_one_of_padded_rows_whose_states_fill_the_calls_of_recurrent_layers(simulated: list[object]) -> None:
    config = small_config("kimi_linear")
    config.linear_head_dim, config.linear_num_heads = 128, 64  # of which 15 rows have 64 MiB
    plan_input = PlanInput(
        config=config,
        anatomy=read_anatomy(config, dtype="bfloat16"),
        machine=machine_of(gpus=1, gpu_bytes=4 * GIB, host_bytes=64 * GIB),
        rates=Rates.of("given", link_gbps=25.0),
        constraints=Constraints(offload="cpu"),
        lengths=LENGTHS,
        device="cuda",
    )
    found = make_plan(plan_input, advise=True)
    assert found.plan.batch_size > 60
    assert found.plan.padded_because
    assert len(simulated) <= 40


def test_a_checkpoint_takes_the_steps_of_its_model(simulated: list[object]) -> None:
    config, quantized = small_config("llama"), small_config("llama")
    quantized.quantization_config = MARKS["fp8"]
    model = Simulator(config, read_anatomy(config, dtype="bfloat16"), LENGTHS)
    checkpoint = Simulator(quantized, read_anatomy(quantized, dtype="bfloat16"), LENGTHS, like=model)
    shape = Shape(40, 20, 640)
    expected = model(shape)
    simulated.clear()
    found = checkpoint(shape)
    assert not simulated
    assert found.prompts == expected.prompts
    assert found.last_decode == expected.last_decode
    assert found.expansion is not None
