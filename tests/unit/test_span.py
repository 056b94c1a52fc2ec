"""Window, Span and LeftPadding: what is let go of is what no later query can see."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfkv import Window
from hfkv.cache.layers.span import ROLLBACK_MARGIN, Span
from hfkv.models.padding import LeftPadding
from tests.brute_force import lower_bounds

SCHEDULES = {
    "none": None,
    "dynamic": "dynamic",
    "shrinks": lambda seen: 30 if seen < 50 else 9,
    "jumps": lambda seen: 5 + 11 * (seen % 7),
}


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 40),
    st.lists(st.integers(0, 30), max_size=12),
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
)
def test_what_is_held_is_what_some_rows_next_query_sees(
    schedule: str, size: int, forwards: list[int], pads: list[int]
) -> None:
    window = Window(size, schedule=SCHEDULES[schedule])
    bounds = lower_bounds(window, sum(forwards) + 1)
    span = Span(window)
    for count in forwards:
        before = span.held_from
        known = [min(pad, span.seen) for pad in pads]
        gone = [bounds[span.seen - pad] for pad in known]
        # Nothing goes before some row's window moves.
        held_from = min(pad + bound for pad, bound in zip(known, gone, strict=True)) if any(gone) else 0
        assert span.forget_below(span.next_gone_below(len(pads))) == span.held_from - before
        assert span.held_from == held_from
        span.advance(count)
        span.padding.learn(tuple(min(pad, span.seen) for pad in pads), span.seen - count)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [None, 1, 100, 3000])
def test_lower_bounds_are_what_their_definition_says(schedule: str, size: int | None) -> None:
    if schedule != "dynamic" and size is None:
        return
    window = Window(size, schedule=SCHEDULES[schedule])
    count = 1500
    assert [window.lower_bound(t) for t in range(count)] == lower_bounds(window, count)
    assert window.lower_bound(-3) == 0


def test_the_dynamic_schedule_at_its_steps() -> None:
    window = Window(schedule="dynamic")
    # All below 1,024 tokens seen, 2,048 below 8,192, then 4,096; what has gone stays gone.
    found = {
        seen: window.lower_bound(seen - 1) for seen in (1023, 1024, 2048, 2049, 8191, 8192, 10_239, 10_240, 20_000)
    }
    assert found == {
        1023: 0,
        1024: 0,
        2048: 0,
        2049: 1,
        8191: 6143,
        8192: 6143,
        10_239: 6143,
        10_240: 6144,
        20_000: 15_904,
    }
    assert window.capacity() == 4 + 4096


def test_a_schedule_that_returns_no_size_raises() -> None:
    with pytest.raises(ValueError, match=r"Window.schedule\(3\) must return an int of at least 1 .* got 0"):
        Window(9, schedule=lambda seen: 3 - seen).lower_bound(5)


def test_without_a_window_nothing_goes() -> None:
    span = Span(None)
    span.advance(1000)
    assert span.next_gone_below(1) == 0
    assert span.after_crop(-999, 1) == 1


def test_a_recording_keeps_what_the_last_forwards_may_take_back() -> None:
    span = Span(Window(8, 2))
    span.start_recording()
    span.advance(500)
    for _ in range(5):
        span.forget_below(span.next_gone_below(1))
        span.advance(1)
    assert span.held_from == 500 - ROLLBACK_MARGIN - 8 + 1
    assert span.after_crop(-5 - ROLLBACK_MARGIN, 1) == 500 - ROLLBACK_MARGIN
    with pytest.raises(RuntimeError, match="cannot crop to"):
        span.after_crop(-6 - ROLLBACK_MARGIN, 1)
    span.crop(500)
    span.record_past = False
    span.forget_below(span.next_gone_below(1))
    assert span.held_from == 493


def test_padding_may_grow_while_a_row_is_nothing_else() -> None:
    padding = LeftPadding()
    padding.learn((0, 4), before=0)
    padding.learn((0, 9), before=4)
    padding.learn((0, 9), before=12)
    assert padding.of(2) == (0, 9)
    for contradiction in ((0, 0), (1, 9), (0, 10)):
        with pytest.raises(ValueError, match="began with"):
            padding.learn(contradiction, before=12)
    padding.select([1, 1, 0])
    assert padding.of(3) == (9, 9, 0)


def test_a_schedule_of_ones_own_may_be_asked_by_many_threads() -> None:
    for _ in range(5):
        window = Window(4096, schedule=lambda seen: 4096 if seen < 8192 else 2048)
        found: list[int] = []
        threads = [threading.Thread(target=lambda: found.append(window.lower_bound(60_000))) for _ in range(4)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [60_001 - 2048] * 4
