"""The Hadamard rotation that spreads outlier channels over the row before a coarse code."""

from __future__ import annotations

import torch


def hadamard_block(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`: the rotation works in blocks of it."""
    return head_dim & -head_dim


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotates the last dimension by the orthonormal Walsh-Hadamard matrix, in blocks; its own inverse.

    Butterflies of elementwise sums, not a matrix product: a product's order of summation depends on the
    number of rows, and a token's code must not depend on what is encoded with it.

    Args:
        x: `[..., D]` float32.

    Returns:
        `[..., D]` float32.
    """
    block = hadamard_block(x.shape[-1])
    y = x
    half = 1
    while half < block:
        pairs = y.reshape(*x.shape[:-1], x.shape[-1] // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((low + high, low - high), dim=-2)
        half *= 2
    return y.reshape(x.shape) * block**-0.5
