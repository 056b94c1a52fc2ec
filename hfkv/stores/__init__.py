"""Where the bytes live: stores of opaque planes `[B, H, T, d]` with one token axis."""

from hfkv.stores.base import Store
from hfkv.stores.contiguous import ContiguousStore
from hfkv.stores.paged import PagedStore

__all__ = ["ContiguousStore", "PagedStore", "Store"]
