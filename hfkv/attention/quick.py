"""The attention of a step whose mask has been read already: straight to torch, or to a kernel."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from hfkv.attention.rule import Rule, rule_of_step
from hfkv.attention.short import short_attention
from hfkv.cache.snapshot import HeldTokens
from hfkv.cache.view import StepKeys, StepValues
from hfkv.codecs import autocast
from hfkv.kernels.inputs import Scoring

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # `autocast.is_on`, without a call of Python


def quick_attention(
    query: torch.Tensor, key: StepKeys, value: StepValues, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor | None:
    """Attention `[B, q, Hq, D]`, or None where the layer has to be looked at more closely.

    Args:
        query: `[B, Hq, q, D]`.
        key, value: views `[B, H, T, D]` of one layer.
        mask: what the model says is visible, `[B, 1 or Hq, q, kv]`; None for all, of one query.
        scale: factor on the scores; None for ``D ** -0.5``.
    """
    held = key.held
    step, store = held.step, held.store
    if step is None or value.held is not held or held.version != store.version or store.length != held.last:
        return None
    rule = step.rule
    if rule is None or rule.mask is not mask or rule.queries != query.shape or rule.dtype != query.dtype:
        rule = step.rule = rule_of_step(held, step, mask, query)
    if not rule.is_plain or query.requires_grad:
        return None
    if rule.pads is not None and rule.pads != held.padding.known:
        held.padding.learn(rule.pads, step.seen - query.shape[2])
    if _is_any_autocast_enabled():
        with autocast.own_precision():
            out = _attend(query, held, rule, scale)
        return out.to(autocast.product_dtype(out))
    if rule.slices is None:
        return _attend(query, held, rule, scale)
    # The commonest case by the shortest way: one query over plain tokens that lie in one piece.
    keys, values = store.planes
    of_keys, of_values, shape, has_groups = rule.slices
    return scaled_dot_product_attention(
        *(query, keys.as_strided(*of_keys), values.as_strided(*of_values), rule.visible),
        scale=scale,
        enable_gqa=has_groups,
    ).reshape(shape)


def _attend(query: torch.Tensor, held: HeldTokens, rule: Rule, scale: float | None) -> torch.Tensor:
    return (short_attention if rule.kernel is None else kernel_attention)(query, held, rule, scale)


def kernel_attention(query: torch.Tensor, held: HeldTokens, rule: Rule, scale: float | None) -> torch.Tensor:
    """Attention `[B, 1, Hq, D]` by the kernel of a rule; see `quick_attention`."""
    assert rule.kernel is not None
    assert rule.kernel.run is not None
    of_step, planes = rule.of_step, held.store.planes
    if of_step is not None and of_step.takes(query, planes):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        of_mean = () if held.mean is None else (held.mean.vector,)
        out: torch.Tensor = of_step.run(query, planes, scale, *of_mean)
        return out
    scoring = Scoring(query.shape[-1] ** -0.5 if scale is None else scale)
    given = {} if rule.inputs is None else {"inputs": rule.inputs}
    attended = rule.kernel.run(query, *held.encoded(), rule.visibility, scoring, **given)
    out = attended.out
    return out.transpose(1, 2).contiguous()
