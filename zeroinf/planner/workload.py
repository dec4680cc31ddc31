"""Describes the work of micro-batches on a GPU, step by step, as the simulation recorded it.

Input: recorded allocations and kernels. Output: workloads from which the planner computes memory and time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import fmean
from typing import Any, Literal, NamedTuple, Protocol

from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import HostSize, KvDtype, PoolSize
from zeroinf.planner.allocator import Event, Events
from zeroinf.planner.prefixes import SharedPrefixes

# So many prompts' lengths stand for all of a job's.
_MOST_PROMPTS = 64
# And so many, at equal distances, for those that nobody has seen.
_UNSEEN_PROMPTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Prompts and completions of a job, in tokens."""

    prompt_tokens: int
    """The longest prompt."""
    new_tokens: int
    """The most that is added to one."""
    padded: bool = True
    """Prompts differ in length."""
    whole: bool = False
    """A prompt is computed in one part, however long it is."""
    scored_tokens: int = 0
    """Given tokens of which a forward keeps the scores, at the most; prompts run whole then."""
    request_bytes: int = 0
    """Host memory that the requests of a job hold already."""
    logprobs: int | None = None
    """Log-probabilities that rows ask for, the most of any; None: none does."""
    sampled: bool = False
    """Some rows draw their tokens, which takes copies of the scores."""
    penalized: bool = False
    """Biases or penalties alter the scores of some rows, which takes copies of them."""
    structured: bool = False
    """The answers of some rows have a format: masks take memory where they are applied, to copies of the scores."""
    mean_prompt_tokens: float | None = None
    """None: all are as long as the longest."""
    prompts: tuple[int, ...] = ()
    """Prompts' tokens by length, few of many at equal distances; empty: all are as long as the longest."""
    mean_new_tokens: float | None = None
    mean_tokens: float | None = None
    """Tokens that a live row can come to."""
    mean_pages: float | None = None
    """Pages of the KV cache that a live row takes."""
    prefixes: SharedPrefixes | None = None
    """What prompts share, where rows may; None: nothing."""

    @classmethod
    def of(cls, anatomy: Anatomy, rows: Sequence[tuple[int, int]], logprobs: int | None = None) -> Lengths:
        """The lengths of a job; `rows` gives the tokens of each row's prompt, and those that are added to it at the
        most."""
        prompts, lives = [prompt for prompt, _ in rows], [new for _, new in rows]
        pages = [anatomy.row_pages(anatomy.row_tokens(prompt, new)) for prompt, new in rows]
        return cls(
            prompt_tokens=max(prompts),
            new_tokens=max(lives),
            padded=len(set(prompts)) > 1,
            logprobs=logprobs,
            mean_prompt_tokens=fmean(prompts),
            prompts=tuple(sorted(prompts)[:: -(-len(prompts) // _MOST_PROMPTS)]),
            mean_new_tokens=fmean(lives),
            mean_tokens=fmean(map(sum, rows), lives),  # in a pass, of the rows that are live, more are long ones
            mean_pages=fmean(pages, lives),
        )

    @classmethod
    def up_to(
        cls, anatomy: Anatomy, prompt_tokens: int, new_tokens: int, *, rows: int | None = None, **more: Any
    ) -> Lengths:
        """The lengths of requests that are to come: as many prompts of each length up to `prompt_tokens`, each with
        `new_tokens` new ones.

        What live rows need follows from their mean; of the longest prompts fewer are live together. With `rows`, so
        many of the longest have room. `more` are other fields.
        """
        if rows is not None:
            return cls(prompt_tokens=prompt_tokens, new_tokens=new_tokens, **more)
        steps = min(prompt_tokens, _UNSEEN_PROMPTS)
        prompts = [prompt_tokens * (step + 1) // steps for step in range(steps)]
        return replace(cls.of(anatomy, [(prompt, new_tokens) for prompt in prompts]), **more)

    @property
    def mean_context(self) -> float:
        """Tokens that a live row has in the cache, on average over its way."""
        prompt, new = self.mean_prompt_tokens or self.prompt_tokens, self.mean_new_tokens or self.new_tokens
        return (prompt + (self.mean_tokens or prompt + new)) / 2

    def attended_tokens(self, micro_batches: int) -> float:
        """Columns that a decode step of so many micro-batches attends to, on average: the like-long rows run together,
        padded to the longest of them, so the more there are the nearer they come to what rows have on average."""
        new, mean = self.mean_new_tokens or self.new_tokens, self.mean_context
        # Rows that live equally long are about equally far; of others, some have nearly all their tokens at any time.
        longest = self.prompt_tokens + (self.new_tokens / 2 if new == self.new_tokens else self.new_tokens)
        return mean + (longest - mean) / micro_batches

    def prompts_a_pass(self, tokens: int) -> float:
        """The number of prompts in a pass that computes so many tokens: like-long ones run together, and what is left
        over is too short for one more. A longer one takes several passes."""
        prompts = self.prompts or (self.prompt_tokens,)
        passes = (1 / (tokens // prompt) if prompt <= tokens else ceil(prompt / tokens) for prompt in prompts)
        return len(prompts) / sum(passes)

    @property
    def computed_tokens(self) -> float:
        """Prompt tokens of a row that it does not share, on average."""
        saved = 0.0 if self.prefixes is None else self.prefixes.saved_tokens
        return (self.mean_prompt_tokens or self.prompt_tokens) - saved

    def pool(self, anatomy: Anatomy, rows: int, host_rows: int = 0, *, packed: bool = False) -> PoolSize:
        """Room for so many rows of these lengths on average, and for the longest of all; some have no pages. Rows of
        `packed` forwards share what their prompts begin with, unless keys rest in host memory."""
        tokens, paged = anatomy.row_tokens(self.prompt_tokens, self.new_tokens), rows - host_rows
        longest = anatomy.row_pages(tokens) if paged else 0
        mean = longest if self.mean_pages is None else self.mean_pages
        pages, shared = max(longest, ceil(paged * mean)), self.prefixes
        if shared is None or not shared.longest_pages or not packed or host_rows:
            return PoolSize(rows=rows, tokens=tokens, pages=pages)
        pages = min(pages, ceil(rows * shared.mean_pages) + longest)
        kept = pages
        if any(layer.window is not None for layer in anatomy.cache):  # rows have few pages of these, prefixes all
            kept = min(pages, ceil(rows * shared.prefix_pages) + shared.longest_pages)
        return PoolSize(rows=rows, tokens=tokens, pages=pages, prefix_pages=kept)

    def host(self, shape: Shape, *, whole: int = 0) -> HostSize | None:
        """Room for the rows of `shape` in host memory; None where there are none. Prompts run so many tokens at a time,
        at the most, or the `whole` of one."""
        if not shape.host_rows:
            return None
        tokens = self.prompt_tokens + self.new_tokens
        mean = tokens if self.mean_tokens is None else self.mean_tokens
        together = min(shape.micro_batch_rows, shape.host_rows)
        if shape.cpu_rows:  # steps stage nothing; prompts that go on have a forward each
            together = 0 if whole else 1
        # The last row may be a little longer than what is left on the GPU, and has a place here then.
        left_over = tokens if mean < tokens and shape.host_rows < shape.rows else 0
        return HostSize(
            tokens=max(tokens, ceil(shape.host_rows * mean) + left_over),
            seen_columns=together * tokens,
            new_columns=max(shape.forward_tokens or shape.prefill_tokens, together, whole),
            dtype=shape.kv_dtype,
            cpu_rows=shape.cpu_rows,
        )


Pattern = Literal["straight", "converted", "crossed", "repeated"]
"""How a kernel goes over its tensors: over all of them from front to back, the same but for a change of the data type,
over some in another order, or over some elements several times."""


class Kernel(NamedTuple):
    """One kernel: floating point operations of matrix products (0 for all else), bytes read and written."""

    flops: int
    nbytes: int
    operator: str = ""
    """As torch calls what launches it; "attention" is the flash kernel, "efficient attention" the other one."""
    pattern: Pattern = "straight"


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernels that run `times` times in a step, since blocks of a kind do the same."""

    times: float
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpansionCost:
    """The cost of expanding a quantized checkpoint's weights, one block at a time."""

    nbytes: int
    """The most that is alive beside what the block holds, while one is expanded and computes."""
    kernels: tuple[Kernels, ...]
    """Of a pass over all blocks, which serves all its micro-batches."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """One micro-batch in one pass: its forward and the choice of its tokens."""

    inputs: Events
    """What its inputs are made of, before any forward of the pass begins."""
    sections: tuple[Events, ...]
    """The forward up to the first block, then from each block to the next."""
    end: Events
    """When all forwards of the pass are over, the inputs go."""
    choice: Events
    """Tokens are chosen, and the rest goes."""
    kernels: tuple[Kernels, ...]


def same(one: Step, other: Step) -> bool:
    """Whether two steps do the same; each is equal to itself alone, so that what follows from it can be kept.

    Patterns of kernels may differ, in which tensors may seem alike that have as many elements by chance.
    """
    if any(getattr(one, name) != getattr(other, name) for name in Step.__slots__ if name != "kernels"):
        return False
    found, expected = (
        [(group.times, [each[:3] for each in group.kernels]) for group in step.kernels] for step in (one, other)
    )
    return found == expected


Pass = tuple[Step, ...]
"""The micro-batches of one walk over the blocks, in their order."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a pass: live rows, rows that run one forward, and prompt tokens that are computed."""

    rows: int
    micro_batch_rows: int
    prefill_tokens: int
    host_rows: int = 0
    """Rows whose keys and values rest in host memory."""
    kv_dtype: KvDtype = "model"
    forward_tokens: int = 0
    """Tokens of one packed forward, at the most; 0: rows of a forward are padded to one length."""
    expert_parts: int = 1
    """Parts in which the experts of a layer compute."""
    attends_on_cpu: bool = False
    """The CPU attends for steps of rows in host memory, in packed forwards."""

    @property
    def cpu_rows(self) -> int:
        """Rows for whose steps the CPU attends."""
        return self.host_rows if self.attends_on_cpu else 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Forwards:
    """Kernels of packed forwards beside attention, which follow from the tokens alone: those of some numbers of tokens,
    each with as many choices as `choices` begins with, and of some numbers of choices, each with as many tokens as
    `tokens` begins with. The numbers grow."""

    tokens: tuple[tuple[int, tuple[Kernels, ...]], ...]
    choices: tuple[tuple[int, tuple[Kernels, ...]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """The parts of packed passes: forwards, attention by itself, and the passes that take the most memory."""

    forwards: Forwards
    prompts: tuple[Kernels, ...]
    """Attention of as many prompt tokens as a pass computes."""
    decode: tuple[Kernels, ...]
    """Attention of a step of all rows, with as many tokens as they have on average."""
    fullest: tuple[Pass, ...]
    """Passes of which one has the most memory in use."""
    replayed: tuple[tuple[int, int], ...] = ()
    """Tokens of forwards that may replay CUDA graphs, in ascending order, with the bytes that a layer allocates."""
    mixing: tuple[tuple[Kernels, ...], tuple[Kernels, ...]] = ((), ())
    """Recurrent modules, which are no part of `forwards`: of as many prompt tokens as a pass computes, and of a step of
    all rows."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Workload:
    """Passes with the longest prompts and at the fullest, for rows that are live together."""

    shape: Shape
    pool: PoolSize
    prompt_tokens: float
    """Of a row, on average."""
    new_tokens: float
    """Of a row, on average."""
    most_new_tokens: int
    """Of any row."""
    cache: Events
    """Allocations of the KV cache's pool and the rows' tokens, once for a job."""
    prompts: Pass
    """As many prompts as a pass computes, or the last part of a long one."""
    prompts_rows: float
    """So many of average length take as long; less than one where a pass computes a part of one."""
    prompts_a_pass: float
    """So many come in a pass at the most, on average."""
    first_decode: Pass
    """The first token after prompts of average length; empty where there is only one new token."""
    last_decode: Pass
    """The last token of the longest row."""
    decode_at: float = 0.5
    """Where between these two a step is on average: 0 is the first one, 1 the last."""
    host: HostSize | None = None
    """Room for the rows that rest in host memory."""
    expansion: ExpansionCost | None = None
    """None where weights are in full."""
    multiplies_codes: bool = False
    """Products multiply by weights as they rest, where these are codes."""
    paged_prompts: Pass = ()
    """Prompts of rows on the GPU, where `prompts` are of rows in host memory and there are both."""
    packed: Packed | None = None
    """None where forwards are padded. Else `prompts`, `first_decode` and `last_decode` are empty."""
    shares_passes: bool
    """Prompts and decode steps share passes; otherwise all rows start together, and what is alive after the last step
    goes with them."""
    roughly: bool = False
    """Its memory is counted without what an allocator loses in pages and gaps, which takes a replay to know."""

    @property
    def is_mixed(self) -> bool:
        """Whether some rows live longer than others."""
        return self.new_tokens < self.most_new_tokens

    @property
    def passes(self) -> tuple[Pass, ...]:
        """An order of passes that finds the most memory in use."""
        if self.packed is not None:
            return self.packed.fullest
        if not self.shares_passes:
            return tuple(filter(None, (self.prompts, self.first_decode, self.last_decode)))
        kinds = filter(None, (self.prompts, self.paged_prompts))
        return (self.prompts, *((*prompts, *self.last_decode) for prompts in kinds))


class Simulate(Protocol):
    """A function that simulates the workload of rows of some shape."""

    def __call__(self, shape: Shape) -> Workload: ...


def lock_step(steps: Pass) -> list[Event]:
    """The events of a pass: each block serves every micro-batch before the next block serves any."""
    count = len(steps)
    return [Event(key * count + number, nbytes) for number, part in in_lock_step(steps) for key, nbytes in part]


def in_lock_step(steps: Pass) -> Iterator[tuple[int, Events]]:
    """The sections of a pass in that order, each with the number of the micro-batch whose keys it has."""
    yield from enumerate(step.inputs for step in steps)
    for phase in zip(*(step.sections for step in steps), strict=True):
        yield from enumerate(phase)
    yield from enumerate(step.end for step in steps)
    yield from enumerate(step.choice for step in steps)
