"""Lets fields of a dataclass define options.

A field gives an option its name, type and default; `option` adds its flags, its help and its bounds, and whether only
some engines take it. `parts` does so for a field that is a dataclass itself, whose fields are options of their own.
Everything else follows: flags of the command line, names of variables, conversion and checks of Python keywords,
entries of a job's fingerprint. It knows neither click nor the planner.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from zeroinf.errors import UsageError
from zeroinf.sizes import Share, parse_size, parse_size_or_share

_Options = TypeVar("_Options", bound="Options")
_KEY = "option"
_LEAST_SIZE = 1 << 20
"""Bytes, of a size that is a number in Python: less is a number of GiB or GB that lacks its unit."""

Section = Literal[
    "everyday options",
    "model",
    "input",
    "output",
    "sampling",
    "memory",
    "speed",
    "several GPUs",
    "machine",
    "server",
    "engines and baselines",
    "other",
]
"""Of help, in this order; what is `everyday options` is shown by --help, the others by --help-all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """The facts of an option beside the name, the type and the default of its field."""

    help: str
    flags: tuple[str, ...] = ()
    """As users write them, the one first that messages use; empty: `--` and the name of the field."""
    foreign: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    """Flags of other programs that mean just this, and what makes its value of theirs; they raise ValueError."""
    default: Any = field(default_factory=lambda: MISSING)
    """On the command line, where the field has none or another one."""
    written: Any = None
    """The type of what users write, where `convert` makes the field's value of it."""
    convert: Callable[[Any], Any] | None = None
    """Makes the field's value of what was written. Raises ValueError."""
    choices: tuple[str, ...] = ()
    """Of a text that is no Literal."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Of choices: what others write, and which choice means just that."""
    minimum: float | None = None
    maximum: float | None = None
    above: bool = False
    """The minimum itself is not allowed."""
    is_size: bool = False
    """Bytes, written such as 24GiB."""
    is_text: bool = False
    """Words that a model reads, in UTF-8 whatever the locale."""
    is_limit: bool = False
    """A size, or a `Share` of what there is, written such as 90%."""
    multiple_of: int = 1
    auto: bool = False
    """None is written `auto`."""
    path: Literal["any", "file", "existing file", "folder"] = "any"
    engine_specific: bool = False
    """Only engines whose traits list the field take it."""
    fingerprint: str = ""
    """Its name in a job's fingerprint, for an option that changes completions."""
    positional: bool = False
    """It may be written without its flag."""
    section: Section = "other"
    """Where help lists it."""
    hidden: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """An option with all that follows from its field."""

    name: str
    """Of the parameter on the command line, and of its variable."""
    path: tuple[str, ...]
    """The field, and below it the field of a part."""
    type: Any
    """What users write, without None."""
    default: Any
    """MISSING where the option is required."""
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        return self.option.flags or (f"--{self.path[-1].replace('_', '-')}",)

    @property
    def flag(self) -> str:
        """The one that messages name."""
        return next(flag for flag in self.flags if flag.startswith("--"))

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts that it can be, `auto` first; empty where it is no choice."""
        if self.option.choices:
            return self.option.choices
        values = list(_literals(self.type))
        return tuple(sorted(values, key=lambda value: value != "auto"))

    @property
    def default_asks_for_nothing(self) -> bool:
        """Whether giving the default in so many words is as good as giving nothing."""
        return self.default is None or self.default is False or self.default in ("auto", "model", ())

    def value_of(self, options: Any) -> Any:
        for name in self.path:
            options = getattr(options, name)
        return options

    def check(self, value: Any) -> None:
        """Raise UsageError, by the field's name, for a value that the command line would refuse."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            hint = choice_hint(str(value), self.choices, self.option.aliases)
            raise UsageError(f"{self.path[0]}={value!r}: no such choice", hint=hint)
        low, high = self.option.minimum, self.option.maximum
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if numeric and low is not None and (value <= low if self.option.above else value < low):
            raise UsageError(f"{self.path[0]}={value}: {'above' if self.option.above else 'at least'} {low:g}")
        if numeric and high is not None and value > high:
            raise UsageError(f"{self.path[0]}={value}: at most {high:g}")
        if numeric and self.option.is_size and value < _LEAST_SIZE:
            meant = Share(value) if self.option.is_limit and 0 < value <= 1 else f"{value}GiB"
            raise UsageError(f"{self.path[0]}={value} is {value} bytes", hint=f'write {self.path[0]}="{meant}"')


def choice_hint(given: str, choices: Sequence[str], aliases: Iterable[str] = ()) -> str:
    """The choice or alias that was probably meant, and all choices that there are."""
    near = get_close_matches(given.lower(), [*choices, *aliases], n=1)
    return f"{f'did you mean {near[0]}? ' if near else ''}one of {', '.join(choices)}"


def option(default: Any = MISSING, *, help: str, flags: tuple[str, ...] = (), **more: Any) -> Any:  # noqa: A002
    """A field that is an option; `more` are fields of `Option`."""
    return field(default=default, metadata={_KEY: Option(help=help, flags=flags, **more)})


def parts(default: Any = MISSING, **options: Option) -> Any:
    """A field that is a dataclass of which the fields named are options; without `default` it is required."""
    return field(default=default, metadata={_KEY: options})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all options dataclasses."""

    explicit: frozenset[str] = frozenset()
    """Names of options that the user gave in so many words, though it be their defaults."""

    def is_asked(self, name: str) -> bool:
        """Whether the user asks something of the option `name` (a field, or a part by its flag's name)."""
        return any(self._is_asked(one) for one in definitions(type(self)) if name in (one.name, one.path[0]))

    def asked(self, *names: str) -> list[str]:
        """The flags of those of the options `names` of which the user asks something."""
        found = [one for name in names for one in definitions(type(self)) if name in (one.name, one.path[0])]
        return [self.flag_of(one) for one in found if self._is_asked(one)]

    def flag_of(self, one: Definition) -> str:
        """Its flag as it was given: a switch that is off has a flag of its own."""
        off = one.type is bool and one.default is True and one.value_of(self) is False
        return one.flag.replace("--", "--no-", 1) if off else one.flag

    def _is_asked(self, one: Definition) -> bool:
        if one.default is not MISSING and one.value_of(self) != _converted(one, one.default):
            return True
        return one.name in self.explicit and not one.default_asks_for_nothing


def definitions(options: type[Any]) -> tuple[Definition, ...]:
    """Every option of an options dataclass, in the order of its fields."""
    return _definitions(cast(Hashable, options))


@lru_cache
def _definitions(options: Any) -> tuple[Definition, ...]:
    found, hints = list[Definition](), get_type_hints(options)
    for one in fields(options):
        known: Option | dict[str, Option] | None = one.metadata.get(_KEY)
        if isinstance(known, Option):
            found.append(_definition(known, (one.name,), hints[one.name], one.default))
        elif known is not None:
            whole = hints[one.name]
            below, defaults = get_type_hints(whole), {each.name: each.default for each in fields(whole)}
            for name, part in known.items():
                default = getattr(one.default, name) if one.default is not MISSING else defaults[name]
                found.append(_definition(part, (one.name, name), below[name], default))
    return tuple(found)


def _definition(known: Option, path: tuple[str, ...], hint: Any, default: Any) -> Definition:
    name = path[0]
    if len(path) > 1:
        flags = known.flags or (path[-1],)
        name = next(flag for flag in flags if not flag.startswith("-") or flag.startswith("--"))
        name = name.removeprefix("--").replace("-", "_")
    default = default if known.default is MISSING else known.default
    return Definition(name=name, path=path, type=known.written or _without_none(hint), default=default, option=known)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    kept = tuple(each for each in get_args(hint) if each is not type(None))
    return kept[0] if len(kept) == 1 else Union[kept]  # noqa: UP007


def _literals(hint: Any) -> tuple[str, ...]:
    """Values of a Literal, or of a union of such."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(value for each in get_args(hint) for value in _literals(each))
    return ()


def _converted(one: Definition, value: Any) -> Any:
    if one.option.convert is None:
        return value
    try:
        return one.option.convert(value)
    except ValueError as error:
        raise UsageError(f"{one.flag}: {error}") from error


def from_parameters(
    options: type[_Options], given: Mapping[str, Any], explicit: frozenset[str] = frozenset(), **more: Any
) -> _Options:
    """Options from the parameters of a command, each by its definition's name; `more` are other fields.

    Options that the command does not have keep their defaults. Raises UsageError for values that their dataclass does
    not take.
    """
    whole: dict[str, Any] = dict(more)
    below: dict[str, dict[str, Any]] = {}
    left = set(given)
    for one in definitions(options):
        if one.name not in given:
            continue
        left.discard(one.name)
        value = _converted(one, given[one.name])
        if len(one.path) == 1:
            whole[one.path[0]] = value
        else:
            below.setdefault(one.path[0], {})[one.path[1]] = value
    if left:
        raise TypeError(f"{options.__name__} has no option {', '.join(sorted(left))}")
    hints = get_type_hints(options)
    try:
        made = {name: hints[name](**values) for name, values in below.items()}
    except ValueError as error:
        raise UsageError(str(error)) from error
    return options(**whole, **made, explicit=explicit)


def from_keywords(
    options: type[_Options], given: Mapping[str, Any], of: type[Options] | None = None, **more: Any
) -> _Options:
    """Options from Python keywords by the names of fields; what else `given` holds is left alone.

    With `of`, a base of `options`, only its fields are taken. Sizes may be text, paths may be text, None stands for the
    default; `more` are other fields. Raises UsageError, by the keyword, for a value that is none of the option's.
    """
    found: dict[str, Any] = dict(more)
    known = {one.path: one for one in definitions(options)}
    for one in fields(of or options):
        value = given.get(one.name)
        if value is None or _KEY not in one.metadata:
            continue
        definition = known.get((one.name,))
        if definition is not None:
            value = _from_python(definition, value)
            definition.check(value)
        found[one.name] = value
    return options(**found)


def _from_python(one: Definition, value: Any) -> Any:
    if one.option.is_size and isinstance(value, str):
        try:
            if one.option.is_limit:
                return parse_size_or_share(value)
            return parse_size(value, multiple_of=one.option.multiple_of)
        except ValueError as error:
            raise UsageError(f"{one.path[0]}: {error}") from error
    if one.choices:
        text = str(value).removeprefix("torch.")  # of its dtypes
        return one.option.aliases.get(text, text)
    if one.type is Path:
        return Path(value)
    if get_origin(one.type) is tuple:
        values = [value] if isinstance(value, (str, Path)) else value
        return tuple(map(get_args(one.type)[0], values))
    return value


def fingerprint_of(options: Options) -> dict[str, Any]:
    """The options that change completions, by their names in a job's fingerprint."""
    marked = [one for one in definitions(type(options)) if one.option.fingerprint]
    return {one.option.fingerprint: one.value_of(options) for one in marked}
