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
# Beyond them, a prompt's attention is worth a kernel's care.
_MOST_QUERIES = 512


class Rule(NamedTuple):
    """What a mask means for the tokens that a `Step` shows.

    Attributes:
        mask: mask of the forward, or None.
        pads: pad tokens of each row, where a window has to know.
        visible: bool `[B or 1, 1, 1, T]`; None where every token is seen.
        is_causal: whether a query sees the tokens up to its own, and all of these.
        is_plain: whether this is all that the mask says.
    """

    mask: torch.Tensor | None
    pads: tuple[int, ...] | None = None
    visible: torch.Tensor | None = None
    is_causal: bool = False
    is_plain: bool = True


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
    if key.part != "key" or value.part != "value":
        return None
    step = held.step
    if step is None or not step.is_short or held.version != held.store.version or held.store.length != held.last:
        return None
    if query.dtype != held.parts["key"].dtype or query.requires_grad:
        return None
    if autocast.is_on() or torch.compiler.is_compiling():
        return None
    if output_capturing._active_collector.get():
        return None
    rule = step.rule
    if rule is None or rule.mask is not mask:
        rule = step.rule = _rule(held, step, mask, query.shape[2])
    if not rule.is_plain:
        return None
    if rule.pads is not None and rule.pads != held.padding.known:
        held.padding.learn(rule.pads, step.seen - 1)
    keys, values = held.both()
    if not held.codec.is_rotated:
        return _attend(query, keys, values, rule, scale)
    out = _attend(rotate_states(query.float()), keys, values, rule, scale)
    return rotate_states(out).to(query.dtype)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule, scale: float | None
) -> torch.Tensor:
    batch, num_heads, num_queries, width = query.shape
    heads, visible, is_causal = keys.shape[1], rule.visible, rule.is_causal
    if num_heads == heads:
        out = scaled_dot_product_attention(query, keys, values, visible, is_causal=is_causal, scale=scale)
    elif visible is None and width == values.shape[3] <= _MOST_SHARED:
        # As transformers does, to the bit.
        out = scaled_dot_product_attention(query, keys, values, is_causal=is_causal, scale=scale, enable_gqa=True)
    elif num_queries == 1:
        query = query.reshape(batch, heads, num_heads // heads, width)
        out = scaled_dot_product_attention(query, keys, values, visible, scale=scale)
        return out.reshape(batch, 1, num_heads, -1)
    else:
        keys, values = (states.repeat_interleave(num_heads // heads, dim=1) for states in (keys, values))
        out = scaled_dot_product_attention(query, keys, values, visible, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2).contiguous()


def _rule(held: HeldTokens, step: Step, mask: torch.Tensor | None, num_queries: int) -> Rule:
    """Reads a mask `[B or 1, 1 or Hq, q, kv]`."""
    if num_queries > 1:
        return _rule_of_all(held, mask, num_queries)
    unclear = Rule(mask, is_plain=False)
    if held.window is None:
        return Rule(mask) if mask is None else _shown(mask, held)
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
        shown = Rule(mask) if mask is None else _shown(mask, held)
        return shown._replace(pads=pads)
    look = WindowBlocks(held, pads)
    if look.has_more_than_tokens:
        return unclear
    if look.sees_all_held(step.seen - 1):
        return Rule(mask, pads)
    visible = seen(visibility_of(look, 1), held.store.layout(), slice(None), held.first, held.last, 1)
    return Rule(mask, pads, visible, is_plain=visible is None or bool(visible.any(-1).all()))


def _rule_of_all(held: HeldTokens, mask: torch.Tensor | None, num_queries: int) -> Rule:
    """Reads a mask for the queries of all tokens: a prompt's, or of a text that is read at once."""
    is_whole = isinstance(mask, CausalMask) and mask.attention_mask is None
    if not is_whole or held.window is not None or num_queries != held.last - held.first or num_queries > _MOST_QUERIES:
        return Rule(mask, is_plain=False)
    return Rule(mask, is_causal=True)


def _shown(mask: torch.Tensor, held: HeldTokens) -> Rule:
    """A mask over the tokens that are shown."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, 1, held.last - held.first):
        return Rule(mask, is_plain=False)
    visible = mask.plain() if isinstance(mask, CausalMask) else mask
    # A row that sees nothing gets zeros, which torch's own function does not promise.
    return Rule(mask, None, visible, is_plain=bool(visible.any(-1).all()))
