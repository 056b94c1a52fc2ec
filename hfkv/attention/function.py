"""The ``"hfkv"`` attention and mask functions, registered with transformers by `register`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import output_capturing

from hfkv.attention.full import as_returned, fused_attention
from hfkv.attention.latent.function import latent_attention, windowed_latent_attention
from hfkv.attention.latent.view import LatentView
from hfkv.attention.masks import NOT_LEFT_PADDED, CausalMask, hfkv_mask, left_padding, only_picked, packed_only, rule_of
from hfkv.attention.quick import quick_attention
from hfkv.attention.recent import recent_attention
from hfkv.attention.recent_step import quick_recent_attention
from hfkv.attention.windowed import windowed_attention
from hfkv.cache.layers.head_groups import SplitTokens
from hfkv.cache.layers.recent import RecentKeys, RecentTokens, RecentValues
from hfkv.cache.snapshot import HeldTokens, Part, Tokens
from hfkv.cache.view import KVView, StepKeys, StepValues, refuse_window
from hfkv.kernels.inputs import Scoring
from hfkv.models.attention_keywords import AttentionCode, attention_code, own_attention_reason

NAME = "hfkv"

# Keywords the model's own eager attention implements and scaled_dot_product_attention does not.
_EAGER_ONLY = {"softcap", "s_aux"}
# Keywords that some attention function of transformers reads and that change nothing here: the mask says what they
# say, or they only choose how something is computed.
_SAID_BY_MASK = {"cache_position", "position_ids", "sliding_window"}
_HOW = {
    "attn_implementation",
    "deterministic",
    "kernel_options",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "target_dtype",
}
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k"}
_UNDERSTOOD = _EAGER_ONLY | _SAID_BY_MASK | _HOW | _PACKING
_VIEWS = (KVView, LatentView)
_QUICK: dict[tuple[type, type], Callable[..., torch.Tensor | None]] = {
    (StepKeys, StepValues): quick_attention,
    (RecentKeys, RecentValues): quick_recent_attention,
}


def hfkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the keys and values of one layer, decoded here and nowhere else.

    Args:
        module: the attention module.
        query: `[B, Hq, q, D]`.
        key, value: `[B, H, T, D]`, `KVView`s or plain tensors.
        attention_mask: bool or additive `[B, 1 or Hq, q, kv]`; None for causal or full attention.
        scaling: factor on the scores; None for ``D ** -0.5``.
        dropout: probability.
        is_causal: overrides ``module.is_causal``.
        position_bias: `[1 or B, Hq, q, kv]` added to the scores (T5).
        **kwargs: what the model passes on. Of these, softcap, s_aux and cu_seq_lens_q change the result; what no
            attention function of transformers reads has no effect, as there.

    Returns:
        The output `[B, q, Hq, D]`, and the weights where they were asked for (``output_attentions=True``).

    Raises:
        ValueError: a model that must keep its own attention was loaded with this one.
        NotImplementedError: a keyword that would change the result and is not implemented here.
    """
    quick = _QUICK.get((type(key), type(value)))
    if quick is not None and position_bias is None and not dropout:
        kind = (type(module), *kwargs)
        telling = _telling.get(kind)
        if telling is None:
            telling = _telling[kind] = _telling_names(module, kwargs)
        if not telling or all(kwargs[name] is None or kwargs[name] is False for name in telling):
            output = quick(query, key, value, attention_mask, scaling)
            if output is not None:
                return output, None
    _refuse_own_attention(getattr(module, "config", None))
    # transformers' pipeline parallelism hands on the keywords of its forward as one.
    kwargs = {**(kwargs.pop("kwargs", None) or {}), **kwargs}
    indices = kwargs.pop("indices", None) if hasattr(module, "expand_kv") else None
    code = attention_code(type(module))
    for name, given in kwargs.items():
        if given is not None and name in code.keywords and name not in _UNDERSTOOD:
            raise NotImplementedError(
                f'the "hfkv" attention does not implement {name!r}, which {type(module).__name__} passed; keep the '
                "model's own attention (hfkv.patch does so for models it knows) and its cache is decoded for it"
            )
    if is_causal is None:
        # Without a mask, transformers' eager attention hides nothing, and sdpa asks the module.
        is_causal = code.has_sdpa and getattr(module, "is_causal", True)
    attention_mask, is_causal = rule_of(attention_mask, is_causal)
    extra = {name: kwargs[name] for name in kwargs if kwargs[name] is not None}
    if "cu_seq_lens_q" in extra:
        attention_mask = packed_only(attention_mask, is_causal, extra["cu_seq_lens_q"], query, key)
    if indices is not None:
        attention_mask = only_picked(attention_mask, indices, key.shape[2], is_causal)
    tokens = _tokens(key, value)
    is_captured = isinstance(tokens, HeldTokens) and tokens.inputs is not None
    if tokens is not None and tokens.is_windowed and not is_captured:
        if position_bias is not None:
            raise NotImplementedError(
                f"{type(module).__name__} adds a position bias for consecutive positions, which a windowed cache does "
                "not hold; leave the window out"
            )
        if attention_mask is None and not is_causal and query.shape[2] > 1:
            raise NotImplementedError(NOT_LEFT_PADDED)
        pads = left_padding(attention_mask, tokens.batch, query.shape[2], tokens.seen)
        tokens.padding.learn(pads, tokens.seen - query.shape[2])
        scoring = _scoring(query, scaling, dropout if module.training else 0.0, extra)
        if isinstance(tokens, SplitTokens):
            return _split(query, tokens, pads, scoring)
        if isinstance(tokens, RecentTokens):
            output, weights = recent_attention(query, tokens, pads, scoring)
            return as_returned(output), weights
        if isinstance(tokens, HeldTokens) and tokens.hides_tokens(pads):
            return _windowed(query, key, value, pads, scoring)
    is_followed = key.requires_grad or value.requires_grad  # a backward pass must find the edge that raises
    if isinstance(tokens, HeldTokens) and position_bias is None and not is_followed:
        scoring = _scoring(query, scaling, dropout if module.training else 0.0, extra)
        if isinstance(key, LatentView):
            output = latent_attention(query, key.source, attention_mask, is_causal, scoring)
        else:
            output = fused_attention(query, tokens, attention_mask, is_causal, scoring)
        if output is not None:
            return as_returned(output), None
    key, value = (states.decoded() if isinstance(states, _VIEWS) else states for states in (key, value))
    if isinstance(attention_mask, CausalMask):
        attention_mask = attention_mask.plain()

    if _EAGER_ONLY & extra.keys() or _weights_wanted(extra) or not code.has_sdpa:
        mask = _additive(attention_mask, query, key, is_causal)
        if position_bias is not None:
            extra["position_bias"] = position_bias
        return _own_eager(code, module)(module, query, key, value, mask, scaling=scaling, dropout=dropout, **extra)
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
    )


# By class of attention module and keywords: those of them that change something where they are given.
_telling: dict[tuple[Any, ...], tuple[str, ...]] = {}


def _telling_names(module: torch.nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    _refuse_own_attention(getattr(module, "config", None))
    known = attention_code(type(module)).keywords | {"kwargs", "indices"}
    return tuple(name for name in names if name in known and name not in _SAID_BY_MASK | _HOW - {"output_attentions"})


def hfkv_attention_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The bool mask of the sdpa attention, refused for models that would never call ours.

    Raises:
        ValueError: the model's code computes its attention itself and would misread this mask.
    """
    _refuse_own_attention(kwargs.get("config"))
    return hfkv_mask(*args, **kwargs)


def _refuse_own_attention(config: Any) -> None:
    reason = own_attention_reason(config) if config is not None else None
    if reason is not None:
        raise ValueError(
            f'{config.model_type!r} cannot take attn_implementation="hfkv": {reason}. Load it without that, and use '
            "hfkv.patch(model): its caches are decoded for the model's own attention"
        )


def register() -> None:
    """Makes ``attn_implementation="hfkv"`` known to transformers."""
    AttentionInterface.register(NAME, hfkv_attention)
    AttentionMaskInterface.register(NAME, hfkv_attention_mask)


def _scoring(query: torch.Tensor, scaling: float | None, dropout: float, extra: dict[str, Any]) -> Scoring:
    return Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=extra.get("softcap"),
        sink_logits=extra.get("s_aux"),
        dropout=dropout,
        weights=_weights_wanted(extra),
    )


def _tokens(key: torch.Tensor, value: torch.Tensor) -> Tokens | None:
    """The tokens that both are views of, or None.

    Raises:
        RuntimeError: one is a view of windowed tokens, and the other is no view of the same.
    """
    held = [states.held for states in (key, value) if isinstance(states, _VIEWS)]
    if len(held) == 2 and held[0] is held[1]:
        return held[0]
    for tokens in held:
        refuse_window(tokens)
    return None


def _windowed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pads: tuple[int, ...], scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(key, LatentView):
        output, weights = windowed_latent_attention(query, key.source, pads, scoring)
        return as_returned(output), weights
    assert isinstance(key, KVView)
    assert isinstance(value, KVView)
    assert isinstance(key.held, HeldTokens)
    tracked: dict[Part, torch.Tensor] | None = None
    if key.requires_grad:
        tracked = {"key": key.decoded(), "value": value.decoded()}
    output, weights = windowed_attention(query, key.held, pads, scoring, tracked)
    return as_returned(output), weights


def _split(
    query: torch.Tensor, tokens: SplitTokens, pads: tuple[int, ...], scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes attention for each group of heads on its own."""
    group_size = query.shape[1] // tokens.parts["key"].heads
    outputs, weights, order = [], [], []
    for group in tokens.groups:
        heads = [group_size * head + i for head in group.heads for i in range(group_size)]
        logits = scoring.sink_logits if scoring.sink_logits is None else scoring.sink_logits[heads]
        own = replace(scoring, sink_logits=logits)
        output, its_weights = _windowed(query[:, heads], group.key, group.value, pads, own)
        outputs.append(output)
        weights.append(its_weights)
        order += heads
    back = torch.tensor(order, device=query.device).argsort()
    all_weights = torch.cat(weights, dim=1)[:, back] if scoring.weights else None  # type: ignore[arg-type]
    return torch.cat(outputs, dim=2)[:, :, back], all_weights


def _weights_wanted(extra: dict[str, Any]) -> bool:
    if extra.get("output_attentions"):
        return True
    collector = output_capturing._active_collector  # set while a forward records its layers' outputs
    # A compiler cannot trace a context variable: there it is a global one.
    is_variable = not torch.compiler.is_compiling() or collector.compiling
    collected = collector.get() if is_variable else None
    return any("attentions" in name for name in collected or ())


def _additive(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, is_causal: bool
) -> torch.Tensor | None:
    """The mask as eager attention functions want it: 0 where visible, the dtype's minimum elsewhere."""
    q, kv = query.shape[2], key.shape[2]
    if mask is None:
        if q == 1 or not is_causal:
            return None
        mask = torch.ones(1, 1, q, kv, dtype=torch.bool, device=query.device).tril(kv - q)
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


def _own_eager(code: AttentionCode, module: torch.nn.Module) -> Any:
    if code.eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} asked for attention weights or a keyword that only an eager attention has, and "
            f'{type(module).__module__} defines none; use attn_implementation="eager"'
        )
    return code.eager


register()
