"""Span: what it lets go of is what no later query can see."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfkv import Window
from hfkv.span import ROLLBACK_MARGIN, Span


@given(st.integers(1, 40), st.integers(0, 39), st.lists(st.integers(0, 30), max_size=12))
def test_held_is_what_the_next_query_sees(size: int, sinks: int, forwards: list[int]) -> None:
    window = Window(size, min(sinks, size - 1))
    span, held = Span(window), list[int]()
    for count in forwards:
        dropped = span.forget()
        del held[dropped.start : dropped.stop]
        t = span.seen
        assert held == [j for j in range(t) if j > t - size or j < window.sinks]
        held += range(t, t + count)
        span.advance(count)
        assert span.seen == t + count


def test_without_a_window_nothing_goes() -> None:
    span = Span(None)
    span.advance(1000)
    assert not span.forget()
    assert span.after_crop(-999) == 1


def test_a_recording_keeps_what_the_last_forwards_may_take_back() -> None:
    span = Span(Window(8, 2))
    span.start_recording()
    span.advance(500)
    for _ in range(5):
        span.forget()
        span.advance(1)
    assert span.held_from == 500 - ROLLBACK_MARGIN - 8 + 1
    assert span.after_crop(-5 - ROLLBACK_MARGIN) == 500 - ROLLBACK_MARGIN
    with pytest.raises(RuntimeError, match="cannot crop to"):
        span.after_crop(-6 - ROLLBACK_MARGIN)
    span.crop(500)
    span.record_past = False
    span.forget()
    assert span.held_from == 493
