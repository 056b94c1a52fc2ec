"""Few queries over few tokens: all that is held is decoded, and one call of torch attends to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.utils import output_capturing

from hfkv.attention.masks import CausalMask
from hfkv.attention.window_blocks import WindowBlocks
from hfkv.attention.windowed import visibility_of
from hfkv.cache.snapshot import HeldTokens
from hfkv.cache.step import Step
from hfkv.cache.view import KVView
from hfkv.codecs import autocast
from hfkv.codecs.hadamard import rotate_states
from hfkv.kernels.visibility import seen

# On other devices a mask, or a wide head, keeps scaled_dot_product_attention from sharing keys among heads.
_MOST_SHARED = 256
# What processors without matrix units compute in float32 in a fraction of the time, the conversion included.
_WIDENED = (torch.bfloat16, torch.float16)
# Beyond them, a prompt's attention is worth a kernel's care.
_MOST_QUERIES = 512


class Rule(NamedTuple):
    """What a mask means for the tokens that a `Step` shows, and how torch is called.

    Attributes:
        mask: mask of the forward, or None.
        queries: shape of the queries, `[B, Hq, q, D]`.
        pads: pad tokens of each row, where a window has to know.
        visible: bool `[B or 1, 1, 1, T]`; None where every token is seen.
        is_causal: whether a query sees the tokens up to its own, and all of these.
        is_plain: whether this is all that the mask says.
        is_shared: whether torch lets query heads share keys and values.
    """

    mask: torch.Tensor | None
    queries: torch.Size
    pads: tuple[int, ...] | None = None
    visible: torch.Tensor | None = None
    is_causal: bool = False
    is_plain: bool = True
    is_shared: bool = False


def short_attention(
    query: torch.Tensor, key: KVView, value: Any, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor | None:
    """Attention `[B, q, Hq, D]` to few tokens, or None where it is to be looked at more closely.

    Args:
        query: `[B, Hq, q, D]`: one query a row, or those of all tokens.
        key, value: views `[B, H, T, D]` of one layer.
        mask: what the model says is visible, `[B, 1 or Hq, q, kv]`; None for all, of one query.
        scale: factor on the scores; None for ``D ** -0.5``.
    """
    held = key.held
    if type(held) is not HeldTokens or type(value) is not KVView or value.held is not held:
        return None
    step = held.step
    if step is None or not step.is_short or key.part != "key" or value.part != "value":
        return None
    store = held.store
    if held.version != store.version or store.length != held.last or query.requires_grad:
        return None
    if query.dtype != step.keys.dtype or torch.compiler.is_compiling():
        return None
    if output_capturing._active_collector.get():
        return None
    rule = step.rule
    if rule is None or rule.mask is not mask or rule.queries != query.shape:
        rule = step.rule = _with_call(_rule(held, step, mask, query.shape), held)
    if not rule.is_plain:
        return None
    if rule.pads is not None and rule.pads != held.padding.known:
        held.padding.learn(rule.pads, step.seen - 1)
    if not autocast.is_on():
        return _attend_held(query, held, rule, scale)
    with autocast.own_precision():
        out = _attend_held(query, held, rule, scale)
    return out.to(autocast.product_dtype(out))


def _attend_held(query: torch.Tensor, held: HeldTokens, rule: Rule, scale: float | None) -> torch.Tensor:
    keys, values = held.both()
    dtype = query.dtype
    if held.codec.is_rotated:
        return rotate_states(_attend(rotate_states(query.float()), keys, values, rule, scale)).to(dtype)
    if dtype in _WIDENED and query.device.type == "cpu":
        keys, values = keys.float(), values.float()
    out = _attend(query.to(keys.dtype), keys, values, rule, scale)
    return out if out.dtype == dtype else out.to(dtype)


def _with_call(rule: Rule, held: HeldTokens) -> Rule:
    """The rule, and whether torch shares keys among heads: as transformers does, so that results are the same bits."""
    key, value = held.parts["key"], held.parts["value"]
    is_shared = rule.visible is None and key.head_dim == value.head_dim <= _MOST_SHARED
    return rule._replace(is_shared=is_shared or rule.queries[1] == key.heads)


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


def _rule(held: HeldTokens, step: Step, mask: torch.Tensor | None, queries: torch.Size) -> Rule:
    """Reads a mask `[B or 1, 1 or Hq, q, kv]`."""
    if queries[2] > 1:
        return _rule_of_all(held, mask, queries)
    unclear = Rule(mask, queries, is_plain=False)
    if held.window is None:
        return Rule(mask, queries) if mask is None else _shown(mask, queries, held)
    if mask is None:
        pads: tuple[int, ...] | None = (0,) * held.batch
    elif isinstance(mask, CausalMask) and mask.shape[0] in (1, held.batch) and mask.shape[3] == step.seen:
        pads = mask.left_padding()
        pads = pads if pads is None or len(pads) == held.batch else pads * held.batch
    else:
        return unclear
    if pads is None:
        return unclear
    if not held.hides_tokens(pads):
        shown = Rule(mask, queries) if mask is None else _shown(mask, queries, held)
        return shown._replace(pads=pads)
    look = WindowBlocks(held, pads)
    if look.has_more_than_tokens:
        return unclear
    if look.sees_all_held(step.seen - 1):
        return Rule(mask, queries, pads)
    visible = seen(visibility_of(look, 1), held.store.layout(), slice(None), held.first, held.last, 1)
    return Rule(mask, queries, pads, visible, is_plain=visible is None or bool(visible.any(-1).all()))


def _rule_of_all(held: HeldTokens, mask: torch.Tensor | None, queries: torch.Size) -> Rule:
    """Reads a mask for the queries of all tokens: a prompt's, or of a text that is read at once."""
    is_whole = isinstance(mask, CausalMask) and mask.attention_mask is None
    if not is_whole or held.window is not None or not queries[2] == held.last - held.first <= _MOST_QUERIES:
        return Rule(mask, queries, is_plain=False)
    return Rule(mask, queries, is_causal=True)


def _shown(mask: torch.Tensor, queries: torch.Size, held: HeldTokens) -> Rule:
    """A mask over the tokens that are shown."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, 1, held.last - held.first):
        return Rule(mask, queries, is_plain=False)
    visible = mask.plain() if isinstance(mask, CausalMask) else mask
    # A row that sees nothing gets zeros, which torch's own function does not promise.
    return Rule(mask, queries, None, visible, is_plain=bool(visible.any(-1).all()))
