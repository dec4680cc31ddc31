"""Prints which models run on a machine, or which GPUs run a model: a table for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.status import Status

from zeroinf.cli.plan_view import machine_line
from zeroinf.options.comparison import ComparedPlan, ComparisonRow, compare
from zeroinf.options.lists import Listed, listed
from zeroinf.options.options import PlanOptions
from zeroinf.options.plan_input import machine_of
from zeroinf.sizes import gib

TABLE_SCHEMA = 1

_NAMES_WIDTH = 26


def plan_all(options: PlanOptions, *, advise: bool, show: bool) -> list[ComparisonRow]:
    """All rows, by the size of the weights; GPUs by tokens/s. Where `show`, how far it is stands on stderr."""
    rows, count = list[ComparisonRow](), len(listed(options)[1])
    status: Status | None = None
    try:
        for row in compare(options, advise=advise):
            rows.append(row)
            if show:
                words = f"planned {len(rows)} of {count}: {row.name}"
                if status is None:  # its thread starts when all processes have
                    status = Console(stderr=True).status(words)
                    status.start()
                status.update(words)
    finally:
        if status is not None:
            status.stop()
    return sorted(rows, key=lambda row: (row.weight_bytes or 0, _best(row), row.name))


def print_table(options: PlanOptions, rows: Sequence[ComparisonRow], varied: Listed) -> None:
    """The rows on stdout, 80 columns wide where names are short."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in _lines(options, rows, varied):
        console.print(line)


def table_json(options: PlanOptions, rows: Sequence[ComparisonRow], varied: Listed) -> dict[str, Any]:
    """The rows for programs. `schema` changes when a name or a meaning does; docs/guide/plan.md says what each is."""
    return {
        "schema": TABLE_SCHEMA,
        "job": {
            "requests": options.requests,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.output_len,
        },
        varied + "s": [asdict(row) for row in rows],
    }


def _lines(options: PlanOptions, rows: Sequence[ComparisonRow], varied: Listed) -> Iterator[str]:
    machine, _ = machine_of(options if varied == "model" else replace(options, gpu=rows[0].name))
    if varied == "model":
        yield f"machine  {machine_line(machine)}"
    else:
        row = rows[0]
        size = f", {gib(row.weight_bytes)}" if row.weight_bytes is not None else ""
        yield f"model    {options.model}{size}"
        yield f"host     {machine_line(machine).partition(' free, ')[2]}"
    yield f"job      up to {options.prompt_tokens} prompt and {options.output_len} new tokens"
    yield ""
    flags = list(dict.fromkeys(one.flags for row in rows for one in row.outcomes))
    flags.sort(key=["", "--wire int8", "--wire int4"].index)
    heads = {flag: flag or "as it is" for flag in ("", *flags)}
    width = max(_NAMES_WIDTH, *(len(row.name) for row in rows))
    sizes = f" {'weights':>9}" if varied == "model" else ""
    yield (
        f"{'model' if varied == 'model' else 'GPU':<{width}}{sizes}"
        + "".join(f"   {h:<14}" for h in heads.values()).rstrip()
    )
    for row in rows:
        size = f" {gib(row.weight_bytes) if row.weight_bytes is not None else '':>9}" if varied == "model" else ""
        by_flags = {one.flags: one for one in row.outcomes}
        cells = "".join(_cell(by_flags.get(flag)) for flag in heads) if row.outcomes else f"   {_why_not(row)}"
        yield f"{row.name:<{width}}{size}{cells}".rstrip()
    yield ""
    yield "tokens/s, and the place of weights; each coarsely planned: `zeroinf plan --model NAME` plans as much or more"
    if len(heads) > 1:
        yield "--wire int8 is near lossless, --wire int4 is lossy: `zeroinf eval` measures your model"


def _cell(one: ComparedPlan | None) -> str:
    if one is None:
        return f"{'-':>9}{'':8}"
    rate = one.tokens_per_second
    digits = 0 if rate >= 100 else 1 if rate >= 0.95 else 2
    return f" {rate:>8,.{digits}f} {one.rests:<7.8}"


def _best(row: ComparisonRow) -> float:
    return max((one.tokens_per_second for one in row.outcomes), default=0.0)


def _why_not(row: ComparisonRow) -> str:
    return f"does not fit: {row.problem}" if row.weight_bytes is not None else row.problem
