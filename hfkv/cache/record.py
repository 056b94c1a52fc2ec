"""`TokenRecord`: the tokens that a cache holds, as the forwards of a patched model tell it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hfkv.cache.twin import twin_of
from hfkv.models.fingerprint import Fingerprint
from hfkv.models.padding import padding_of

# The buffer of tokens grows by this factor, and by so many tokens at least.
GROWTH, LEAST = 2, 64


class TokenRecord:
    """The ids of all tokens a cache has seen, its rows' padding, and the state of the model that computed them.

    A cache sees keys and values only; the patched model records the tokens. A forward that is not recorded (of an
    unpatched model, with embeddings instead of ids or a mask that is more than padding) leaves the record unknown until
    the cache is reset.

    Attributes:
        state: state of the model when the first token was seen, or None where it was not looked at.
        is_known: whether every token has been recorded.
        broken: error of a forward that failed midway, in words, or None.
        root: key under which the tokens' pages may be shared with other calls, or None where they may not.
        kept: number of tokens in whole pages that have been shared already.
        repeated: number of held tokens that the next forward is given again, and a weak reference to what gives them.
        is_temporary: whether `generate` has made the cache and throws it away, so that no other code ever sees it.
        is_wanted: whether anyone may ask for the tokens.
    """

    def __init__(self) -> None:
        self.is_temporary = False
        self.is_wanted = True
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "repeated": None}  # a weak reference cannot be pickled

    def forget(self) -> None:
        """Forgets all tokens."""
        self.state: Fingerprint | None = None
        self.is_known = True
        self.broken: str | None = None
        self.root: bytes | None = None
        self.kept = 0
        self.repeated: tuple[int, weakref.ref[Any]] | None = None
        self.length = 0
        self._ids: torch.Tensor | None = None  # int64 [B, C], of which `length` columns are written
        self._hidden: torch.Tensor | None = None  # bool [B, T]: pad tokens; later columns hold none

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Notes that a change of all layers has found no memory midway: some have changed and others have not."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.broken = what_failed(error)
            raise

    def check_whole(self) -> None:
        """Raises RuntimeError where a forward that failed has left the layers with different tokens."""
        if self.broken is not None:
            raise RuntimeError(
                f"a forward of this cache failed midway ({self.broken}): its layers hold different tokens. Call "
                "cache.reset() and prefill again"
            )

    def copy(self) -> TokenRecord:
        """Copies the record."""
        twin = twin_of(self)
        if self._ids is not None:
            with torch.inference_mode(False):
                twin._ids = self._ids.clone()
        return twin

    def append(self, ids: torch.Tensor | None, count: int, mask: Any = None) -> None:
        """Records the tokens that one forward has added.

        Args:
            ids: ids of the new tokens, int64 `[B, count]`, or None where they are unknown.
            count: number of new tokens.
            mask: attention mask of the forward, `[B, seen]`: 1 where a token is real; None where all are real.
        """
        if ids is None or ids.dim() != 2 or ids.shape[1] != count or not self._takes(ids, mask):
            self.is_known = False
        if not self.is_known or ids is None:
            self._ids = self._hidden = None
            return
        if count > 1 or self.length == 0:
            self._hidden = None if mask is None else (mask == 0).clone()
        self._make_room(ids)
        assert self._ids is not None
        self._ids[:, self.length : self.length + count] = ids
        self.length += count

    def _takes(self, ids: torch.Tensor, mask: Any) -> bool:
        if self._ids is not None and ids.shape[0] != self._ids.shape[0]:
            return False
        if mask is None:
            return True
        return isinstance(mask, torch.Tensor) and tuple(mask.shape) == (ids.shape[0], self.length + ids.shape[1])

    def _make_room(self, ids: torch.Tensor) -> None:
        needed = self.length + ids.shape[1]
        if self._ids is not None and needed <= self._ids.shape[1]:
            return
        with torch.inference_mode(False):
            grown = torch.empty(ids.shape[0], max(needed, GROWTH * self.length, LEAST), dtype=torch.long)
            grown = grown.to(ids.device)
        if self._ids is not None:
            grown[:, : self.length] = self._ids[:, : self.length]
        self._ids = grown

    def tokens(self, seen: int) -> torch.Tensor | None:
        """The ids of all tokens, int64 `[B, seen]` on the CPU; None where they are unknown or not `seen` in number."""
        if not self.is_known or self.length != seen or self._ids is None:
            return None
        return self._ids[:, : self.length].cpu().clone()

    def hidden(self) -> torch.Tensor | None:
        """Marks the tokens that are padding, bool `[B, length]` on the CPU, or None where none is."""
        if self._hidden is None or self._ids is None:
            return None
        hidden = torch.zeros(len(self._ids), self.length, dtype=torch.bool)
        hidden[:, : self._hidden.shape[1]] = self._hidden[:, : self.length].cpu()
        return hidden

    def pads(self) -> tuple[int, ...] | None:
        """The number of pad tokens before each row's first real one; None where the padding is not all on the left."""
        batch = 1 if self._ids is None else len(self._ids)
        hidden = self.hidden()
        if hidden is None:
            return (0,) * batch
        return padding_of(~hidden, batch)

    def choose(self, choice: Callable[[Any, int], torch.Tensor], given: Any) -> None:
        """Makes row i the present row `choice(given, rows)[i]`; see `hfkv.cache.selection`."""
        if self._ids is None:
            return
        rows = choice(given, len(self._ids)).to(self._ids.device)
        # What is written in inference mode may go on outside it.
        with torch.inference_mode(False):
            self._ids = self._ids[rows]
            if self._hidden is not None:
                self._hidden = self._hidden[rows.to(self._hidden.device)]

    def crop(self, left: int) -> None:
        """Keeps only the first `left` tokens."""
        self.length = min(self.length, left)
        self.kept = min(self.kept, left)
        if self._hidden is not None:
            self._hidden = self._hidden[:, :left]


def what_failed(error: BaseException) -> str:
    """The type and message of an error, in one line."""
    return ": ".join(filter(None, (type(error).__name__, str(error).partition("\n")[0][:200])))
