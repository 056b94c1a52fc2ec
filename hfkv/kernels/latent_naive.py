"""The naive twin of attention in the latent space: what its kernels must compute, for tests and self-tests only."""

from __future__ import annotations

import torch

from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.naive import attend_naive, read_naive
from hfkv.stores.layout import Layout


def latent_attention_naive(
    query: torch.Tensor,
    latents: Encoded,
    rotary: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of absorbed queries to decoded latents, all of it in `dtype`.

    Args:
        query: absorbed queries `[B, Hq, q, r + dr]`: the part that goes with latents, then the one that goes with
            rotary keys.
        latents: encoded latents `[B, 1, T, r]`; they are the values too.
        rotary: encoded rotary keys `[B, 1, T, dr]`, in the same rows of the same store.
        layout: places of the held tokens in the planes.
        visibility: tokens that each query sees.
        scoring: treatment of the scores.

    Returns:
        The output `[B, Hq, q, r]` of `dtype`, zeros where a query sees nothing, and the logarithm of the sum of the
        exponentials of its scores (sink logits included) `[B, Hq, q]`, -inf where there are none.
    """
    values, turned = (read_naive(part, layout, dtype)[:, :, visibility.first :] for part in (latents, rotary))
    keys = torch.cat((values, turned), dim=-1)
    return attend_naive(query, keys, values, layout, visibility, scoring)
