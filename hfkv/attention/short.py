"""Attention to few tokens: all that is held is decoded, and one call of torch attends to it."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from hfkv.attention.rule import WIDENED, Rule
from hfkv.cache.snapshot import HeldTokens
from hfkv.codecs.hadamard import rotate_states


def short_attention(query: torch.Tensor, held: HeldTokens, rule: Rule, scale: float | None) -> torch.Tensor:
    """Attention `[B, q, Hq, D]` to everything that is shown.

    Args:
        query: `[B, Hq, q, D]`: one query a row, or those of all tokens.
        held: the tokens of a layer, as it shows them in this forward.
        rule: what the queries see of them.
        scale: factor on the scores; None for ``D ** -0.5``.
    """
    keys, values = held.both()
    dtype = query.dtype
    codecs = held.codecs
    bias = None if held.mean is None else _of_mean(query, held, rule, scale)
    if codecs.key.is_rotated or codecs.value.is_rotated:
        query = query.float()
        out = _attend(rotate_states(query) if codecs.key.is_rotated else query, keys, values, rule, scale, bias)
        return (rotate_states(out) if codecs.value.is_rotated else out).to(dtype)
    if keys.dtype in WIDENED and query.device.type == "cpu":
        keys, values = keys.float(), values.float()
    return _attend(query.to(keys.dtype), keys, values, rule, scale, bias).to(dtype)


def _of_mean(query: torch.Tensor, held: HeldTokens, rule: Rule, scale: float | None) -> torch.Tensor:
    """What the mean of the keys adds to scores, and what is seen, float32 `[B, Hq, q, T]`."""
    assert held.placed_mean is not None
    scores = held.placed_mean.scores(query, held.first, held.last)
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    visible = rule.visible
    if rule.is_causal:
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    return scores if visible is None else scores.masked_fill_(~visible, -torch.inf)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rule: Rule,
    scale: float | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, num_heads, num_queries, width = rule.queries
    heads = keys.shape[1]
    mask, is_causal = rule.visible, rule.is_causal
    if bias is not None:
        mask, is_causal = bias.to(query.dtype), False
    if not rule.is_shared and num_queries == 1:
        query = query.reshape(batch, heads, num_heads // heads, width)
        if bias is not None and mask is not None:
            mask = mask.reshape(batch, heads, num_heads // heads, -1)
    elif not rule.is_shared:
        keys, values = (states.repeat_interleave(num_heads // heads, dim=1) for states in (keys, values))
    has_groups = query.shape[1] != keys.shape[1]
    out = scaled_dot_product_attention(query, keys, values, mask, 0.0, is_causal, scale=scale, enable_gqa=has_groups)
    if rule.is_blind is not None:
        out = out.reshape(batch, num_heads, num_queries, -1).masked_fill(rule.is_blind, 0)
    if num_queries == 1:
        return out.reshape(batch, 1, num_heads, values.shape[3])
    return out.transpose(1, 2).contiguous()
