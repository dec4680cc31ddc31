"""The command line starts fast, lists what there is, and turns errors into two lines and a code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.core import ParameterSource
from click.testing import CliRunner

from zeroinf.cli import main
from zeroinf.cli.command import whole_help
from zeroinf.cli.main import cli
from zeroinf.cli.run import run as run_command
from zeroinf.errors import (
    DoesNotFitError,
    EnvironmentProblem,
    InterruptedRunError,
    RankError,
    RequestsFailedError,
    UsageError,
    ZeroinfError,
)

_HEAVY = {"torch", "deepspeed", "transformers", "accelerate", "numpy", "rich", "pydantic"}


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    script = (
        f"import sys, json\ntry:\n    {statement}\nexcept SystemExit:\n    pass\nprint(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_importing_zeroinf_loads_nothing_heavy() -> None:
    loaded = modules_after("import zeroinf")
    assert "zeroinf" in loaded
    assert not loaded & {*_HEAVY, "click"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in ("run", "status", "chat", "plan", "bench", "config", "store", "doctor")),
    ],
)
def test_help_loads_neither_torch_nor_deepspeed_nor_anything_else_that_is_heavy(arguments: list[str]) -> None:
    loaded = modules_after(f"from zeroinf.cli.main import main; sys.argv[1:] = {arguments}; main()")
    assert "click" in loaded
    assert not loaded & _HEAVY


def test_what_starts_ranks_loads_nothing_that_is_heavy_and_lets_them_start_at_once() -> None:
    run = ["run", "--num-gpus", "2", "-m", "any", "--prompt", "any"]
    loaded = modules_after(
        f"from zeroinf.cli.main import main; sys.argv[1:], sys.executable = {run}, '/bin/true'; main()"
    )
    assert "subprocess" in loaded
    assert not loaded & _HEAVY


def test_help_lists_every_command_with_a_line_of_its_own() -> None:
    listed = CliRunner().invoke(cli, ["--help"]).stdout.partition("Commands:")[2].splitlines()
    assert {line.split()[0]: len(line.split()) > 2 for line in listed if line.strip()} == {
        "run": True,
        "status": True,
        "chat": True,
        "serve": True,
        "ps": True,
        "stop": True,
        "plan": True,
        "models": True,
        "download": True,
        "eval": True,
        "lm-eval": True,
        "bench": True,
        "config": True,
        "store": True,
        "doctor": True,
        "completion": True,
    }


def test_version_is_the_packages() -> None:
    import zeroinf

    for flag in ("--version", "-V"):
        assert CliRunner().invoke(cli, [flag]).stdout == f"zeroinf, version {zeroinf.__version__}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(cli, ["runn"])
    assert result.exit_code == 2
    assert "no such command: cli runn: did you mean cli run?" in result.stderr


@pytest.mark.parametrize("spelling", ["--local_rank=1", "--local-rank=1"])
def test_the_local_rank_that_launchers_put_before_the_command_is_accepted(spelling: str) -> None:
    result = CliRunner().invoke(cli, [spelling, "run", "--help"])
    assert result.exit_code == 0
    assert "local" not in CliRunner().invoke(cli, ["--help"]).stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroinfError("it broke", hint="mend it"), 1),
        (RankError("it broke", hint="mend it"), 1),
        (UsageError("it broke", hint="mend it"), 2),
        (DoesNotFitError("it broke", hint="mend it"), 3),
        (EnvironmentProblem("it broke", hint="mend it"), 4),
        (RequestsFailedError("it broke", hint="mend it"), 5),
        (InterruptedRunError("it broke", hint="mend it"), 130),
        (InterruptedRunError("it broke", hint="mend it", signal_number=15), 143),
    ],
)
def test_an_error_becomes_its_message_its_hint_and_its_code(
    error: ZeroinfError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**kwargs: object) -> None:
        raise error

    monkeypatch.setattr(main.cli, "main", fail)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    assert capsys.readouterr() == ("", "error: it broke\n\nhint: mend it\n")


def test_what_the_system_refuses_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(**kwargs: object) -> None:
        (tmp_path / ("x" * 300)).touch()

    monkeypatch.setattr(main.cli, "main", fail)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 4
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}/xxx")
    assert told.endswith("x: File name too long\n")


def test_a_current_folder_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    result = CliRunner().invoke(cli, ["plan", "--model", "demo"], standalone_mode=False)
    assert isinstance(result.exception, UsageError)
    assert "current folder does not exist" in result.exception.message


def test_a_ranks_error_says_which_rank_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**kwargs: object) -> None:
        raise UsageError("it broke")

    monkeypatch.setattr(main.cli, "main", fail)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == "error: rank 3: it broke\n"


@pytest.mark.parametrize("arguments", [["--stop", ""], ["--temperature", "500"]])
def test_settings_that_no_request_may_have_are_usage_errors(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, ["run", "-m", "demo", "--prompt", "x", *arguments], standalone_mode=False)
    assert isinstance(result.exception, UsageError)
    assert arguments[0][2:] in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--prompt", "x", "--top-k", "1", "--top-k", "2"],
        ["run", "--prompt", "x", "-m", "a", "--model", "b"],
        ["run", "--prompt", "x", "--max-new-tokens", "1", "--max-new-tokens", "2"],
        ["bench", "compare", "pyproject.toml", "README.md", "--format", "md", "--format", "csv"],
    ],
)
def test_an_option_of_one_value_that_is_given_twice_is_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert f"{arguments[-2]} is given twice, but takes one value" in result.output


@pytest.mark.parametrize("arguments", [["-m", "a", "b"], ["--pin-memory", "--no-pin-memory", "a"]])
def test_what_is_said_in_two_ways_is_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, ["run", "--prompt", "x", *arguments])
    assert result.exit_code == 2
    assert "given twice, as 'a' and as 'b'" in result.output or "one of them, and once" in result.output


def test_help_is_short_and_names_every_other_option_by_section() -> None:
    """Each option stands in exactly one of the sections; --help describes those of every day alone."""
    short = CliRunner().invoke(cli, ["run", "--help"], terminal_width=80).stdout
    whole = CliRunner().invoke(cli, ["run", "--help-all"], terminal_width=80).stdout
    everyday, _, more = short.partition("More options (cli run --help-all says what they do):\n")
    assert "Everyday options:" in short
    assert "Memory:\n" in whole
    assert "Memory:\n" not in short
    named = re.findall(r"--[a-z-]+[a-z]", more)
    for parameter in run_command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            flag = next(flag for flag in parameter.opts if flag.startswith("--"))
            described = re.search(rf"^  (-\w, )?(-tp, )?{flag}\b", everyday, re.MULTILINE) is not None
            assert [flag in named, described].count(True) == 1, flag
            assert re.search(rf"^  (-\w, )?(-tp, )?{flag}\b", whole, re.MULTILINE), flag
    assert "other  " not in more
    assert [line for line in whole.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("words", [["run", "demo"], ["run", "-m", "demo"], ["plan", "demo"], ["serve", "demo"]])
def test_a_model_may_be_named_without_its_flag(words: list[str]) -> None:
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    ctx = command.make_context(words[0], words[1:], resilient_parsing=True)
    assert ctx.params["model"] == "demo"
    assert ctx.get_parameter_source("model") is ParameterSource.COMMANDLINE


@pytest.mark.parametrize(
    ("written", "dtype"),
    [
        ("fp16", "float16"),
        ("half", "float16"),
        ("bf16", "bfloat16"),
        ("float", "float32"),
        ("fp32", "float32"),
        ("float32", "float32"),
    ],
)
def test_a_dtype_has_the_names_that_users_bring(written: str, dtype: str) -> None:
    assert run_command.make_context("run", ["demo", "--dtype", written]).params["dtype"] == dtype


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_errors_have_colours_on_terminals_that_show_them(
    variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    main_end, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(sys, "argv", ["zeroinf", "runn"])
        with pytest.raises(SystemExit):
            main.main()
    said = os.read(main_end, 1000).decode()
    assert ("\x1b[" in said) == coloured
    assert "no such command: zeroinf runn" in said


def commands_of(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from commands_of(child)


def test_help_fits_80_columns() -> None:
    ctx = click.Context(cli, info_name="zeroinf", terminal_width=80, max_content_width=80)
    for command in commands_of(cli):
        own = click.Context(command, info_name=command.name, parent=ctx)
        own.help_option_names = ["-h", "--help"]
        text = whole_help(own) if command is not cli and command.name != "lm-eval" else command.get_help(own)
        long = [line for line in text.splitlines() if len(line) > 80]
        assert long == [], command.name


FLOATS = [
    (command.name, option.opts[-1], option.type)
    for command in commands_of(cli)
    for option in command.params
    if isinstance(option.type, click.FloatRange | click.types.FloatParamType)
]


@pytest.mark.parametrize(("command", "flag", "kind"), FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_no_finite_number_is_a_usage_error_of_every_option(
    command: str, flag: str, kind: click.ParamType, value: str
) -> None:
    assert any(flag == "--link-gbps" for _, flag, _ in FLOATS)
    with pytest.raises(click.UsageError):
        kind.convert(value, None, None)


def test_words_for_the_model_are_utf8_whatever_the_locale() -> None:
    typed = "Grüße ✓".encode().decode("ascii", "surrogateescape")  # as Python has arguments where the locale is C
    params = run_command.make_context("run", ["demo", "--prompt", typed, "--prompt", "ü", "--stop", typed]).params
    assert (params["prompts"], params["stop"]) == (("Grüße ✓", "ü"), ("Grüße ✓",))
    half = "\ud83d \udce4"
    assert run_command.make_context("run", ["demo", "--prompt", half]).params["prompts"] == (half,)
