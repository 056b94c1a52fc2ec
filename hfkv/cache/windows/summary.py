"""Summaries: one key and one value that stand for a page of tokens."""

from __future__ import annotations

import torch

from hfkv.codecs.autocast import in_own_precision
from hfkv.models.rotary import Rotary
from hfkv.policy.window import Window
from hfkv.stores.layout import bits_of


@in_own_precision
def page_means(
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    sinks: torch.Tensor,
    page_size: int,
    rotary: Rotary | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean key and value of pages; rotated states are first turned to the position of the page's middle.

    Args:
        keys, values: tokens `[B, H, T, Dk]` and `[B, H, T, Dv]`.
        first: index of each page's first token among them, `[B, N]`; what lies outside is taken from the edge.
        sinks: number of sinks at the front of each page, which are not part of the mean, `[B, N]`.
        page_size: number of tokens a page.
        rotary: rotation of the keys, or of what is cached as values, by position; None where there is none.

    Returns:
        Means `[B, H, N, Dk]` and `[B, H, N, Dv]` in the dtypes of keys and values. A page of sinks only gives zeros.
    """
    within = torch.arange(page_size, device=keys.device)
    index = (first[..., None] + within).clamp(0, keys.shape[2] - 1).flatten(1)  # [B, N * P]
    keys, values = (take(states, index) for states in (keys, values))
    if rotary is not None:
        turns = (page_size // 2 - within).repeat(first.shape[1])
        if rotary.part == "key":
            keys = rotary.rotate(keys, turns)
        else:
            values = rotary.rotate(values, turns)
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    weights = (within >= sinks[..., None]).to(dtype)  # [B, N, P]
    weights /= weights.sum(-1, keepdim=True).clamp_min(1)
    pages = (states.unflatten(2, (-1, page_size)).to(dtype) for states in (keys, values))
    means = (torch.einsum("bhnpd,bnp->bhnd", states, weights) for states in pages)
    return tuple(mean.to(states.dtype) for mean, states in zip(means, (keys, values), strict=True))  # type: ignore[return-value]


def sinks_in_pages(pages: torch.Tensor, window: Window) -> torch.Tensor:
    """The number of sinks at the front of each page, in the shape of `pages`."""
    return (window.sinks - pages * window.summary_page_size).clamp(0, window.summary_page_size)


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Takes the tokens `index` `[B, n]` of each row of `[B, H, T, d]`."""
    bits = bits_of(states)
    index = index[:, None, :, None].expand(-1, bits.shape[1], -1, bits.shape[3])
    return bits.gather(2, index).view(states.dtype)


def where(condition: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Takes `new` where `condition` holds, else `old`, in any dtype."""
    if new.element_size() > 1:
        return torch.where(condition, new, old)
    return torch.where(condition, new.view(torch.uint8), old.view(torch.uint8)).view(new.dtype)
