"""Attention to few tokens: all that is held is decoded, and one call of torch attends to it."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from hfkv.attention.rule import Rule
from hfkv.cache.snapshot import HeldTokens
from hfkv.codecs.hadamard import rotate_states

# What processors without matrix units compute in float32 in a fraction of the time, the conversion included.
_WIDENED = (torch.bfloat16, torch.float16)


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
    if held.codec.is_rotated:
        return rotate_states(_attend(rotate_states(query.float()), keys, values, rule, scale)).to(dtype)
    if dtype in _WIDENED and query.device.type == "cpu":
        keys, values = keys.float(), values.float()
    out = _attend(query.to(keys.dtype), keys, values, rule, scale)
    return out if out.dtype == dtype else out.to(dtype)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule, scale: float | None
) -> torch.Tensor:
    batch, num_heads, num_queries, width = rule.queries
    visible, is_causal = rule.visible, rule.is_causal
    if rule.is_shared:
        out = scaled_dot_product_attention(
            query, keys, values, visible, is_causal=is_causal, scale=scale, enable_gqa=keys.shape[1] != num_heads
        )
    elif num_queries == 1:
        query = query.reshape(batch, keys.shape[1], num_heads // keys.shape[1], width)
        out = scaled_dot_product_attention(query, keys, values, visible, scale=scale)
    else:
        keys, values = (states.repeat_interleave(num_heads // keys.shape[1], dim=1) for states in (keys, values))
        out = scaled_dot_product_attention(query, keys, values, visible, is_causal=is_causal, scale=scale)
    if num_queries == 1:
        return out.reshape(batch, 1, num_heads, values.shape[3])
    return out.transpose(1, 2).contiguous()
