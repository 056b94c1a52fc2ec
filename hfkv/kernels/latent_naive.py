"""The naive twin of attention in the latent space: what its kernels must compute, for tests and self-tests only."""

from __future__ import annotations

import torch

from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.naive import read_naive, visible_naive
from hfkv.layout import Layout


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
        query: `[B, Hq, q, r + dr]`: the part that goes with latents, then the one that goes with rotary keys.
        latents: encoded `[B, 1, T, r]`; they are the values too.
        rotary: encoded `[B, 1, T, dr]`, in the same rows of the same store.
        layout: where the held tokens are.
        visibility: which of them each query sees.
        scoring: what becomes of scores.

    Returns:
        The output `[B, Hq, q, r]` of `dtype`, zeros where a query sees nothing, and the logarithm of the sum of the
        exponentials of its scores (sink logits included) `[B, Hq, q]`, -inf where there are none.
    """
    values, turned = (read_naive(part, layout, dtype)[:, :, visibility.first :] for part in (latents, rotary))
    keys = torch.cat((values, turned), dim=-1)
    scores = (query.to(dtype) * scoring.scale) @ keys.transpose(2, 3)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    visible = visible_naive(visibility, layout, query.shape[2], query.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    if scoring.sink_logits is not None:
        logits = scoring.sink_logits.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, logits), dim=-1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
    # What a latent holds that nobody sees must not reach the sum: 0 x NaN is NaN.
    values = torch.where(visible.any(dim=2).any(dim=1)[:, None, :, None], values, 0)
    return weights[..., : values.shape[2]] @ values, lse
