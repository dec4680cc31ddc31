"""Commands in README.md and the guide are those that the command line takes."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import click
import pytest
from lm_eval._cli.harness import HarnessCLI

from zeroinf.cli.lm_eval import with_model
from zeroinf.cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "guide").glob("*.md")),
    "docs/tutorial.md",
    "docs/troubleshooting.md",
    "examples/README.md",
    "docs/from-elsewhere.md",
    "docs/reliability.md",
    "docs/benchmarks.md",
    "docs/benchmarks-archive.md",
)
# What a reader puts something else in place of.
PLACEHOLDERS = {"N": "2", "WIRE": "int8"}


def of_zeroinf(text: str) -> str | None:
    """What comes after `zeroinf` where `text` starts it, in any of the ways that it is started."""
    found = re.match(r"(?:[A-Z_]+=\S+ )*(?:deepspeed .*--module |torchrun .*-m )?zeroinf (.+)", text)
    return found[1] if found else None


def commands(page: str) -> Iterator[str]:
    """Words for `zeroinf` in blocks, in running text, and in the right column of tables, where flags are of `run`."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("$ ") and after.startswith("error: "):  # is run, and compared with the page, by another test
            parts, flags = [], list[str]()
        elif line.startswith(("    ", "$ ")):
            parts, flags = [line.removeprefix("$ ").strip().partition("  #")[0].partition(" > ")[0]], []
        elif line.startswith("|"):
            parts = re.findall(r"`([^`]+)`", line)
            flags = re.findall(r"`((?:\.\.\. )?--[^`]+)`", line.split("|")[2]) if page.startswith("docs/from") else []
        else:
            parts, flags = re.findall(r"`([^`]+)`", line), []
        yield from (found for part in parts if (found := of_zeroinf(part)))
        yield from (f"run {flag.removeprefix('... ')}" for flag in flags)


def taken(words: list[str]) -> None:
    """Let click read `words` as far as the command line itself can tell: nothing runs, and files need not exist."""
    command: click.Command = cli
    ctx = click.Context(cli, info_name="zeroinf", **cli.context_settings)
    while isinstance(command, click.Group) and words and (found := command.get_command(ctx, words[0])) is not None:
        ctx, command, words = click.Context(found, ctx, info_name=words[0]), found, words[1:]
    if command.name == "show":  # whose words are another command's
        taken(words)
        return
    if command.name == "lm-eval":  # whose words are the harness's
        with patch.object(sys, "argv", ["zeroinf lm-eval", *with_model(words)]), suppress(SystemExit):
            HarnessCLI().parse_args()
            return
        assert "--help" in words, words
        return
    values, arguments, _ = command.make_parser(ctx).parse_args(words)
    for option in command.params:
        if option.name in values and isinstance(option, click.Option) and not isinstance(option.type, click.Path):
            option.type_cast_value(ctx, values[option.name])
    assert not arguments or isinstance(command, click.Group), f"{command.name} takes no {arguments}"


CASES = [(page, text) for page in PAGES for text in dict.fromkeys(commands(page))]


@pytest.mark.parametrize(("page", "text"), CASES)
def test_a_command_of_the_pages_is_one_that_the_command_line_takes(page: str, text: str) -> None:
    words = shlex.split(re.sub(r"[][]| \.\.\.", "", text))
    taken([PLACEHOLDERS.get(word, word) for word in words])


def test_the_first_page_is_short_and_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert all(
        any(line.startswith(f"    {command}  ") for line in lines) for command in ("scripts/demo", "scripts/test")
    )


def test_the_pages_have_commands_and_a_wrong_one_is_noticed() -> None:
    assert len([page for page, _ in CASES if page == "docs/from-elsewhere.md"]) > 15
    assert len([page for page, _ in CASES if page.startswith("docs/guide/")]) > 25
    for wrong in (
        ["run", "--no-such"],
        ["bench", "--preset", "other"],
        ["run", "--num-gpus", "many"],
        ["plan", "x", "y"],
    ):
        with pytest.raises((click.UsageError, AssertionError)):
            taken(wrong)
