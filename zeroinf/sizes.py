"""Parses and formats sizes, shares, rates, numbers and durations, and defines the default length of completions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

DEFAULT_NEW_TOKENS = 128
"""Most tokens of a completion where neither the command line nor its request says how many."""

_UNITS = {"B": 1}
_UNITS |= {f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", start=1)}
_UNIT_BYTES = {unit.lower(): factor for unit, factor in _UNITS.items()}
_GIB = 1 << 30
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class Share:
    """A part, above 0 and at most 1, of a size that is known later, such as the memory of a GPU."""

    part: float

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1:
            raise ValueError(f"{self} must be above 0% and at most 100%")

    def __str__(self) -> str:
        return f"{100 * self.part:.6g}%"


def limit_of(limit: int | Share | None, whole_bytes: int) -> int | None:
    """Bytes that `limit` leaves of `whole_bytes`; None where there is no limit."""
    return int(limit.part * whole_bytes) if isinstance(limit, Share) else limit


def parse_size_or_share(text: str) -> int | Share:
    """Bytes of `24GiB`, or the share that `90%` is. Raises ValueError that says what is wrong."""
    if (match := _PERCENT.fullmatch(text)) is not None:
        return Share(float(match[1]) / 100)
    number = _SIZE.fullmatch(text)
    if number is not None and not number[2] and 0 < float(number[1]) <= 1:
        raise ValueError(f"{text.strip()} what? write {Share(float(number[1]))}, or {text.strip()}GiB")
    return parse_size(text)


def parse_share(text: str) -> Share:
    """The share that `0.9` is. Raises ValueError that says what is wrong."""
    try:
        part = float(text)
    except ValueError:
        part = 0.0
    if not 0 < part <= 1:
        raise ValueError(f"{text} is no part of a whole, such as 0.9")
    return Share(part)


def parse_size(text: str, *, multiple_of: int = 1) -> int:
    """Bytes of `24GiB` (binary), `24GB` (decimal) or `4096B`. Raises ValueError that says what is wrong."""
    match = _SIZE.fullmatch(text)
    if match is not None and not match[2]:
        unit = _unit_meant(float(match[1])) if multiple_of == 1 else "B"
        raise ValueError(f"{text.strip()} what? write {text.strip()}{unit}")
    if match is None or match[2].lower() not in _UNIT_BYTES:
        raise ValueError(f"{text!r} is not a size: write 24GiB, 512MiB, 1GB or 4096B")
    factor = _UNIT_BYTES[match[2].lower()]
    size = Fraction(match[1]) * factor
    if factor > 1:
        size = Fraction(int(size))  # 3.6GiB is no whole number of bytes, and nobody means it to be
    if size <= 0 or size % multiple_of:
        whole = "a whole number of bytes" if multiple_of == 1 else f"a multiple of {multiple_of} bytes"
        raise ValueError(f"{text!r} must be {whole} above zero")
    return int(size)


def _unit_meant(number: float) -> str:
    """The unit that somebody probably has in mind who writes `number` alone."""
    return "GiB" if number <= 8192 else "MiB" if number < 1 << 22 else "B"


def gib(size_bytes: int) -> str:
    """A size as it is printed: `23.5 GiB`, `1.16 GiB`, and in MiB or KiB where GiB would show nothing."""
    if _GIB / 10 <= size_bytes < 9.995 * _GIB:
        return f"{size_bytes / _GIB:.2f} GiB"
    for unit, name in ((_GIB, "GiB"), (1 << 20, "MiB")):
        if size_bytes >= unit / 10 or size_bytes == 0:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes / 1024:.1f} KiB"


def rate_text(per_second: float) -> str:
    """A rate as it is printed: `1,126.3`, `4.0`, and `0.034` where one digit would show nothing."""
    return f"{per_second:,.1f}" if per_second >= 1 or not per_second else f"{per_second:.2g}"


def count_text(count: int, one: str, many: str) -> str:
    """A number of things in a sentence: `1 result is`, `1,000 results are`."""
    return f"{count:,} {one if count == 1 else many}"


def clock(seconds: float) -> str:
    """Seconds as they are printed: 1:05, 2:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
