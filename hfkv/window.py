"""Which tokens stay: a sliding window with attention sinks, in integers only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A query at position t attends to key j when ``j <= t and (j > t - size or j < sinks)``.

    The first tokens ("attention sinks") keep a model stable when the middle of the text is gone
    (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453).

    Args:
        size: how many of the newest tokens a query sees, itself included; at least 1.
        sinks: how many of the first tokens stay for good; at least 0 and less than `size`.

    Raises:
        TypeError: a field is not an int.
        ValueError: a field is out of range.
    """

    size: int
    sinks: int = 4

    def __post_init__(self) -> None:
        for name in ("size", "sinks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Window.{name} must be an int (a number of tokens), got {value!r}")
        if self.size < 1:
            raise ValueError(f"Window.size must be at least 1 token, got {self.size}")
        if not 0 <= self.sinks < max(self.size, 1):
            raise ValueError(
                f"Window.sinks must be at least 0 and less than size ({self.size}), got {self.sinks}; "
                f"take a larger window or fewer sinks"
            )

    def first_visible(self, t: int) -> int:
        """The lowest position above the sinks that a query at position `t` attends to."""
        return max(self.sinks, t - self.size + 1)

    def capacity(self) -> int:
        """How many tokens are held at most between two steps of one token."""
        return self.sinks + self.size
