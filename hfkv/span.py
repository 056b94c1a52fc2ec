"""`Span`: which positions of a text a layer holds, in integers only."""

from __future__ import annotations

from hfkv.window import Window

# While the past is recorded (assisted decoding), this many tokens below the window stay, so that a crop may go a
# little further back than the forwards since the last one.
ROLLBACK_MARGIN = 64


class Span:
    """The positions ``0 .. sinks - 1`` and ``held_from .. seen - 1`` of a text of `seen` tokens.

    Args:
        window: what limits them, or None.

    Attributes:
        seen: tokens since the start, padding included: the position of the next one.
        held_from: first position held above the sinks.
        record_past: whether tokens below the window stay until the next crop.
    """

    def __init__(self, window: Window | None) -> None:
        self.window = window
        self.record_past = False
        self.restart()

    def restart(self) -> None:
        """Nothing seen, nothing held."""
        self.seen = 0
        self.held_from = self.window.sinks if self.window else 0
        self._recorded_to: int | None = None  # where the first forward since the last crop ended

    def start_recording(self) -> None:
        """From here on, what the forwards since the last crop added can be cropped again."""
        self.record_past = True
        self._recorded_to = None

    def advance(self, count: int) -> None:
        """`count` more tokens were seen."""
        self.seen += count
        if self.record_past and self._recorded_to is None:
            self._recorded_to = self.seen

    def forget(self) -> range:
        """Lets go of what no later query can see.

        Returns:
            What to drop, counted among the tokens held.
        """
        if self.window is None:
            return range(0)
        next_query = self.seen
        if self.record_past:
            next_query = max(min(self.seen, self._recorded_to or self.seen) - ROLLBACK_MARGIN, 0)
        first = min(self.window.first_visible(next_query), self.seen)
        count = max(first - self.held_from, 0)
        self.held_from += count
        return range(self.window.sinks, self.window.sinks + count)

    def after_crop(self, tokens_to_remove: int) -> int:
        """How many tokens remain seen after a crop.

        Args:
            tokens_to_remove: a negative number of tokens, or 0.

        Raises:
            ValueError: it is positive.
            RuntimeError: the window has dropped tokens that the remaining text attends to.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, or 0; got {tokens_to_remove}")
        left = max(self.seen + tokens_to_remove, 0)
        if self.window and self.held_from > self.window.first_visible(left):
            raise RuntimeError(
                f"cannot crop to {left} tokens: the window ({self.window.size} tokens) has dropped tokens below "
                f"position {self.held_from} that the remaining text attends to. Call cache.reset() and prefill again"
            )
        return left

    def crop(self, left: int) -> None:
        """The text is `left` tokens long again."""
        self.seen = left
        self._recorded_to = None
