"""Predicts packed forwards of any size from a few that are simulated.

Everything besides attention is linear in the tokens of a forward and in the rows whose next token is chosen, whichever
rows they are and however long their contexts. What attention reads and multiplies is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from itertools import chain
from typing import Any

import torch

from zeroinf.generation.attention import MOST_PARTS, PackedLayer, Scores, parts_elements
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import LayerCache
from zeroinf.model.dtypes import DTYPE_BYTES
from zeroinf.model.packing import windows_of
from zeroinf.planner.allocator import Event, Events
from zeroinf.planner.workload import Forwards, Kernel, Kernels, Pass, Shape, Step, same
from zeroinf.simulation.recorder import Recorder

# Tokens and choices of the forwards that are simulated: three make a plane, on which the last must lie.
_CORNER, _MORE_TOKENS, _MORE_CHOICES, _FAR = (64, 4), (4096, 4), (64, 36), (1024, 256)
# Kernels are timed at so many tokens, and between them by a straight line.
_TIMED = tuple(1 << power for power in range(16))


class OnPaper:
    """Simulates the allocations of packed attention on a GPU; its memory traffic and arithmetic are counted
    elsewhere.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(
        self, layer: PackedLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        out = query.new_empty(query.shape[1], query.shape[0], values.shape[2])
        query.new_empty(parts_elements(query, keys, values, MOST_PARTS), dtype=torch.float32)
        self._recorder.kernel("packed write", 0, (keys, values, keys, values))
        return out


class ByTokens:
    """Answers for `simulate`, which takes tokens and choices of a forward, and how many rows' steps recurrent modules
    compute together, but asks it for a few of them only.

    Where what is simulated does not lie on a plane, every forward is. Choices beyond the most rows that are `together`
    have a plane of their own.
    """

    def __init__(self, simulate: Callable[[int, int, int], Step], together: int | None = None) -> None:
        """together: None where it is as many as there are."""
        self._simulate, self._together = cache(simulate), together
        self._known: dict[tuple[int, int], Step] = {}
        self._planes: dict[bool, _Plane | None] = {}

    def step(self, tokens: int, choices: int) -> Step:
        """The forward of so many tokens (1 or more), after which `choices` rows have theirs chosen."""
        key = tokens, min(tokens, max(1, choices))
        if key not in self._known:
            together = self._full(key[1])
            plane = self._plane(together)
            self._known[key] = self._at(*key, together) if plane is None else plane.at(*key)
        return self._known[key]

    def _at(self, tokens: int, choices: int, together: int | None) -> Step:
        return self._simulate(tokens, choices, choices if together is None else together)

    @cached_property
    def forwards(self) -> Forwards:
        """Kernels of forwards of any size."""
        few, many = _TIMED[0], _TIMED[-1]
        return Forwards(
            tokens=tuple((tokens, self._kernels(tokens, few)) for tokens in _TIMED),
            choices=tuple((choices, self._kernels(many, choices)) for choices in _TIMED),
        )

    def _kernels(self, tokens: int, choices: int) -> tuple[Kernels, ...]:
        plane = self._plane(self._full(choices))
        return self.step(tokens, choices).kernels if plane is None else plane.kernels_at(tokens, choices)

    def _full(self, choices: int) -> int | None:
        return self._together if self._together is not None and choices > self._together else None

    def _plane(self, together: int | None) -> _Plane | None:
        is_full = together is not None
        if is_full not in self._planes:
            plane = _Plane(*(self._at(*at, together) for at in (_CORNER, _MORE_TOKENS, _MORE_CHOICES)))
            self._planes[is_full] = plane if plane.holds(*_FAR, self._at(*_FAR, together)) else None
        return self._planes[is_full]


class _Plane:
    """The steps around three: one, one of more tokens, and one after which more rows have tokens chosen."""

    def __init__(self, corner: Step, more_tokens: Step, more_choices: Step) -> None:
        self._corner, self._more = corner, (more_tokens, more_choices)
        self._over = _MORE_TOKENS[0] - _CORNER[0], _MORE_CHOICES[1] - _CORNER[1]

    def holds(self, tokens: int, choices: int, found: Step) -> bool:
        """Whether `found` lies on the plane."""
        try:
            return same(self.at(tokens, choices), found)
        except ValueError:
            return False

    def at(self, tokens: int, choices: int) -> Step:
        """Raises ValueError where the three do not do the same things in other sizes."""
        steps, known = (self._corner, *self._more), dict[tuple[int, ...], Events]()

        def events(*of_each: Events) -> Events:
            key = tuple(map(id, of_each))
            if key not in known:  # blocks that do the same have one section
                known[key] = tuple(
                    one
                    if one.nbytes is None or two.nbytes is None or three.nbytes is None
                    else Event(one.key, self._between(tokens, choices, one.nbytes, two.nbytes, three.nbytes))
                    for one, two, three in zip(*of_each, strict=True)
                )
            return known[key]

        return Step(
            inputs=events(*(step.inputs for step in steps)),
            sections=tuple(events(*parts) for parts in zip(*(step.sections for step in steps), strict=True)),
            end=events(*(step.end for step in steps)),
            choice=events(*(step.choice for step in steps)),
            kernels=self.kernels_at(tokens, choices),
        )

    def kernels_at(self, tokens: int, choices: int) -> tuple[Kernels, ...]:
        """The kernels of such a step. Raises ValueError likewise."""
        between = partial(self._between, tokens, choices)

        def kernels(*of_each: Kernels) -> Kernels:
            found = zip(*(each.kernels for each in of_each), strict=True)
            return Kernels(
                of_each[0].times,
                tuple(
                    Kernel(
                        between(one.flops, two.flops, three.flops),
                        between(one.nbytes, two.nbytes, three.nbytes),
                        one.operator,
                        one.pattern,
                    )
                    for one, two, three in found
                ),
            )

        groups = zip(*(step.kernels for step in (self._corner, *self._more)), strict=True)
        return tuple(kernels(*group) for group in groups)

    def _between(self, tokens: int, choices: int, at: int, beside: int, above: int) -> int:
        (over_tokens, over_choices), (few, fewest) = self._over, _CORNER
        return at + (beside - at) * (tokens - few) // over_tokens + (above - at) * (choices - fewest) // over_choices


def fullest(sides: Sequence[tuple[ByTokens, int]], shape: Shape) -> tuple[Pass, ...]:
    """Passes of `shape` of which one has the most memory in use: all that a pass may hold, evenly shared out, and as
    many forwards of the most tokens as that may come to. `sides`: rows whose keys and values rest in one place, by
    their forwards; the prompts may be those of any.

    Steps for which the CPU attends are counted with the others in host memory, though they have one or two forwards of
    their own: these stand aside in the middle of a layer, where they hold less for a token than the fullest moment of
    the layer, and the largest forward is that much smaller."""
    found: dict[Pass, None] = {}
    for prompts, _ in sides:
        of_sides = []
        for steps, rows in sides:
            tokens = rows + (shape.prefill_tokens if steps is prompts else 0)
            most = min(shape.forward_tokens, tokens)
            forwards = max(-(-tokens // most), -(-rows // shape.micro_batch_rows))
            sizes = [-(-tokens // forwards)] * forwards, [most] * (tokens // most)
            of_sides.append([tuple(_choosing(steps, each, rows, shape)) for each in sizes])
        found |= dict.fromkeys(tuple(chain(*each)) for each in zip(*of_sides, strict=True))
    return tuple(found)


def _choosing(steps: ByTokens, sizes: Iterable[int], rows: int, shape: Shape) -> Iterator[Step]:
    """Forwards of such sizes, in the first of which as many of the `rows` as can be have their next token chosen."""
    left = rows
    for size in sizes:
        choices = min(left, size, shape.micro_batch_rows)
        left -= choices
        yield steps.step(size, choices)


def query_heads(config: Any) -> int:
    """Heads of a layer's queries, the most of any layer."""
    asked = getattr(config.get_text_config(decoder=True), "num_attention_heads", None)
    return max(asked) if isinstance(asked, list | tuple) else asked or 1


def attention_of(anatomy: Anatomy, model: Any, rows: float, start: float, count: float) -> tuple[Kernels, ...]:
    """Attention of `rows` rows, each with `count` new tokens behind `start`, a kernel for each layer."""
    heads = query_heads(model.config)
    kinds = Counter(each for each in zip(anatomy.cache, windows_of(model), strict=True) if each[0].pooled)
    return tuple(
        Kernels(times, (_attention(layer, heads, window, rows, start, count),))
        for (layer, window), times in kinds.items()
    )


def _attention(layer: LayerCache, heads: int, window: int | None, rows: float, start: float, count: float) -> Kernel:
    assert layer.keys is not None
    assert layer.values is not None
    heads = max(heads, layer.keys.heads)
    widths = layer.keys.width + layer.values.width
    seen = start + (count + 1) / 2  # keys that a query sees, on average
    held = start
    if window is not None:
        seen, held = min(seen, window), min(held, window)
    new = rows * count * heads * widths * DTYPE_BYTES[layer.keys.dtype]  # queries, and what comes out
    kept = rows * (held + count) * (layer.keys.nbytes + layer.values.nbytes)
    return Kernel(int(2 * rows * count * heads * seen * widths), int(new + kept), "packed attention")
