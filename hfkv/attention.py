"""The ``"hfkv"`` attention and mask functions, registered with transformers by `register`."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import output_capturing

from hfkv.fused import fused_attention
from hfkv.held import HeldTokens, Part, Tokens
from hfkv.kernels.inputs import Scoring
from hfkv.latent.attention import latent_attention, windowed_latent_attention
from hfkv.latent.view import LatentView
from hfkv.mask import CausalMask, hfkv_mask, left_padding, only_picked
from hfkv.modelling import modelling_files
from hfkv.split import SplitTokens
from hfkv.view import KVView, refuse_window
from hfkv.windowed import windowed_attention

NAME = "hfkv"

# Models that must keep their own attention although their code would take another name for it.
_SPARSE = "it applies its sparse index only under transformers' own attentions"
OWN_ATTENTION = {
    "deepseek_v4": _SPARSE,
    "minimax_m3": _SPARSE,
    "bigbird_pegasus": "its encoder computes its attention itself and would misread the mask",
    "git": "it changes its keys and values between the cache and the attention",
    "inkling2": "it passes a keyword to its attention that only its own functions know",
}

# Keywords that reach an attention function and do not change its result: flags and inputs of the model's forward,
# and `sliding_window`, which the mask already says.
_WITHOUT_EFFECT = {
    "assistant_tokenizer",
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_ids",
    "return_dict",
    "sliding_window",
    "token_type_ids",
    "tokenizer",
    "use_cache",
}
# Keywords the model's own eager attention implements and scaled_dot_product_attention does not.
_EAGER_ONLY = {"softcap", "s_aux"}
_UNDERSTOOD = _WITHOUT_EFFECT | _EAGER_ONLY
_VIEWS = (KVView, LatentView)


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
        **kwargs: what the model passes on; see Raises.

    Returns:
        The output `[B, q, Hq, D]`, and the weights where they were asked for (``output_attentions=True``).

    Raises:
        ValueError: a model that must keep its own attention was loaded with this one.
        NotImplementedError: a keyword that would change the result and is not implemented here.
    """
    _refuse_own_attention(getattr(module, "config", None))
    # transformers' pipeline parallelism hands on the keywords of its forward as one.
    kwargs = {**(kwargs.pop("kwargs", None) or {}), **kwargs}
    indices = kwargs.pop("indices", None) if hasattr(module, "expand_kv") else None
    for name, given in kwargs.items():
        if given is not None and name not in _UNDERSTOOD:
            raise NotImplementedError(
                f'the "hfkv" attention does not implement {name!r}, which {type(module).__name__} passed; keep the '
                "model's own attention (hfkv.patch does so for models it knows) and its cache is decoded for it"
            )
    attention_class: Any = type(module)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    extra = {name: kwargs[name] for name in kwargs if kwargs[name] is not None}
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
        pads = left_padding(attention_mask, tokens.batch, query.shape[2], tokens.seen)
        tokens.padding.learn(pads, tokens.seen - query.shape[2])
        scoring = _scoring(query, scaling, dropout if module.training else 0.0, extra)
        if isinstance(tokens, SplitTokens):
            return _split(query, tokens, pads, scoring)
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
            return output.transpose(1, 2).contiguous(), None
    key, value = (states.decoded() if isinstance(states, _VIEWS) else states for states in (key, value))
    if isinstance(attention_mask, CausalMask):
        attention_mask = attention_mask.plain()

    if _EAGER_ONLY & extra.keys() or _weights_wanted(extra) or not _has_sdpa(attention_class):
        mask = _additive(attention_mask, query, key, is_causal)
        if position_bias is not None:
            extra["position_bias"] = position_bias
        eager = _own_eager(attention_class)
        return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **extra)
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


def own_attention_reason(config: Any) -> str | None:
    """Why models of this config must keep their own attention, or None where they may take ours."""
    config_class: Any = type(config)
    return _own_attention_reason(config_class, config.model_type)


@functools.cache
def _own_attention_reason(config_class: Any, model_type: str) -> str | None:
    for kind, reason in OWN_ATTENTION.items():
        if model_type == kind or model_type.startswith(f"{kind}_"):
            return reason
    if not _calls_attention_functions(config_class):
        return "its code does not go through transformers' attention functions"
    return None


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
    """What both are views of, or None.

    Raises:
        RuntimeError: one of them is a view of something windowed and the other is not of the same.
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
        return output.transpose(1, 2).contiguous(), weights
    assert isinstance(key, KVView)
    assert isinstance(value, KVView)
    assert isinstance(key.held, HeldTokens)
    tracked: dict[Part, torch.Tensor] | None = None
    if key.requires_grad:
        tracked = {"key": key.decoded(), "value": value.decoded()}
    output, weights = windowed_attention(query, key.held, pads, scoring, tracked)
    return output.transpose(1, 2).contiguous(), weights


def _split(
    query: torch.Tensor, tokens: SplitTokens, pads: tuple[int, ...], scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of each group of heads on its own."""
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
    collected = output_capturing._active_collector.get()  # set while a forward records its layers' outputs
    return bool(collected) and any("attentions" in name for name in collected)


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


@functools.cache
def _modelling(module_class: Any) -> Any:
    """The modelling file of an attention class: where its eager attention function is."""
    for base in module_class.__mro__:
        modelling = sys.modules.get(base.__module__)
        if hasattr(modelling, "eager_attention_forward"):
            return modelling
    return sys.modules[module_class.__module__]


def _own_eager(module_class: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    eager = getattr(_modelling(module_class), "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{module_class.__name__} asked for attention weights or a keyword that only an eager attention has, and "
            f'{module_class.__module__} defines none; use attn_implementation="eager"'
        )
    return eager


@functools.cache
def _has_sdpa(module_class: Any) -> bool:
    """Whether the model may use scaled_dot_product_attention; gpt_oss, for one, may not."""
    found: list[Any] = [value for value in vars(_modelling(module_class)).values() if inspect.isclass(value)]
    models = [value for value in found if issubclass(value, PreTrainedModel) and value is not PreTrainedModel]
    return not models or any(model._supports_sdpa for model in models)


@functools.cache
def _calls_attention_functions(config_class: Any) -> bool:
    """Whether the models of a config go through transformers' attention functions (and so reach ours)."""
    modelling = modelling_files(config_class)
    found: list[Any] = [value for module in modelling for value in vars(module).values() if inspect.isclass(value)]
    models = [value for value in found if issubclass(value, PreTrainedModel) and value.config_class is config_class]
    return all(model._can_set_attn_implementation() for model in models)
