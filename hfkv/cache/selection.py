"""Rows that a selection, a reordering or a repetition leaves of a batch, as in transformers, and layers that do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hfkv.measure.allocated import own_tensors


def selected(indices: Any, batch: int) -> torch.Tensor:
    """The rows that `batch_select_indices(indices)` keeps of `batch`, int64 `[B']` on the CPU.

    Args:
        indices: positions (negative ones count from the end) in a tensor, array or sequence, a bool mask, or a slice.

    Raises:
        IndexError: there are no such rows, or no batch of rows is left.
    """
    # As transformers indexes keys and values: a tuple then is positions, and not one index for each dimension.
    rows = torch.arange(batch)[indices.cpu() if isinstance(indices, torch.Tensor) else indices, ...]
    if rows.dim() != 1:
        raise IndexError(
            f"a cache is left with rows, and {indices!r} makes {rows.dim()} dimensions of its batch dimension; give "
            "positions in one dimension (of a single row: [row]), a bool mask or a slice"
        )
    return rows


def reordered(beam_idx: torch.Tensor, batch: int) -> torch.Tensor:
    """The rows that `reorder_cache(beam_idx)` makes of `batch`, int64 `[B']` on the CPU; `index_select`'s errors."""
    return torch.arange(batch).index_select(0, beam_idx.cpu())


def repeated(repeats: Any, batch: int) -> torch.Tensor:
    """The rows that `batch_repeat_interleave(repeats)` makes of `batch`, int64 `[B']` on the CPU."""
    return torch.arange(batch).repeat_interleave(repeats.cpu() if isinstance(repeats, torch.Tensor) else repeats)


def choose_rows(layer: Any, name: str, choose: Callable[[Any, int], torch.Tensor], given: Any) -> None:
    """Calls a layer's method that chooses rows; linear attention, alone or beside keys, knows only reordering.

    Args:
        layer: a layer of a cache, hfkv's or transformers'.
        name: name of the method.
        choose: function of this module that says which rows the method leaves.
        given: the method's argument.
    """
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        getattr(layer, name)(given)
    elif (held := next((tensor for _, tensor in own_tensors(layer)), None)) is not None:
        layer.reorder_cache(choose(given, len(held)))
