"""`TwoPartLayer`: a layer whose tokens two `KVLayer`s hold, and which no single tensor can show."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self

import torch

from hfkv.cache.layers.base import CacheLayer
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.snapshot import HeldTokens, Part, PartShape
from hfkv.cache.twin import twin_of
from hfkv.models.padding import LeftPadding


class TwoPartTokens:
    """The tokens of a `TwoPartLayer`, the snapshot behind its views.

    Attributes:
        parts: what keys and values would be as one tensor each.
        refusal: why they are none.
    """

    parts: dict[Part, PartShape]
    refusal: ClassVar[str]

    @property
    @abstractmethod
    def windowed(self) -> HeldTokens:
        """The tokens of the part under a window, which has to know the padding."""

    @property
    def is_windowed(self) -> bool:
        """Whether a window decides what is visible: always, only the "hfkv" attention can read the tokens."""
        return True

    @property
    def batch(self) -> int:
        return self.windowed.batch

    @property
    def device(self) -> torch.device:
        return self.windowed.device

    @property
    def seen(self) -> int:
        """The number of tokens since the start, padding included."""
        return self.windowed.seen

    @property
    def padding(self) -> LeftPadding:
        """The left padding of the rows, as the part under the window knows it."""
        return self.windowed.padding

    def shape(self, part: Part) -> tuple[int, int, int, int]:
        """Shape `[B, H, seen, D]` that a layer which keeps everything would show."""
        return self.batch, self.parts[part].heads, self.seen, self.parts[part].head_dim

    def layout(self, part: Part) -> tuple[tuple[int, ...], int]:
        """Strides and offset of a contiguous tensor of that shape."""
        _, heads, count, head_dim = self.shape(part)
        return (heads * count * head_dim, count * head_dim, head_dim, 1), 0

    def decode(self, part: Part, first: int = 0, last: int | None = None) -> NoReturn:
        """Raises RuntimeError: they are no one tensor."""
        raise RuntimeError(self.refusal)


class TwoPartLayer(CacheLayer):
    """Two `KVLayer`s that hold the tokens of one layer.

    Attributes:
        parts: the two; the second one is under a window.
        no_tensor: why no tensor can show its tokens.
    """

    shows_tensors = False
    no_tensor: ClassVar[str]
    parts: tuple[KVLayer, KVLayer]

    @property
    def leaves(self) -> tuple[KVLayer, ...]:
        return self.parts

    @property
    def needs_own_attention(self) -> bool:
        return True

    @property
    def file_refusal(self) -> str | None:
        return next((leaf.file_refusal for leaf in self.leaves if leaf.file_refusal), None)

    @property
    def is_initialized(self) -> bool:
        return self.parts[0].is_initialized

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Does nothing: the parts know."""

    @property
    def keys(self) -> torch.Tensor | None:
        """None before the first key; raises RuntimeError once something is held: see `TwoPartTokens.decode`."""
        self._no_tensor()
        return None

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._assign(states)

    @property
    def values(self) -> torch.Tensor | None:
        """None before the first key; raises RuntimeError once something is held: see `TwoPartTokens.decode`."""
        self._no_tensor()
        return None

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._assign(states)

    def _no_tensor(self) -> None:
        if self.is_initialized:
            raise RuntimeError(self.no_tensor)

    def _assign(self, states: torch.Tensor | None) -> None:
        if states is not None:
            raise RuntimeError(f"such a layer cannot be assigned: {self.no_tensor}")

    def _each(self, do: Callable[[KVLayer], Any]) -> None:
        for part in self.parts:
            do(part)

    def get_seq_length(self) -> int:
        return self.parts[0].get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.parts[0].get_mask_sizes(query_length)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(part.nbytes() for part in self.parts)

    def held_bytes(self) -> int:
        """Bytes of the tokens held."""
        return sum(part.held_bytes() for part in self.parts)

    @property
    def record_past(self) -> bool:
        """See `KVLayer.record_past`."""
        return self.parts[1].record_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        for part in self.parts:
            part.record_past = record

    def activate_past_recording(self) -> None:
        """See `KVLayer.activate_past_recording`."""
        self._each(KVLayer.activate_past_recording)

    def expect_copies(self, copies: int, tokens: int) -> None:
        """See `KVLayer.expect_copies`."""
        self._each(lambda part: part.expect_copies(copies, tokens))

    def fork(self, repeats: int = 1) -> Self:
        """See `KVLayer.fork`."""
        forked = twin_of(self)
        forked.parts = (self.parts[0].fork(repeats), self.parts[1].fork(repeats))
        return forked

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises the error that `crop` would."""
        self._each(lambda part: part.check_crop(tokens_to_remove))

    def crop(self, tokens_to_remove: int) -> None:
        """See `KVLayer.crop`."""
        self.check_crop(tokens_to_remove)
        self._each(lambda part: part.crop(tokens_to_remove))

    def reserve(self, tokens: int) -> None:
        """See `KVLayer.reserve`."""
        self._each(lambda part: part.reserve(tokens))

    def reset(self) -> None:
        """Forgets everything."""
        self._each(KVLayer.reset)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Makes row i a copy of row `beam_idx[i]`."""
        self._each(lambda part: part.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps the rows `indices`."""
        self._each(lambda part: part.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self._each(lambda part: part.batch_repeat_interleave(repeats))

    def offload(self) -> None:
        """Does nothing: `KVConfig.offload` decides where the bytes live."""

    def prefetch(self) -> None:
        """Does nothing: see `offload`."""
