"""`SplitLayer`: a layer with some kv heads that keep everything while the others slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.layers.two_parts import TwoPartLayer, TwoPartTokens
from hfkv.cache.snapshot import HeldTokens, Part, PartShape
from hfkv.cache.view import KVView, make_views
from hfkv.codecs.key_mean import KeyMean
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
class SplitTokens(TwoPartTokens):
    """The tokens of a `SplitLayer`, the snapshot behind its views: one group of heads after the other."""

    groups: tuple[HeadGroup, ...]
    parts: dict[Part, PartShape]
    refusal = _NO_TENSOR

    @property
    def windowed(self) -> HeldTokens:
        return self.groups[-1].key.held  # type: ignore[return-value]


class SplitLayer(TwoPartLayer):
    """Two `KVLayer`s that share the kv heads of one layer.

    Args:
        kv: policies of the layer; its window is for the heads that slide.
        global_heads: kv heads that keep everything.
        rotary, mean: see `KVLayer`.
    """

    no_tensor = _NO_TENSOR

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

    def graph_refusal(self) -> str | None:
        return "holds different tokens for different heads"

    def __repr__(self) -> str:
        return f"SplitLayer({self.kv}, global_heads={self.global_heads})"

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
