"""Attention by a kernel to what a layer holds, where the model's own masks say what is visible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hfkv.attention.masks import CausalMask
from hfkv.cache.snapshot import HeldTokens
from hfkv.codecs.autocast import product_dtype
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.merge import Attended, merge, nothing, with_sink_logits


def kernel_for(query: torch.Tensor, held: HeldTokens, scoring: Scoring) -> Callable[..., Attended] | None:
    """The kernel that attends to `held`, or None where none does all that is asked for.

    Args:
        query: `[B, Hq, q, D]`.
        held: the tokens.
        scoring: what becomes of scores.
    """
    is_followed = torch.is_grad_enabled() and query.requires_grad  # a backward pass must find its way, and then raise
    if scoring.weights or scoring.dropout or is_followed or query.dtype != held.parts["key"].dtype:
        return None
    if held.has_odd_slots:
        return None
    return held.kernel(query).run


def fused_attention(
    query: torch.Tensor, held: HeldTokens, mask: torch.Tensor | None, is_causal: bool, scoring: Scoring
) -> torch.Tensor | None:
    """Attention `[B, Hq, q, Dv]` to tokens under no window of ours, or None where no kernel does all that is asked for.

    Args:
        query: `[B, Hq, q, D]`.
        held: the tokens, the queries' own included.
        mask: what the model says is visible, `[B, 1 or Hq, q, T]`; None for causal or full attention.
        is_causal: whether None is causal; else it is full.
        scoring: what becomes of scores.
    """
    kernel = kernel_for(query, held, scoring)
    if kernel is None:
        return None
    is_prompt = mask is None and query.shape[2] > 1
    if is_prompt and held.codecs.is_lossless and query.device.type != "cpu":
        return None  # scaled_dot_product_attention is the faster flash attention there
    if held.inputs is not None:
        return kernel(query, *held.encoded(), _on_device(held), scoring, inputs=held.inputs).out
    visibility = visibility_of_mask(query.shape, held, mask, is_causal)
    if visibility is None:
        return None
    return attend_held(kernel, query, held, held.last, visibility, scoring).out


def attend_held(
    kernel: Callable[..., Attended],
    query: torch.Tensor,
    held: HeldTokens,
    last: int,
    visibility: Visibility,
    scoring: Scoring,
) -> Attended:
    """Attention by a kernel to the tokens held up to `last`, run by run where they lie apart.

    Args:
        kernel: see `kernel_for`.
        query: `[B, Hq, q, D]`.
        held: the tokens.
        last: index behind the last of them.
        visibility: which of them each query sees.
        scoring: what becomes of scores.

    Returns:
        The output `[B, Hq, q, Dv]` in the query's dtype, and its log-sum-exp.
    """
    attended: Attended | None = None
    for keys, values, layout, of_run in held.runs(last, visibility):
        if layout.length == last:
            return kernel(query, keys, values, layout, of_run, scoring)
        # A logit that takes weight and is no token's comes once, behind the last run.
        part = kernel(query, keys, values, layout, of_run, replace(scoring, sink_logits=None))
        attended = part if attended is None else merge(attended, part)
    attended = nothing(query, held.out_dim) if attended is None else attended
    attended = with_sink_logits(attended, scoring.sink_logits)
    return Attended(attended.out.to(query.dtype), attended.lse)


def as_returned(output: torch.Tensor) -> torch.Tensor:
    """Turns `[B, Hq, q, Dv]` into what an attention function returns: `[B, q, Hq, Dv]`, under autocast in its dtype."""
    return output.transpose(1, 2).contiguous().to(product_dtype(output))


def _on_device(held: HeldTokens) -> Visibility:
    """A placeholder: the kernel reads from the device what is visible."""
    return Visibility(seen=held.last, pads=(0,) * held.batch)


def visibility_of_mask(
    queries: torch.Size, held: HeldTokens, mask: torch.Tensor | None, is_causal: bool
) -> Visibility | None:
    """What `mask` says of queries `[B, Hq, q, D]`, or None where it says more than what is visible."""
    batch, _, num_queries, _ = queries
    num_shown = held.last - held.first
    # Positions are counted from the first token shown, as those of the mask are.
    shown = Visibility(seen=num_shown, pads=(0,) * batch, first=held.first, num_slots=held.first)
    if mask is None:
        return shown if num_queries == 1 or (is_causal and num_queries == num_shown) else None
    if mask.dim() != 4 or mask.dtype != torch.bool or mask.shape[-1] != num_shown:
        return None
    if mask.shape[2] != num_queries:
        mask = mask.expand(-1, -1, num_queries, -1)
    if isinstance(mask, CausalMask):
        pads = mask.left_padding()
        if pads is not None:
            return replace(shown, pads=pads if len(pads) == batch else pads * batch)
        mask = mask.plain()
    return replace(shown, mask=mask)
