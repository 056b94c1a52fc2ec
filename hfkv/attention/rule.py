"""`Rule`: what a mask means for the tokens that a `Step` shows, found out by the first layer that asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import output_capturing

from hfkv.attention.full import visibility_of_mask
from hfkv.attention.masks import CausalMask
from hfkv.attention.window_blocks import WindowBlocks
from hfkv.attention.windowed import visibility_of
from hfkv.cache.snapshot import HeldTokens
from hfkv.cache.step import Step
from hfkv.kernels.backend import MANY, Kernel, StepCall
from hfkv.kernels.device_inputs import DeviceInputs, device_inputs
from hfkv.kernels.dispatch import attention_kernel
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.visibility import seen

# A mask, or a wider head, keeps scaled_dot_product_attention of some devices from sharing keys among heads.
_MOST_SHARED = 256
# What processors without matrix units compute in float32 in a fraction of the time, the conversion included.
WIDENED = (torch.bfloat16, torch.float16)
# Beyond them, a prompt's attention is worth a kernel's care; so is a mask that is written out for more than these. In
# windows, where nothing has to be decoded, looking at blocks of queries is faster sooner.
_MOST_QUERIES = 512
_MOST_SEEN, _MOST_SEEN_IN_WINDOW = 1 << 18, 1 << 16


@dataclass(eq=False, slots=True)
class Rule:
    """What a mask means for the tokens that a `Step` shows, and who attends to them.

    Attributes:
        mask: mask of the forward, or None.
        queries: shape of the queries, `[B, Hq, q, D]`.
        dtype: dtype of the queries.
        is_plain: whether this is all that the mask says; else each layer looks at it by itself.
        pads: pad tokens of each row, where a window has to know.
        visible: bool `[B or 1, 1, q, T]`; None where every token is seen. For few tokens only.
        is_blind: bool `[B or 1, 1, q, 1]`: queries that see nothing, and get zeros; None where there are none.
        is_causal: whether a query sees the tokens up to its own, and all of these.
        is_shared: whether torch lets query heads share keys and values.
        kernel: kernel that attends to more tokens; None for few.
        visibility: the same as `visible`, for the kernel.
        inputs: what the kernel reads on its device; None where it takes all from its arguments.
        of_step: the same kernel for the layers of a step, where it has all of its arguments but their tensors.
        slices: of one query over plain tokens in one piece, that torch takes as they are: size, strides and offset of
            the keys, the same of the values, the shape `[B, 1, Hq, D]` of the output, and whether heads share keys.
        beside: what is worked out besides where the tokens are the recent ones of a layer; see
            `hfkv.attention.recent_step`.
    """

    mask: torch.Tensor | None
    queries: torch.Size
    dtype: torch.dtype
    is_plain: bool = True
    pads: tuple[int, ...] | None = None
    visible: torch.Tensor | None = None
    is_blind: torch.Tensor | None = None
    is_causal: bool = False
    is_shared: bool = False
    kernel: Kernel | None = None
    visibility: Visibility | None = None
    inputs: DeviceInputs | None = None
    of_step: StepCall | None = None
    slices: tuple[Any, Any, tuple[int, ...], bool] | None = None
    beside: Any = None


def rule_of_step(held: HeldTokens, step: Step, mask: torch.Tensor | None, query: torch.Tensor) -> Rule:
    """Reads a mask `[B or 1, 1 or Hq, q, kv]` for queries `[B, Hq, q, D]` to what one layer of a step shows."""
    rule = Rule(mask, query.shape, query.dtype)
    rule.is_plain = _is_plain(rule, held, step)
    if rule.is_plain and rule.inputs is not None and rule.kernel is not None and rule.kernel.of_step is not None:
        given = *held.encoded(), rule.visibility, Scoring(1.0)
        rule.of_step = rule.kernel.of_step(query, *given, inputs=rule.inputs)
    return rule


def _is_plain(rule: Rule, held: HeldTokens, step: Step) -> bool:
    """Works out a rule; whether it says all."""
    if rule.dtype != held.parts["key"].dtype or torch.compiler.is_compiling():
        return False
    if output_capturing._active_collector.get():  # weights may be wanted
        return False
    if rule.mask is None and rule.queries[2] > 1:  # the module says what is meant
        return False
    look = None
    if held.window is not None:
        rule.pads = _pads(held, step, rule.mask)
        if rule.pads is None:
            return False
        if held.hides_tokens(rule.pads):
            look = WindowBlocks(held, rule.pads)
            if look.has_more_than_tokens:
                return False
    if step.is_short or (look is None and _is_whole_prompt(rule, held) and _reads_slices(rule, held)):
        return _is_of_few(rule, held, step, look)
    return rule.queries[2] < MANY and not held.store.is_offloaded and _is_of_many(rule, held, step, look)


def _pads(held: HeldTokens, step: Step, mask: torch.Tensor | None) -> tuple[int, ...] | None:
    """The pad tokens of each row, which a window counts from; None where the mask does not say."""
    if mask is None:
        return (0,) * held.batch
    if not isinstance(mask, CausalMask) or mask.shape[0] not in (1, held.batch) or mask.shape[3] != step.seen:
        return None
    pads = mask.left_padding()
    return pads if pads is None or len(pads) == held.batch else pads * held.batch


def _is_of_few(rule: Rule, held: HeldTokens, step: Step, look: WindowBlocks | None) -> bool:
    """Works out what torch is given for few tokens; whether that is all."""
    key, value, mask, queries = held.parts["key"], held.parts["value"], rule.mask, rule.queries
    # As transformers does, so that results are the same bits.
    rule.is_shared = queries[1] == key.heads or key.head_dim == value.head_dim <= _MOST_SHARED
    num_queries, num_tokens = queries[2], held.last - held.first
    if look is None and _is_whole_prompt(rule, held) and (num_tokens <= _MOST_QUERIES or _reads_slices(rule, held)):
        rule.is_causal = True
        return True
    most = _MOST_SEEN_IN_WINDOW if look is not None and held.codecs.is_lossless else _MOST_SEEN
    if num_queries > 1 and num_queries * num_tokens > most:
        return False
    if look is None:
        if mask is not None:
            if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, num_queries, num_tokens):
                return False
            rule.visible = mask.plain() if isinstance(mask, CausalMask) else mask
    elif num_queries > 1 or not look.sees_all_held(step.seen - 1):
        visibility = visibility_of(look, num_queries)
        rule.visible = seen(visibility, held.store.layout(), slice(None), held.first, held.last, num_queries)
    if rule.visible is not None:
        rule.is_shared = queries[1] == key.heads
        # A query that sees nothing (a pad token's) gets zeros, which torch's own function does not promise.
        is_blind = ~rule.visible.any(-1, keepdim=True)
        if bool(is_blind.any()):
            rule.visible, rule.is_blind = rule.visible | is_blind, is_blind
    is_one = num_queries == 1 and rule.is_blind is None and rule.is_shared
    if is_one and step.placing is not None and _reads_slices(rule, held):
        shape = queries[0], 1, queries[1], value.head_dim
        rule.slices = step.keys[:3], step.values[:3], shape, key.heads != queries[1]
    return True


def _is_whole_prompt(rule: Rule, held: HeldTokens) -> bool:
    """Whether the queries are those of all tokens, and each sees the ones up to its own."""
    is_plain = isinstance(rule.mask, CausalMask) and rule.mask.attention_mask is None
    return is_plain and 1 < rule.queries[2] == held.last - held.first


def _reads_slices(rule: Rule, held: HeldTokens) -> bool:
    """Whether torch attends to keys and values where they lie."""
    is_alike = held.parts["key"].dtype == held.parts["value"].dtype  # not under some autocasts
    return (
        (held.is_slice or held.fresh is not None)
        and is_alike
        and not (rule.dtype in WIDENED and held.device.type == "cpu")
    )


def _is_of_many(rule: Rule, held: HeldTokens, step: Step, look: WindowBlocks | None) -> bool:
    """Works out what the kernel is given for few queries and many tokens; whether that is all."""
    key, value, num_queries = held.parts["key"], held.parts["value"], rule.queries[2]
    head_dims, is_innermost = (key.head_dim, value.head_dim), bool(held.store.tokens_innermost)
    asked = held.codecs.name, key.dtype, held.device, num_queries, head_dims, is_innermost
    kernel = attention_kernel(*asked, held.mean is not None)
    if kernel.run is None or not (look is None or kernel.reads_moved_windows) or held.has_odd_slots:
        return False
    if look is None:
        rule.visibility = visibility_of_mask(rule.queries, held, rule.mask, is_causal=True)
    elif num_queries == 1 and look.sees_all_held(step.seen - 1):
        rule.visibility = Visibility(seen=held.last, pads=(0,) * held.batch, first=held.first)
    else:
        rule.visibility = visibility_of(look, num_queries)
    rule.kernel = kernel
    # Layers that have appended by themselves may have taken different pages.
    if step.placing is not None and kernel.reads_device_lengths and rule.visibility is not None:
        rule.inputs = device_inputs(held.store.layout(), rule.visibility, held.device)
    return rule.visibility is not None
