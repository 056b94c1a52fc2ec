"""`LeftPadding`: where the text of each row starts; and what a mask says of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LeftPadding:
    """The number of pad tokens before the first real one, for each row, as the masks of the forwards tell it.

    A row of which only padding has been seen may go on with more of it; any other change raises.

    Attributes:
        known: pad tokens of each row; None until a mask has said something.
        origins: token of each row that stands at position 0 of the rotation of keys, as `begin` was told; None for the
            first one.
        began: first token of each row that is no padding, of no token held where it is still to come; None where
            nobody said.
    """

    def __init__(self) -> None:
        self.known: tuple[int, ...] | None = None
        self.origins: tuple[int, ...] | None = None
        self.began: tuple[int, ...] | None = None

    def forget(self) -> None:
        """Forgets all padding."""
        self.known = self.origins = self.began = None

    def begin(self, origins: tuple[int, ...], began: tuple[int, ...]) -> None:
        """Takes where the positions of each row begin to count: of rows of which no token is held that anybody sees."""
        self.origins, self.began = origins if any(origins) else None, began

    def of(self, batch: int) -> tuple[int, ...]:
        """The pad tokens of each of `batch` rows; none until a mask has said otherwise."""
        return self.known or (0,) * batch

    def learn(self, pads: tuple[int, ...], before: int) -> None:
        """Takes what the mask of one forward says.

        Args:
            pads: pad tokens of each row, up to the end of this forward.
            before: tokens seen before this forward.

        Raises:
            ValueError: it contradicts what earlier masks said.
        """
        known = self.of(len(pads))
        if pads == known:
            self.known = pads
            return
        if before and (len(known) != len(pads) or any(min(b, before) != a for a, b in zip(known, pads, strict=True))):
            raise ValueError(
                f"the rows of a windowed hfkv cache began with {list(known)} pad tokens, and the attention mask now "
                f"says {list(pads)}: pass the whole attention_mask, past tokens included, to every forward"
            )
        self.known = pads

    def crop(self, left: int) -> None:
        """Keeps only the first `left` tokens of each row."""
        if self.known is not None:
            self.known = tuple(min(pad, left) for pad in self.known)

    def select(self, rows: Sequence[int]) -> None:
        """Makes row i what row `rows[i]` is now."""
        if self.known is not None:
            self.known = tuple(self.known[row] for row in rows)
        if self.origins is not None:
            self.origins = tuple(self.origins[row] for row in rows)
        if self.began is not None:
            self.began = tuple(self.began[row] for row in rows)


def padding_of(is_real: torch.Tensor, batch: int) -> tuple[int, ...] | None:
    """The pad tokens of each row of a bool `[B or 1, kv]`; None if not all stand in front.

    A row of nothing but padding has as many as it is long.
    """
    is_real = is_real.expand(batch, -1)
    pads = (~is_real).sum(-1)
    first_real = torch.where(is_real.any(-1), is_real.int().argmax(-1), is_real.shape[-1])
    counts, firsts = torch.stack((pads, first_real)).tolist()
    return tuple(counts) if counts == firsts else None
