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
    if codecs.key.is_rotated or codecs.value.is_rotated:
        query = query.float()
        out = _attend(rotate_states(query) if codecs.key.is_rotated else query, keys, values, rule, scale)
        return (rotate_states(out) if codecs.value.is_rotated else out).to(dtype)
    if keys.dtype in WIDENED and query.device.type == "cpu":
        keys, values = keys.float(), values.float()
    return _attend(query.to(keys.dtype), keys, values, rule, scale).to(dtype)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule, scale: float | None
) -> torch.Tensor:
    batch, num_heads, num_queries, width = rule.queries
    heads = keys.shape[1]
    if not rule.is_shared and num_queries == 1:
        query = query.reshape(batch, heads, num_heads // heads, width)
    elif not rule.is_shared:
        keys, values = (states.repeat_interleave(num_heads // heads, dim=1) for states in (keys, values))
    has_groups = query.shape[1] != keys.shape[1]
    out = scaled_dot_product_attention(
        query, keys, values, rule.visible, 0.0, rule.is_causal, scale=scale, enable_gqa=has_groups
    )
    if rule.is_blind is not None:
        out = out.reshape(batch, num_heads, num_queries, -1).masked_fill(rule.is_blind, 0)
    if num_queries == 1:
        return out.reshape(batch, 1, num_heads, values.shape[3])
    return out.transpose(1, 2).contiguous()
