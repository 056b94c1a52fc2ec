"""Attention to latents: absorbed for a few queries, expanded by stretches for many."""

from __future__ import annotations

import torch

from hfkv.attention.full import fused_attention
from hfkv.attention.latent.crossover import form_for
from hfkv.attention.latent.projection import LatentProjection, projection_of
from hfkv.attention.latent.snapshot import HeldLatents
from hfkv.attention.latent.view import Latents
from hfkv.attention.masks import CausalMask, shown_by
from hfkv.attention.windowed import windowed_attention
from hfkv.kernels.dispatch import expanded_kernel
from hfkv.kernels.inputs import Scoring


def latent_attention(
    query: torch.Tensor, source: Latents, mask: torch.Tensor | None, is_causal: bool, scoring: Scoring
) -> torch.Tensor | None:
    """Attention to latents under no window of ours, or None where they are to be expanded first.

    Args:
        query: `[B, H, q, dn + dr]`, the model's own.
        source: the latents of all tokens, the queries' own included.
        mask: what the model says is visible, `[B, 1 or H, q, T]`; None for causal or full attention.
        is_causal: which of the two.
        scoring: what becomes of scores.

    Returns:
        `[B, H, q, dv]`.
    """
    held = source.held
    projection = projection_of(source.module, query)
    if isinstance(projection, str):
        source.say(f"latents are expanded for every step, as in transformers' own code: {projection}")
        return None
    if _is_followed(query, source, projection):
        return None
    if mask is not None and mask.is_floating_point():
        mask = shown_by(mask)
        if mask is None:
            return None
    tokens = held.last - held.first
    form = form_for(query.shape[2], tokens, source.widths, query.dtype, query.device, projection.is_decoded)
    if held.inputs is not None or form == "absorbed":
        latents, absorbed = HeldLatents.of(held), projection.absorb(query)
        attended = fused_attention(absorbed, latents, mask, is_causal, scoring)
        if attended is None and latents.kernel(absorbed).run is None:
            attended = _by_torch(absorbed, latents, mask, is_causal, scoring)
        return None if attended is None else projection.release(attended)
    return fused_attention(query, HeldLatents.of(held, projection), mask, is_causal, scoring)


def _by_torch(
    absorbed: torch.Tensor, latents: HeldLatents, mask: torch.Tensor | None, is_causal: bool, scoring: Scoring
) -> torch.Tensor | None:
    """Absorbed attention where there is no kernel, or None where the mask says more than left padding."""
    num_queries = absorbed.shape[2]
    is_all = mask is None and (num_queries == 1 or (is_causal and num_queries == latents.last - latents.first))
    pads = (0,) * latents.batch if is_all else mask.left_padding() if isinstance(mask, CausalMask) else None
    if pads is None or latents.first or scoring.weights:
        return None
    pads = pads if len(pads) == latents.batch else pads * latents.batch
    return windowed_attention(absorbed, latents, pads, scoring)[0]


def windowed_latent_attention(
    query: torch.Tensor, source: Latents, pads: tuple[int, ...], scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention to latents under a window that has moved.

    Args:
        query, source, scoring: see `latent_attention`.
        pads: pad tokens of each row.

    Returns:
        `[B, H, q, dv]`, and the weights as `windowed_attention` gives them, where wanted.
    """
    held = source.held
    projection = projection_of(source.module, query)
    if isinstance(projection, str) or _is_followed(query, source, projection):
        if isinstance(projection, str):
            source.say(f"latents of a window are expanded for every step: {projection}")
        if held.window is not None and held.window.summary is not None:
            raise NotImplementedError(
                "a window with a summary keeps means of latents, which only kv_b_proj as a plain matrix, without "
                f"gradients, can read; here {projection if isinstance(projection, str) else 'autograd follows it'}. "
                "Leave the summary out, or call the model under torch.no_grad() with a plain kv_b_proj"
            )
        return windowed_attention(query, held, pads, scoring, source.expanded)
    if _expands(query, source, projection, scoring):
        return windowed_attention(query, HeldLatents.of(held, projection), pads, scoring)
    attended, weights = windowed_attention(projection.absorb(query), HeldLatents.of(held), pads, scoring)
    return projection.release(attended), weights


def _expands(query: torch.Tensor, source: Latents, projection: LatentProjection, scoring: Scoring) -> bool:
    """Whether latents under a window are expanded: by the one kernel that does it, and only for many queries."""
    window, device = source.held.window, source.held.device
    assert window is not None
    if window.needs_rotary or scoring.weights or scoring.dropout:
        return False
    if expanded_kernel(query.dtype, device, bool(source.held.store.tokens_innermost)).run is None:
        return False
    # A query sees no more than the window.
    tokens = min(source.held.last - source.held.first, window.capacity() + query.shape[2])
    form = form_for(query.shape[2], tokens, source.widths, query.dtype, device, projection.is_decoded)
    return form == "expanded"


def _is_followed(query: torch.Tensor, source: Latents, projection: LatentProjection) -> bool:
    if not torch.is_grad_enabled():
        return False
    if source.is_followed or query.requires_grad:
        return True
    return any(parameter.requires_grad for parameter in projection.linear.parameters())
