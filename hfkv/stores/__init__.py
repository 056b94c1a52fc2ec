"""Where the bytes live: stores of opaque planes `[B, H, T, d]` with one token axis."""

from __future__ import annotations

import torch

from hfkv.stores.base import Store
from hfkv.stores.contiguous import ContiguousStore
from hfkv.stores.paged import PagedStore

__all__ = ["ContiguousStore", "PagedStore", "Store", "copy_rows", "make_store"]

CPU_PAGE_SIZE, ACCELERATOR_PAGE_SIZE = 256, 64


def make_store(
    kind: str, device: torch.device, page_size: int | None = None, *, offload: bool = False, bound: int | None = None
) -> Store:
    """A store for planes on `device`.

    Args:
        kind: ``"paged"``, or anything else for a contiguous one.
        device: where attention computes.
        page_size: tokens a page; None for 256 on a CPU and 64 on an accelerator, less in a small window.
        offload, bound: see `Store`.
    """
    if kind != "paged":
        return ContiguousStore(offload=offload, bound=bound)
    if page_size is None:
        page_size = CPU_PAGE_SIZE if device.type == "cpu" else ACCELERATOR_PAGE_SIZE
        if bound is not None:
            # Up to three pages of a window are partly filled: the slots', the oldest and the newest.
            page_size = min(page_size, 1 << (max(bound // 16, 1).bit_length() - 1))
    return PagedStore(page_size, offload=offload, bound=bound)


def copy_rows(store: Store, rows: torch.Tensor, kind: str, page_size: int | None = None) -> Store:
    """A store of its own whose row i holds what row `rows[i]` of `store` does.

    Args:
        store: what is copied; pages are shared until they are written to.
        rows: int64 `[B']`.
        kind: ``"auto"`` puts a contiguous store into pages where copies of a row can share some.
        page_size: see `make_store`.
    """
    assert store.device is not None
    repeats = len(set(rows.tolist())) < len(rows)
    if kind != "auto" or not repeats or isinstance(store, PagedStore):
        return store.fork(rows)
    paged = make_store("paged", store.device, page_size, offload=store.offload, bound=store.bound)
    assert isinstance(paged, PagedStore)
    if store.length < paged.page_size:
        return store.fork(rows)
    paged.append(store.read())
    paged.select(rows)
    return paged
