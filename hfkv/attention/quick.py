"""The attention of a step whose mask has been read already: straight to torch, or to a kernel."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import output_capturing

from hfkv.attention.rule import Rule, rule_of_step
from hfkv.attention.short import short_attention
from hfkv.cache.snapshot import HeldTokens
from hfkv.cache.view import KVView
from hfkv.codecs import autocast
from hfkv.kernels.inputs import Scoring


def quick_attention(
    query: torch.Tensor, key: KVView, value: Any, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor | None:
    """Attention `[B, q, Hq, D]`, or None where the layer has to be looked at more closely.

    Args:
        query: `[B, Hq, q, D]`.
        key, value: views `[B, H, T, D]` of one layer.
        mask: what the model says is visible, `[B, 1 or Hq, q, kv]`; None for all, of one query.
        scale: factor on the scores; None for ``D ** -0.5``.
    """
    held = key.held
    if type(held) is not HeldTokens or type(value) is not KVView or value.held is not held:
        return None
    step, store = held.step, held.store
    if step is None or key.part != "key" or value.part != "value" or query.requires_grad:
        return None
    if held.version != store.version or store.length != held.last or query.dtype != step.keys.dtype:
        return None
    if torch.compiler.is_compiling() or output_capturing._active_collector.get():
        return None
    rule = step.rule
    if rule is None or rule.mask is not mask or rule.queries != query.shape:
        rule = step.rule = rule_of_step(held, step, mask, query.shape)
    if not rule.is_plain:
        return None
    if rule.pads is not None and rule.pads != held.padding.known:
        held.padding.learn(rule.pads, step.seen - 1)
    if not autocast.is_on():
        return _attend(query, held, rule, scale)
    with autocast.own_precision():
        out = _attend(query, held, rule, scale)
    return out.to(autocast.product_dtype(out))


def _attend(query: torch.Tensor, held: HeldTokens, rule: Rule, scale: float | None) -> torch.Tensor:
    if rule.kernel is None:
        return short_attention(query, held, rule, scale)
    scoring = Scoring(query.shape[-1] ** -0.5 if scale is None else scale)
    given = {} if rule.inputs is None else {"inputs": rule.inputs}
    attended = rule.kernel(query, *held.encoded(), rule.visibility, scoring, **given)
    out: torch.Tensor = attended.out
    return out.transpose(1, 2).contiguous()
