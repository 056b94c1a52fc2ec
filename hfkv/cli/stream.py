"""A streamer that times tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class TokenClock:
    """A streamer for ``generate`` that notes when each new token came and hands it on.

    Args:
        on_token: called after each new token; may be None.
        inner: another streamer that gets everything this one gets; may be None.
    """

    def __init__(self, on_token: Callable[[], None] | None = None, inner: Any = None) -> None:
        self.on_token = on_token
        self.inner = inner
        self.times: list[float] = []  # seconds; the first is when the prompt went in

    @property
    def num_tokens(self) -> int:
        """New tokens so far."""
        return max(len(self.times) - 1, 0)

    @property
    def prefill_seconds(self) -> float:
        """Seconds from the prompt to the first new token."""
        return self.times[1] - self.times[0] if self.num_tokens else 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens after the first, by the time they took: the prefill is not in it. None below two tokens."""
        if self.num_tokens < 2:
            return None
        return (self.num_tokens - 1) / (self.times[-1] - self.times[1])

    def put(self, value: Any) -> None:
        """Takes the prompt first, then one token at a time."""
        self.times.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(value)
        if self.on_token is not None and len(self.times) > 1:
            self.on_token()

    def end(self) -> None:
        """Called when the text is complete."""
        if self.inner is not None:
            self.inner.end()
