"""What every rule of a window says."""

from __future__ import annotations

EVERYTHING = 1 << 62  # tokens: more than any text has


class WindowRule:
    """A rule of which tokens stay: the newest `size(seen)` of them, besides sinks and summaries.

    What a window has let go of stays gone, so the lowest position a query sees never falls:
    ``L(t) = max over t' <= t of (t' + 1 - size(t' + 1))``.

    Attributes:
        name: the word for it: ``Window(schedule=name)``, ``"window:name"``.
        most: the most tokens that a query sees by it: what memory is planned by. A `size` above it is refused, except
            where fewer tokens than `most` have been seen.
        steps: where the size changes in a few steps only, those as (last number of tokens seen, size), in rising order,
            the last one up to `EVERYTHING`: many positions are then worked out at once, and `size` follows from them.
            None: `size` is asked for each.
    """

    name: str
    most: int
    steps: tuple[tuple[int, int], ...] | None = None

    def size(self, seen: int) -> int:
        """How many of the newest tokens a query sees when `seen` (at least 1) have been seen, itself included."""
        if self.steps is None:
            raise NotImplementedError(f"the rule {self.name!r} has neither steps nor a size of its own")
        return next(size for last, size in self.steps if seen <= last)
