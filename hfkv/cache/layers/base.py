"""`CacheLayer`: the questions that caches, reports, files, plans and graphs ask a layer of hfkv."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window


class CacheLayer(CacheLayerMixin):
    """One layer of a `KVCache` that is hfkv's own: transformers' contract, and the questions that hfkv asks.

    Attributes:
        kv: policies of the layer.
        window: window that limits its tokens, the model's own sliding window included; None without one.
        shows_tensors: whether its tokens are one tensor of keys and one of values, which any attention can read.
        extra_name: name of `extra_memory` in reports.
        is_assigned: whether its keys and values were assigned from outside: the ids of its tokens are then unknown.
    """

    is_compileable = False
    extra_name = "state"
    is_croppable = True
    is_sliding = False
    shows_tensors = True
    is_assigned = False
    kv: KVConfig
    window: Window | None

    @property
    @abstractmethod
    def leaves(self) -> tuple[Any, ...]:
        """The `KVLayer`s that hold the layer's tokens: itself, or its parts."""

    @property
    def leaf_heads(self) -> tuple[tuple[int, ...], ...]:
        """The kv heads of each leaf; ``()`` for all of them."""
        return ((),) * len(self.leaves)

    def count_heads(self, total: int) -> Sequence[int]:
        """The number of kv heads that each leaf holds, of `total` in the layer."""
        return [total] * len(self.leaves)

    @property
    def takes_mean(self) -> bool:
        """Whether a mean is taken off its keys."""
        return any(leaf.mean is not None for leaf in self.leaves)

    @property
    def needs_own_attention(self) -> bool:
        """Whether only the "hfkv" attention can read its tokens: under a window of ours, or where they lie apart."""
        return self.window is not None and not self.is_sliding

    def extra_memory(self) -> list[Any]:
        """The bytes that the layer holds besides keys and values; see `Store.memory`."""
        return []

    @property
    def extras(self) -> list[str]:
        """Descriptions of what the layer keeps beyond its config."""
        return []

    @property
    def sharing_refusal(self) -> str | None:
        """The reason why the layer's tokens cannot be shared between calls, or None where they can."""
        return None

    @property
    def file_refusal(self) -> str | None:
        """The reason why no file can hold the layer's tokens, or None where one can.

        By default, that it keeps more than tokens (`extras`, `extra_memory`), or what `sharing_refusal` says.
        """
        kept = self.extras or ([self.extra_name] if self.extra_memory() else [])
        return (
            f"keeps {' and '.join(kept)}, which neither files nor shared prefixes hold"
            if kept
            else self.sharing_refusal
        )

    def graph_refusal(self) -> str | None:
        """The reason why its decode step cannot be captured in a CUDA graph, or None where it can."""
        return None

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes of the tokens held."""

    @abstractmethod
    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises the error that `crop` would."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Says how many tokens there will be in all, so that memory is allocated once."""

    @abstractmethod
    def expect_copies(self, copies: int, tokens: int) -> None:
        """Announces, before the first key, `copies` copies of each row when it holds `tokens`."""

    @abstractmethod
    def fork(self, repeats: int = 1) -> Any:
        """Copies the layer: the copy holds every row `repeats` times."""
