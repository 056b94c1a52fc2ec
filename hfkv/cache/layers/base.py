"""`CacheLayer`: what a layer of hfkv's is asked by caches, reports, files, plans and graphs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window


class CacheLayer(CacheLayerMixin):
    """One layer of a `KVCache` that is hfkv's own: transformers' contract, and these questions.

    Attributes:
        kv: its policies.
        window: what limits its tokens, the model's own sliding window included; None where nothing does.
        shows_tensors: whether what it holds is one tensor of keys and one of values, which any attention can read.
        extra_name: what `extra_memory` is called in reports.
        is_assigned: whether its keys and values were assigned from outside: then nobody knows its tokens.
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
        """The `KVLayer`s that hold its tokens: itself, or its parts."""

    @property
    def leaf_heads(self) -> tuple[tuple[int, ...], ...]:
        """The kv heads of each leaf; ``()`` for all of them."""
        return ((),) * len(self.leaves)

    def count_heads(self, total: int) -> Sequence[int]:
        """How many of `total` kv heads each leaf holds."""
        return [total] * len(self.leaves)

    def extra_memory(self) -> list[Any]:
        """Where the bytes are that it holds besides keys and values; see `Store.memory`."""
        return []

    @property
    def extras(self) -> list[str]:
        """What it keeps besides what its config says, in words."""
        return []

    @property
    def sharing_refusal(self) -> str | None:
        """Why its tokens cannot be shared between calls, or None where they can."""
        return None

    def graph_refusal(self) -> str | None:
        """Why a decode step of it cannot be captured in a CUDA graph, or None where nothing speaks against it."""
        return None

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes of the tokens held."""

    @abstractmethod
    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what `crop` would."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Says how many tokens there will be in all, so that memory is allocated once."""

    @abstractmethod
    def expect_copies(self, copies: int, tokens: int) -> None:
        """Says, before the first key, that rows of `tokens` will be copied."""

    @abstractmethod
    def fork(self, repeats: int = 1) -> Any:
        """A layer of its own that holds every row `repeats` times."""
