"""Every option of every command can be set in the environment, by the name of its flag and with the same effect."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import zeroinf
from zeroinf.cli.environment import VARIABLES, EnvironmentOption, prefix_of, variables_of
from zeroinf.cli.main import cli
from zeroinf.cli.params import AutoIntType, ForeignType, InjectionPolicyType, JsonObjectType, LimitType, SizeType

ROOT = click.Context(cli, auto_envvar_prefix="ZEROINF")


def commands(group: click.Group = cli, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name in group.list_commands(ROOT):
        command = group.get_command(ROOT, name)
        assert command is not None
        yield (*names, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)


COMMANDS = dict(commands())
OWN_OPTIONS = [names for names in COMMANDS if names not in (("lm-eval",), ("completion",))]
"""Commands with options of ours: those of lm-eval are the harness's, and completion has none."""


def sample(option: EnvironmentOption) -> str:
    """A value that `option` takes, and that is not its default."""
    kind = option.type
    if isinstance(kind, click.Choice):
        return next(choice for choice in map(str, kind.choices) if choice != option.default)
    if isinstance(kind, click.Path):
        return __file__ if kind.file_okay else "/"
    if isinstance(kind, (SizeType, LimitType)):
        return "8MiB"
    if isinstance(kind, InjectionPolicyType):
        return "Block=attention.output,mlp.output"
    if isinstance(kind, JsonObjectType):
        return '{"a": [1]}'
    if isinstance(kind, type(click.STRING)):
        return " whole words,\nand lines "
    if isinstance(kind, click.FloatRange):
        return "77.5" if kind.max is None or kind.max > 2 else "0.25"
    assert isinstance(kind, (click.IntRange, AutoIntType)) or kind is click.INT or kind.name == "list"
    return "7"


def parsed(names: tuple[str, ...], arguments: list[str], patch: dict[str, str] | None = None) -> dict[str, Any]:
    """What the command gets."""
    command = COMMANDS[names]
    needed = [
        word
        for one in command.params
        if isinstance(one, EnvironmentOption) and one.required and not set(one.opts) & set(arguments)
        and not any((patch or {}).get(variable) for variable in one.variables(prefix_of(*names)))
        for word in (one.opts[-1], sample(one))
    ]  # fmt: skip
    files = [__file__] * sum(isinstance(one, click.Argument) and one.required for one in command.params)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (patch or {}).items():
            environment.setenv(name, value)
        with command.make_context(
            names[-1], [*needed, *arguments, *files], auto_envvar_prefix=prefix_of(*names)
        ) as context:
            return {name: repr(value) for name, value in context.params.items()}


@pytest.mark.parametrize("names", [names for names in OWN_OPTIONS if COMMANDS[names].params], ids=" ".join)
def test_each_flags_variable_has_the_effect_of_the_flag(names: tuple[str, ...]) -> None:
    usual, prefix = parsed(names, []), prefix_of(*names)
    tried = 0
    for option in COMMANDS[names].params:
        if isinstance(option, click.Argument) or isinstance(
            option.type, ForeignType
        ):  # the environment knows our names
            continue
        assert isinstance(option, EnvironmentOption), f"{option.opts} cannot be set in the environment"
        for flag in (flag for flag in (*option.opts, *option.secondary_opts) if flag.startswith("--")):
            variable = f"{prefix}_{flag[2:].replace('-', '_').upper()}"
            if option.is_flag:
                by_flag, by_variable = parsed(names, [flag]), parsed(names, [], {variable: "1"})
                switched_off = parsed(names, [], {variable: "false"})
                assert switched_off[str(option.name)] != by_flag[str(option.name)]
            else:
                value = sample(option)
                by_flag, by_variable = parsed(names, [flag, value]), parsed(names, [], {variable: value})
                assert parsed(names, [], {variable: ""}) == usual, "an empty variable counts as not set"
                if not option.required:
                    assert by_flag != usual
            assert by_variable == by_flag, variable
            tried += 1
    assert tried


def test_no_variable_sets_two_options() -> None:
    own = [
        (name, variable)
        for name in cli.list_commands(ROOT)
        for variable in variables_of(COMMANDS[name,], prefix_of(name))
    ]
    assert len(own) == len(set(own)) > 100


def test_a_flag_comes_before_the_environment() -> None:
    assert parsed(("run",), ["--stop", "flag"], {"ZEROINF_RUN_STOP": "environment"})["stop"] == "('flag',)"
    assert parsed(("run",), ["--pin-memory"], {"ZEROINF_RUN_PIN_MEMORY": "0"})["pin_memory"] == "True"


def test_two_variables_of_one_option_are_refused() -> None:
    with pytest.raises(click.UsageError, match="MAX_NEW_TOKENS and ZEROINF_RUN_MAX_TOKENS set the same option"):
        parsed(("run",), [], {"ZEROINF_RUN_MAX_NEW_TOKENS": "1", "ZEROINF_RUN_MAX_TOKENS": "2"})


def zeroinf_with(environment: dict[str, str], *arguments: str) -> Result:
    return CliRunner(env=environment).invoke(cli, list(arguments))


@pytest.mark.parametrize(
    ("variable", "arguments", "message"),
    [
        ("ZEROINF_RUN_GPU_MEMORY_BYTES", ["run"], "sets no option: did you mean ZEROINF_RUN_GPU_MEMORY?"),
        ("ZEROINF_RUN_PROMPTS", ["run", "-m", "x"], "sets no option: did you mean ZEROINF_RUN_PROMPT?"),
        ("ZEROINF_PLAN_INPUTLEN", ["plan"], "sets no option: did you mean ZEROINF_PLAN_INPUT_LEN?"),
        ("ZEROINF_STORE_LIST_NVME_PATHS", ["store", "list"], "did you mean ZEROINF_STORE_LIST_NVME_PATH?"),
        ("ZEROINF_BENCH_COMPARE_FORM", ["bench", "compare"], "did you mean ZEROINF_BENCH_COMPARE_FORMAT?"),
        ("ZEROINF_RUN_XYZZY", ["run"], "sets no option: zeroinf config show run lists those that do"),
        ("ZEROINF_RUN_XYZZY", ["config", "show", "run"], "sets no option"),
        ("ZEROINF_RUN_XYZZY", ["config", "show"], "sets no option"),
    ],
)
def test_a_variable_that_is_nobodys_is_refused_with_the_nearest(
    variable: str, arguments: list[str], message: str
) -> None:
    done = zeroinf_with({variable: "1"}, *arguments)
    assert done.exit_code == 2
    assert f"{variable} in the environment" in done.stderr
    assert message in done.stderr
    assert zeroinf_with({variable: "1"}, arguments[0], "--help").exit_code == 0


def test_a_wrong_value_is_refused_by_the_name_of_its_variable() -> None:
    done = zeroinf_with({"ZEROINF_RUN_HOST_MEMORY": "much"}, "run", "-m", "x")
    assert done.exit_code == 2
    assert "'--host-memory' (set by ZEROINF_RUN_HOST_MEMORY): 'much' is not a size" in done.stderr


def test_help_says_the_rule() -> None:
    assert "ZEROINF_RUN_BATCH_SIZE=16" in zeroinf_with({}, "--help").stdout
    for name in {name for name, *_ in OWN_OPTIONS}:
        assert prefix_of(name) in zeroinf_with({}, name, "--help").stdout


# zeroinf config show


def shown(environment: dict[str, str], *arguments: str) -> Any:
    done = zeroinf_with(environment, "config", "show", "--json", *arguments)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_config_show_says_where_each_value_comes_from() -> None:
    environment = {"ZEROINF_RUN_HOST_MEMORY": "1KiB", "ZEROINF_RUN_STOP": "\n", "ZEROINF_RUN_SEED": "1"}
    found = shown(environment, "run", "--seed", "2", "--stop", "a b", "--stop", "c")["commands"]["run"]
    settings = {one["flag"]: (one["value"], one["source"], one["variable"]) for one in found}
    assert settings["--host-memory"] == ("1KiB", "environment", "ZEROINF_RUN_HOST_MEMORY")
    assert settings["--seed"] == ("2", "flag", "ZEROINF_RUN_SEED")
    assert settings["--stop"] == (["a b", "c"], "flag", "ZEROINF_RUN_STOP")
    assert settings["--batch-size"] == ("auto", "default", "ZEROINF_RUN_BATCH_SIZE")
    assert settings["--model"] == (None, "default", "ZEROINF_RUN_MODEL")
    assert r'--stop                     "\n"   environment' in zeroinf_with(environment, "config", "show", "run").stdout


def test_config_show_without_a_command_says_what_the_environment_sets() -> None:
    found = shown({"ZEROINF_STORE_LIST_NVME_PATH": "/", "ZEROINF_CACHE": "/c"})
    assert found["commands"] == {
        "store list": [
            {
                "flag": "--nvme-path",
                "value": ["/"],
                "source": "environment",
                "variable": "ZEROINF_STORE_LIST_NVME_PATH",
            }
        ]
    }
    assert found["variables"]["ZEROINF_CACHE"] == "/c"


def test_config_show_knows_every_variable_that_the_code_reads() -> None:
    prefixes = tuple(f"{prefix_of(name)}_" for name in cli.list_commands(ROOT))
    files = Path(zeroinf.__file__).parent.rglob("*.py")
    named = {name for file in files for name in re.findall(r"ZEROINF_[A-Z_]+", file.read_text())}
    assert {name for name in named if not f"{name}_".startswith(prefixes)} <= {*VARIABLES, "ZEROINF_"}


@pytest.mark.parametrize("arguments", [["nothing"], ["store", "nothing"]])
def test_config_show_of_what_is_no_command_says_so(arguments: list[str]) -> None:
    done = zeroinf_with({}, "config", "show", *arguments)
    assert (done.exit_code, f"no such command: zeroinf {' '.join(arguments)}" in done.stderr) == (2, True)


def test_config_without_show_is_what_it_was() -> None:
    done = zeroinf_with({}, "config", "-m", "opt-30b", "--offload", "cpu")
    assert (done.exit_code, json.loads(done.stdout)["zero_optimization"]["stage"]) == (0, 3)
    assert "Missing option '-m' / '--model'" in zeroinf_with({}, "config").stderr
    refused = zeroinf_with({}, "config", "-b", "8", "show")
    assert "-b/--batch-size has no effect before `show`" in str(refused.exception)


def test_a_variable_of_kubernetes_is_told_from_ours() -> None:
    """A pod beside a service named zeroinf-serve gets these, whoever asked for them."""
    given = {"ZEROINF_SERVE_PORT": "tcp://10.0.0.1:8000", "ZEROINF_SERVE_SERVICE_HOST": "10.0.0.1"}
    done = zeroinf_with(given, "serve", "-m", "x")
    assert done.exit_code == 2
    assert "set by Kubernetes" in done.stderr
