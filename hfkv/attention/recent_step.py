"""Attention of a step's few queries to recent tokens and others, with all that layers have alike worked out once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hfkv.attention.recent import coarse_part, held_of
from hfkv.attention.rule import Rule, rule_of_step
from hfkv.cache.layers.recent import RecentKeys, RecentTokens, RecentValues
from hfkv.cache.snapshot import HeldTokens
from hfkv.cache.step import Step
from hfkv.codecs import autocast
from hfkv.kernels.backend import Kernel, StepCall
from hfkv.kernels.device_inputs import DeviceInputs, device_inputs
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.stores.layout import Layout

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # `autocast.is_on`, without a call of Python


@dataclass(eq=False, slots=True)
class CoarseRule:
    """What a kernel is given for the coarse part of a step, beside the `Rule` of the fine part.

    Attributes:
        step: step of the coarse part that it is for.
        kernel: kernel that attends; None where each layer has to be looked at by itself.
        visibility, layout: the tokens that the queries read in the coarse form.
        inputs, of_step: the same for the coarse part as a `Rule` has.
    """

    step: Step
    kernel: Kernel | None = None
    visibility: Visibility | None = None
    layout: Layout | None = None
    inputs: DeviceInputs | None = None
    of_step: StepCall | None = None


def quick_recent_attention(
    query: torch.Tensor, key: RecentKeys, value: RecentValues, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor | None:
    """Attention `[B, q, Hq, D]`, or None where the layer has to be looked at more closely.

    Args:
        query, key, value, mask, scale: see `hfkv.attention.quick.quick_attention`.
    """
    tokens = key.held
    coarse, fine = held_of(tokens.coarse), held_of(tokens.fine)
    step, of_coarse = fine.step, coarse.step
    if step is None or of_coarse is None or value.held is not tokens or not _are_new(fine) or not _are_new(coarse):
        return None
    rule = step.rule
    if rule is None or rule.mask is not mask or rule.queries != query.shape or rule.dtype != query.dtype:
        rule = step.rule = rule_of_step(fine, step, mask, query)
    if not rule.is_plain or rule.kernel is None or query.requires_grad:
        return None
    far = rule.beside
    if far is None or far.step is not of_coarse:
        far = rule.beside = _coarse_rule(query, tokens, coarse, of_coarse, rule)
    if far.kernel is None:
        return None
    if rule.pads != fine.padding.known:
        fine.padding.learn(rule.pads, step.seen - query.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not _is_any_autocast_enabled():
        return _attend(query, fine, coarse, rule, far, scale)
    with autocast.own_precision():
        out = _attend(query, fine, coarse, rule, far, scale)
    return out.to(autocast.product_dtype(out))


def _are_new(held: HeldTokens) -> bool:
    return held.version == held.store.version and held.store.length == held.last


def _coarse_rule(query: torch.Tensor, tokens: RecentTokens, held: HeldTokens, step: Step, rule: Rule) -> CoarseRule:
    """Works out what the kernel of the coarse part is given."""
    assert rule.pads is not None
    visibility = coarse_part(tokens, rule.pads)
    # As in a `Rule`: layers that have appended by themselves may have taken different pages.
    is_alike = step.placing is not None and not held.store.is_offloaded
    if not is_alike or min(visibility.pads) > visibility.seen - query.shape[2]:
        return CoarseRule(step)
    kernel = held.kernel(query)
    if kernel.run is None:
        return CoarseRule(step)
    keys, values, layout = held.encoded()
    layout, inputs, of_step = replace(layout, length=visibility.seen), None, None
    if kernel.reads_device_lengths:
        inputs = device_inputs(layout, visibility, held.device)
        if kernel.of_step is not None:
            of_step = kernel.of_step(query, keys, values, layout, visibility, Scoring(1.0), inputs=inputs)
    return CoarseRule(step, kernel, visibility, layout, inputs, of_step)


def _attend(
    query: torch.Tensor, fine: HeldTokens, coarse: HeldTokens, rule: Rule, far: CoarseRule, scale: float
) -> torch.Tensor:
    assert rule.visibility is not None
    assert far.visibility is not None
    near_out, near_lse = _by_kernel(query, fine, rule, None, scale)
    far_out, far_lse = _by_kernel(query, coarse, far, far.layout, scale)
    share = torch.sigmoid(far_lse - near_lse)
    if any(far.visibility.pads):  # a row may have nothing there, and a query of padding nothing at all
        share.masked_fill_(far_lse == -torch.inf, 0)
    share = share.transpose(1, 2).unsqueeze(-1)
    return torch.lerp(near_out.float(), far_out.float(), share).to(query.dtype)


def _by_kernel(
    query: torch.Tensor, held: HeldTokens, rule: Rule | CoarseRule, layout: Layout | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output `[B, q, Hq, D]` of one part, and its log-sum-exp `[B, Hq, q]`."""
    of_step: Any = rule.of_step
    planes = held.store.planes
    if of_step is not None and of_step.takes(query, planes):
        of_mean = () if held.mean is None else (held.mean.vector,)
        return of_step.run(query, planes, scale, *of_mean), of_step.lse
    assert rule.kernel is not None
    assert rule.kernel.run is not None
    given = {} if rule.inputs is None else {"inputs": rule.inputs}
    keys, values, whole = held.encoded()
    attended = rule.kernel.run(query, keys, values, layout or whole, rule.visibility, Scoring(scale), **given)
    return attended.out.transpose(1, 2), attended.lse
