"""The allocator on paper against a plain model that looks at every gap, and what a user of it may count on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.planner.allocator import LARGE_PAGE_BYTES, SMALL_BYTES, SMALL_PAGE_BYTES, Allocator, Event, rounded

MIB = 1 << 20

# Around the border between the pools, around a page of each, and many that are equal, so that gaps are filled again.
sizes = st.one_of(
    st.integers(1, 4096),
    st.integers(SMALL_BYTES - 1024, SMALL_BYTES + 1024),
    st.integers(1, 30 * MIB),
    st.sampled_from([512, SMALL_BYTES // 2, 3 * MIB, 10 * MIB, LARGE_PAGE_BYTES, LARGE_PAGE_BYTES + 512]),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Allocations, and ends of some that are alive, in any order."""
    events: list[Event] = []
    alive: list[int] = []
    for key in range(draw(st.integers(1, 60))):
        if alive and draw(st.booleans()):
            events.append(Event(alive.pop(draw(st.integers(0, len(alive) - 1)))))
        else:
            alive.append(key)
            events.append(Event(key, draw(sizes)))
    return events


class PlainPool:
    """One range of addresses as nothing but what is alive in it."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.mapped = 0
        self.alive: dict[int, tuple[int, int]] = {}

    def gaps(self) -> Iterator[tuple[int, int]]:
        """(size, start) of each, the one at the end included."""
        at = 0
        for start, size in sorted(self.alive.values()):
            if start > at:
                yield start - at, at
            at = start + size
        if at < self.mapped:
            yield self.mapped - at, at

    def allocate(self, key: int, size: int) -> None:
        fitting = sorted((gap for gap in self.gaps() if gap[0] >= size), key=lambda gap: (sum(gap) == self.mapped, gap))
        if not fitting:
            end = max((start + length for start, length in self.alive.values()), default=0)
            while self.mapped - end < size:
                self.mapped += self.page_bytes
            fitting = [(self.mapped - end, end)]
        self.alive[key] = fitting[0][1], size


@given(histories())
def test_it_never_disagrees_with_a_plain_model_of_all_gaps(events: list[Event]) -> None:
    allocator, small, large = Allocator(), PlainPool(SMALL_PAGE_BYTES), PlainPool(LARGE_PAGE_BYTES)
    live = peak = 0
    for event in events:
        allocator.replay([event])
        if event.nbytes is None:
            for pool in (small, large):
                live -= pool.alive.pop(event.key, (0, 0))[1]
        else:
            size = -(-event.nbytes // 512) * 512
            (small if size <= SMALL_BYTES else large).allocate(event.key, size)
            live += size
        peak = max(peak, live)
        assert allocator.live_bytes == live
        assert allocator.usage.allocated == peak
        assert allocator.usage.reserved == small.mapped + large.mapped


@given(histories())
def test_what_is_taken_from_the_driver_covers_what_is_alive_and_never_shrinks(events: list[Event]) -> None:
    allocator, before = Allocator(), 0
    for event in events:
        allocator.replay([event])
        usage = allocator.usage
        assert usage.reserved >= usage.allocated >= allocator.live_bytes
        assert usage.reserved >= before
        before = usage.reserved


@given(histories())
def test_once_all_has_ended_the_same_history_needs_no_more_than_the_first_time(events: list[Event]) -> None:
    ended = {event.key for event in events if event.nbytes is None}
    whole = events + [Event(event.key) for event in events if event.nbytes and event.key not in ended]
    allocator = Allocator()
    allocator.replay(whole)
    once = allocator.usage
    assert allocator.live_bytes == 0
    allocator.replay(whole)
    assert allocator.usage == once


@pytest.mark.parametrize(("nbytes", "page"), [(1, 2 * MIB), (SMALL_BYTES, 2 * MIB), (SMALL_BYTES + 1, 20 * MIB)])
def test_a_size_that_comes_and_goes_takes_one_page(nbytes: int, page: int) -> None:
    allocator = Allocator()
    for key in range(100):
        allocator.replay([Event(key, nbytes), Event(key)])
    assert allocator.usage.reserved == page


def test_small_and_large_requests_do_not_share_pages() -> None:
    allocator = Allocator()
    allocator.replay([Event(0, 2 * MIB), Event(0), Event(1, 1)])
    assert allocator.usage.reserved == LARGE_PAGE_BYTES + SMALL_PAGE_BYTES


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_that_end_in_any_order_become_one_gap(order: tuple[int, ...]) -> None:
    allocator = Allocator()
    allocator.replay(Event(key, size * MIB) for key, size in enumerate((6, 5, 7, 2)))
    allocator.replay(Event(key) for key in order)
    allocator.replay([Event(9, 18 * MIB)])
    assert allocator.usage.reserved == LARGE_PAGE_BYTES


def test_a_gap_that_is_too_small_is_not_used() -> None:
    allocator = Allocator()
    allocator.replay([Event(0, 8 * MIB), Event(1, 12 * MIB), Event(0), Event(2, 8 * MIB + 512)])
    assert allocator.usage.reserved == 2 * LARGE_PAGE_BYTES


def test_it_grows_by_what_its_end_lacks_and_not_by_the_whole_request() -> None:
    allocator = Allocator()
    allocator.replay([Event(0, 15 * MIB), Event(1, 25 * MIB)])
    assert allocator.usage.reserved == 2 * LARGE_PAGE_BYTES


@pytest.mark.parametrize(("nbytes", "taken"), [(0, 512), (1, 512), (512, 512), (513, 1024)])
def test_sizes_are_rounded_up_to_512_bytes(nbytes: int, taken: int) -> None:
    assert rounded(nbytes) == taken


def replay(*events: Event) -> Callable[[], None]:
    return lambda: Allocator().replay(events)


@pytest.mark.parametrize(
    "act", [replay(Event(7)), replay(Event(7, 10), Event(7), Event(7)), replay(Event(1, 9), Event(2))]
)
def test_the_end_of_what_is_not_alive_is_an_error(act: Callable[[], None]) -> None:
    with pytest.raises(KeyError):
        act()
