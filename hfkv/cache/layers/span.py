"""`Span`: the positions of a text that a layer holds, in integers only."""

from __future__ import annotations

from hfkv.cache.twin import twin_of
from hfkv.models.padding import LeftPadding
from hfkv.policy.window import Window

# While the past is recorded (assisted decoding), this many tokens below the window stay, so that a crop may go a
# little further back than the forwards since the last one.
ROLLBACK_MARGIN = 64


class Span:
    """The positions ``held_from .. seen - 1`` of a text of `seen` tokens, padding included.

    Rows start at different positions, so the widest of them decides; attention decides what a single row sees.

    Args:
        window: window that limits the positions, or None.

    Attributes:
        padding: starts of the rows' texts.
        seen: number of tokens since the start, padding included: the position of the next one.
        gone_below: position below which no query to come sees a token, sinks and summaries apart.
        record_past: whether tokens below the window stay until the next crop.
        recorded_to: where the first forward since the last crop ended, while they do.
    """

    def __init__(self, window: Window | None) -> None:
        self.window = window
        self.padding = LeftPadding()
        self.record_past = False
        self.restart()

    def restart(self) -> None:
        """Forgets everything that was seen and held."""
        self.seen = 0
        self.gone_below = 0
        self.padding.forget()
        self.recorded_to: int | None = None

    def copy(self) -> Span:
        """Copies the span."""
        twin = twin_of(self)
        twin.padding = twin_of(self.padding)
        return twin

    def adopt(self, seen: int, gone_below: int, pads: tuple[int, ...]) -> None:
        """Takes positions from elsewhere, as if they had been seen here."""
        self.restart()
        self.padding.learn(pads, 0)
        self.advance(seen)
        self.gone_below = gone_below

    @property
    def held_from(self) -> int:
        """The first position held."""
        return self.window.held_from(self.gone_below) if self.window else 0

    def start_recording(self) -> None:
        """Starts to record: the tokens of the forwards since the last crop can be cropped again."""
        self.record_past = True
        self.recorded_to = None

    def advance(self, count: int) -> None:
        """Counts `count` more tokens as seen."""
        self.seen += count
        if self.record_past and self.recorded_to is None:
            self.recorded_to = self.seen

    def lower_bound(self, t: int, batch: int) -> int:
        """The lowest position that a query at `t` of any of `batch` rows attends to, sinks apart."""
        if self.window is None:
            return 0
        bounds = {pad: self.window.lower_bound(t - pad) for pad in set(self.padding.of(batch))}
        # Before any row's window moves, the padding stays too: the model's plain masks are true.
        return min(pad + bound for pad, bound in bounds.items()) if any(bounds.values()) else 0

    def next_gone_below(self, batch: int) -> int:
        """The position that `gone_below` may become before the next forward."""
        next_query = self.seen
        if self.record_past:
            next_query = max(min(self.seen, self.recorded_to or self.seen) - ROLLBACK_MARGIN, 0)
        return max(min(self.lower_bound(next_query, batch), self.seen), self.gone_below)

    def forget_below(self, position: int) -> int:
        """Lets go of the tokens below `position`.

        Returns:
            The number of oldest tokens held to drop.
        """
        before = self.held_from
        self.gone_below = position
        return self.held_from - before

    def after_crop(self, tokens_to_remove: int, batch: int) -> int:
        """The number of tokens that remain seen after a crop.

        Args:
            tokens_to_remove: negative number of tokens, or 0.
            batch: number of rows.

        Raises:
            ValueError: `tokens_to_remove` is positive.
            RuntimeError: the window has dropped tokens that the remaining text attends to.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, or 0; got {tokens_to_remove}")
        left = max(self.seen + tokens_to_remove, 0)
        if self.gone_below > self.lower_bound(left, batch):
            raise RuntimeError(
                f"cannot crop to {left} tokens: the window has dropped tokens below position {self.held_from} that the "
                "remaining text attends to. Call cache.reset() and prefill again"
            )
        return left

    def crop(self, left: int) -> None:
        """Makes the text `left` tokens long again."""
        self.seen = left
        self.recorded_to = None
        self.padding.crop(left)
