"""Stores: memory for opaque planes `[B, H, T, d]` with one token axis."""

from __future__ import annotations

import torch

from hfkv.stores.base import Store
from hfkv.stores.changes import Changes
from hfkv.stores.contiguous import ContiguousStore
from hfkv.stores.offload.budget import Budget, Offload, Place
from hfkv.stores.offload.bus import is_apart
from hfkv.stores.offload.store import OffloadedStore
from hfkv.stores.paged import PagedStore

__all__ = [
    "Budget",
    "Changes",
    "ContiguousStore",
    "Offload",
    "OffloadedStore",
    "PagedStore",
    "Place",
    "Store",
    "copy_rows",
    "make_store",
]

CPU_PAGE_SIZE, ACCELERATOR_PAGE_SIZE = 256, 64

# Rows that will hold fewer pages than these are copied in less time than their block tables take.
_WORTH_PAGES = 2


def make_store(
    kind: str,
    device: torch.device,
    page_size: int | None = None,
    *,
    offload: Place | None = None,
    bound: int | None = None,
    tokens_innermost: tuple[int, ...] = (),
    changes: Changes | None = None,
) -> Store:
    """Makes a store for planes on `device`.

    Args:
        kind: ``"paged"``, or anything else for a contiguous store.
        device: device on which attention computes.
        page_size: number of tokens a page; None for 256 on a CPU and 64 on an accelerator, less in a small window.
        offload: the layer's place among the offloaded layers, or None. Where host memory is the device's own, there is
            nothing to offload; elsewhere an offloaded store is paged, whatever `kind` says.
        bound, tokens_innermost: see `Store`.
        changes: what paged stores of other layers have done; see `PageRoom`.
    """
    is_offloaded = offload is not None and is_apart(device)
    if kind != "paged" and not is_offloaded:
        return ContiguousStore(bound=bound, tokens_innermost=tokens_innermost)
    if page_size is None:
        page_size = _page_size(device)
        if bound is not None:
            # Up to three pages of a window are partly filled: the slots', the oldest and the newest.
            page_size = min(page_size, 1 << (max(bound // 16, 1).bit_length() - 1))
    if is_offloaded and offload is not None:
        return OffloadedStore(page_size, offload, bound=bound, tokens_innermost=tokens_innermost)
    return PagedStore(page_size, bound=bound, tokens_innermost=tokens_innermost, changes=changes)


def is_worth_pages(tokens: int, device: torch.device, page_size: int | None = None, bound: int | None = None) -> bool:
    """Whether ``"auto"`` takes pages for rows of `tokens` tokens that are to be copied; see `make_store`."""
    held = tokens if bound is None else min(tokens, bound)
    return held >= _WORTH_PAGES * (page_size or _page_size(device))


def _page_size(device: torch.device) -> int:
    return CPU_PAGE_SIZE if device.type == "cpu" else ACCELERATOR_PAGE_SIZE


def copy_rows(
    store: Store, rows: torch.Tensor, kind: str, page_size: int | None = None, changes: Changes | None = None
) -> Store:
    """Copies a store: row i of the copy holds what row `rows[i]` of `store` does.

    Args:
        store: store to copy; pages are shared until they are written to.
        rows: indices of the rows to copy, int64 `[B']`.
        kind: kind of the copy; ``"auto"`` puts a contiguous store into pages where copies of a row can share some, and
            `is_worth_pages` says so.
        page_size, changes: see `make_store`.
    """
    assert store.device is not None
    repeats = len(set(rows.tolist())) < len(rows)
    if kind != "auto" or not repeats or isinstance(store, PagedStore):
        return store.fork(rows)
    if not is_worth_pages(max(store.length, store.reserved), store.device, page_size, store.bound):
        return store.fork(rows)
    order = store.tokens_innermost
    paged = make_store("paged", store.device, page_size, bound=store.bound, tokens_innermost=order, changes=changes)
    paged.append(store.read())
    paged.select(rows)
    return paged
