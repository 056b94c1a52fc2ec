"""`SplitLayer`: a layer with some kv heads that keep everything while the others slide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from hfkv.cache.layers.base import CacheLayer
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.snapshot import Part, PartShape
from hfkv.cache.twin import twin_of
from hfkv.cache.view import KVView, make_views
from hfkv.codecs.key_mean import KeyMean
from hfkv.models.padding import LeftPadding
from hfkv.models.rotary import Rotary
from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window

_NO_TENSOR = (
    "global_heads: the heads of this layer hold different tokens, which no single tensor can show; only the "
    '"hfkv" attention reads them'
)


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Some of a layer's kv heads, and views of their tokens.

    Attributes:
        heads: indices of the heads.
        key, value: views of their keys and values.
    """

    heads: tuple[int, ...]
    key: KVView
    value: KVView


@dataclass(frozen=True, eq=False)
class SplitTokens:
    """The tokens of a `SplitLayer`, the snapshot behind its views: one group of heads after the other."""

    groups: tuple[HeadGroup, ...]
    parts: dict[Part, PartShape]

    @property
    def is_windowed(self) -> bool:
        """Whether a window decides what is visible: always, only the "hfkv" attention can read the tokens."""
        return True

    @property
    def batch(self) -> int:
        return self.groups[0].key.held.batch

    @property
    def device(self) -> torch.device:
        return self.groups[0].key.held.device

    @property
    def seen(self) -> int:
        """The number of tokens since the start, padding included."""
        return self.groups[0].key.held.seen

    @property
    def padding(self) -> LeftPadding:
        """The left padding of the rows, as the sliding heads know it."""
        return self.groups[-1].key.held.padding

    def shape(self, part: Part) -> tuple[int, int, int, int]:
        """Shape `[B, H, seen, D]` that a layer which keeps everything would show."""
        return self.batch, self.parts[part].heads, self.seen, self.parts[part].head_dim

    def layout(self, part: Part) -> tuple[tuple[int, ...], int]:
        """Strides and offset of a contiguous tensor of that shape."""
        _, heads, count, head_dim = self.shape(part)
        return (heads * count * head_dim, count * head_dim, head_dim, 1), 0

    def decode(self, part: Part, first: int = 0, last: int | None = None) -> NoReturn:
        """Raises RuntimeError: heads that hold different tokens are no one tensor."""
        raise RuntimeError(_NO_TENSOR)


class SplitLayer(CacheLayer):
    """Two `KVLayer`s that share the kv heads of one layer.

    Args:
        kv: policies of the layer; its window is for the heads that slide.
        global_heads: kv heads that keep everything.
        rotary, mean: see `KVLayer`.
    """

    shows_tensors = False

    def __init__(
        self, kv: KVConfig, global_heads: Sequence[int], rotary: Rotary | None = None, mean: KeyMean | None = None
    ) -> None:
        super().__init__()
        self.kv = kv
        self.global_heads = tuple(global_heads)
        self.window: Window | None = kv.window  # type: ignore[assignment]
        self.parts = (KVLayer(replace(kv, window=None)), KVLayer(kv, rotary=rotary))
        self._mean = mean
        self.heads: tuple[tuple[int, ...], tuple[int, ...]] = (self.global_heads, ())

    @property
    def leaves(self) -> tuple[KVLayer, ...]:
        return self.parts

    @property
    def leaf_heads(self) -> tuple[tuple[int, ...], ...]:
        return self.heads

    def count_heads(self, total: int) -> Sequence[int]:
        return len(self.global_heads), total - len(self.global_heads)

    @property
    def takes_mean(self) -> bool:
        return self._mean is not None and any(leaf.gains_by_mean for leaf in self.leaves)

    @property
    def extras(self) -> list[str]:
        return [f"all of kv heads {', '.join(map(str, self.global_heads))}"]

    @property
    def file_refusal(self) -> str | None:
        return next((leaf.file_refusal for leaf in self.leaves if leaf.file_refusal), None)

    def graph_refusal(self) -> str | None:
        return "holds different tokens for different heads"

    def __repr__(self) -> str:
        return f"SplitLayer({self.kv}, global_heads={self.global_heads})"

    @property
    def is_initialized(self) -> bool:
        return self.parts[0].is_initialized

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Does nothing: the parts know."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Learns which heads slide.

        Raises:
            ValueError: `global_heads` names a head that is not there, or all of them.
        """
        count = key_states.shape[1]
        if self.global_heads[-1] >= count or len(self.global_heads) == count:
            raise ValueError(
                f"Window.global_heads names {list(self.global_heads)}; this layer has the kv heads 0-{count - 1}, and "
                "at least one must slide (global_layers keeps whole layers)"
            )
        self.heads = (self.global_heads, tuple(h for h in range(count) if h not in self.global_heads))
        if self._mean is not None:
            for heads, part in zip(self.heads, self.parts, strict=True):
                part.take_mean(self._mean.of_heads(list(heads)))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends; returns views that only the ``"hfkv"`` attention can read. See `KVLayer.update`."""
        if not self.heads[1]:  # its parts may have been filled before it saw a key
            self.lazy_initialization(key_states, value_states)
        groups = []
        for heads, part in zip(self.heads, self.parts, strict=True):
            index = list(heads)
            key, value = part.update(key_states[:, index], value_states[:, index])
            assert isinstance(key, KVView)
            assert isinstance(value, KVView)
            groups.append(HeadGroup(heads, key, value))
        slots: dict[Part, PartShape] = {
            "key": PartShape(slice(0), key_states.shape[1], key_states.shape[3], groups[0].key.dtype),
            "value": PartShape(slice(0), value_states.shape[1], value_states.shape[3], groups[0].value.dtype),
        }
        return make_views(SplitTokens(tuple(groups), slots), tracked=False)

    @property
    def keys(self) -> torch.Tensor | None:
        """None before the first key; raises RuntimeError once something is held: see `SplitTokens.decode`."""
        self._no_tensor()
        return None

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._assign(states)

    @property
    def values(self) -> torch.Tensor | None:
        """None before the first key; raises RuntimeError once something is held: see `SplitTokens.decode`."""
        self._no_tensor()
        return None

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._assign(states)

    def _no_tensor(self) -> None:
        if self.is_initialized:
            raise RuntimeError(_NO_TENSOR)

    def _assign(self, states: torch.Tensor | None) -> None:
        if states is not None:
            raise RuntimeError("a layer with global_heads cannot be assigned: its heads hold different tokens")

    # Calls for both parts.

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

    def fork(self, repeats: int = 1) -> SplitLayer:
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
