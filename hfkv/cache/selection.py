"""Rows that a selection, a reordering or a repetition leaves of a batch, as in transformers."""

from __future__ import annotations

from typing import Any

import torch


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
