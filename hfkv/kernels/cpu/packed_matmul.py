"""Products with matrices in oneDNN's own order, the one place that calls torch's operations for them."""

from __future__ import annotations

import torch


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """Puts a matrix `[N, K]`, float32 or bfloat16, into oneDNN's order: an opaque tensor that `to_dense` reads."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), None)


def packed_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Computes ``x @ W.T`` `[n, N]` for x `[n, K]` of the matrix's dtype and a matrix that `pack` made."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
