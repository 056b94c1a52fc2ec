"""`Rule`: what a mask means for the tokens that a `Step` shows, found out by the first layer that asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hfkv.attention.full import visibility_of_mask
from hfkv.attention.masks import CausalMask
from hfkv.attention.window_blocks import WindowBlocks
from hfkv.attention.windowed import visibility_of
from hfkv.cache.snapshot import HeldTokens
from hfkv.cache.step import Step
from hfkv.kernels.device_inputs import DeviceInputs, device_inputs
from hfkv.kernels.dispatch import attention_kernel
from hfkv.kernels.inputs import Visibility
from hfkv.kernels.visibility import seen

# A mask, or a wider head, keeps scaled_dot_product_attention of some devices from sharing keys among heads.
_MOST_SHARED = 256
# Beyond them, a prompt's attention is worth a kernel's care.
_MOST_QUERIES = 512


class Rule(NamedTuple):
    """What a mask means for the tokens that a `Step` shows, and who attends to them.

    Attributes:
        mask: mask of the forward, or None.
        queries: shape of the queries, `[B, Hq, q, D]`.
        is_plain: whether this is all that the mask says; else each layer looks at it by itself.
        pads: pad tokens of each row, where a window has to know.
        visible: bool `[B or 1, 1, 1, T]`; None where every token is seen. For few tokens only.
        is_causal: whether a query sees the tokens up to its own, and all of these.
        is_shared: whether torch lets query heads share keys and values.
        kernel: kernel that attends to more tokens; None for few.
        visibility: the same as `visible`, for the kernel.
        inputs: what the kernel reads on its device; None where it takes all from its arguments.
    """

    mask: torch.Tensor | None
    queries: torch.Size
    is_plain: bool = True
    pads: tuple[int, ...] | None = None
    visible: torch.Tensor | None = None
    is_causal: bool = False
    is_shared: bool = False
    kernel: Callable[..., Any] | None = None
    visibility: Visibility | None = None
    inputs: DeviceInputs | None = None


def rule_of_step(held: HeldTokens, step: Step, mask: torch.Tensor | None, queries: torch.Size) -> Rule:
    """Reads a mask `[B or 1, 1 or Hq, q, kv]` for what one layer of a step shows."""
    pads = None if held.window is None else _pads(held, step, mask)
    unclear = Rule(mask, queries, is_plain=False)
    if held.window is not None and pads is None:
        return unclear
    look = None if pads is None or not held.hides_tokens(pads) else WindowBlocks(held, pads)
    if look is not None and look.has_more_than_tokens:
        return unclear
    if step.is_short:
        rule = _of_few(held, step, mask, queries, look)
    elif queries[2] == 1 and not held.store.is_offloaded:
        rule = _of_many(held, step, mask, queries, look)
    else:
        return unclear
    return rule._replace(pads=pads)


def _pads(held: HeldTokens, step: Step, mask: torch.Tensor | None) -> tuple[int, ...] | None:
    """The pad tokens of each row, which a window counts from; None where the mask does not say."""
    if mask is None:
        return (0,) * held.batch
    if not isinstance(mask, CausalMask) or mask.shape[0] not in (1, held.batch) or mask.shape[3] != step.seen:
        return None
    pads = mask.left_padding()
    return pads if pads is None or len(pads) == held.batch else pads * held.batch


def _of_few(
    held: HeldTokens, step: Step, mask: torch.Tensor | None, queries: torch.Size, look: WindowBlocks | None
) -> Rule:
    key, value = held.parts["key"], held.parts["value"]
    # As transformers does, so that results are the same bits.
    is_shared = queries[1] == key.heads
    is_shared_unmasked = is_shared or key.head_dim == value.head_dim <= _MOST_SHARED
    rule = Rule(mask, queries, is_shared=is_shared_unmasked)
    if queries[2] > 1:
        is_whole = isinstance(mask, CausalMask) and mask.attention_mask is None and held.window is None
        is_plain = is_whole and queries[2] == held.last - held.first <= _MOST_QUERIES
        return rule._replace(is_plain=is_plain, is_causal=True)
    if look is None:
        if mask is None:
            return rule
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, 1, held.last - held.first):
            return rule._replace(is_plain=False)
        visible = mask.plain() if isinstance(mask, CausalMask) else mask
    elif look.sees_all_held(step.seen - 1):
        return rule
    else:
        shown = seen(visibility_of(look, 1), held.store.layout(), slice(None), held.first, held.last, 1)
        if shown is None:
            return rule
        visible = shown
    # A row that sees nothing gets zeros, which torch's own function does not promise.
    return rule._replace(visible=visible, is_shared=is_shared, is_plain=bool(visible.any(-1).all()))


def _of_many(
    held: HeldTokens, step: Step, mask: torch.Tensor | None, queries: torch.Size, look: WindowBlocks | None
) -> Rule:
    key, value = held.parts["key"], held.parts["value"]
    kernel = attention_kernel(held.codec.name, key.dtype, held.device, 1, (key.head_dim, value.head_dim))
    if look is None:
        visibility = visibility_of_mask(queries, held, mask, is_causal=True)
    elif look.sees_all_held(step.seen - 1):
        visibility = Visibility(seen=held.last, pads=(0,) * held.batch, first=held.first)
    else:
        visibility = visibility_of(look, 1)
    if kernel.run is None or visibility is None or not (look is None or kernel.reads_moved_windows):
        return Rule(mask, queries, is_plain=False)
    inputs = None
    if kernel.reads_device_lengths:
        inputs = device_inputs(held.store.layout(), visibility, held.device)
    return Rule(mask, queries, kernel=kernel.run, visibility=visibility, inputs=inputs)
