"""`probe_rotary`: finds out from a model itself how it rotates its keys."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hfkv.codecs.autocast import in_own_precision
from hfkv.models.parallel import parallel_plan_of
from hfkv.models.rotary import Rotary

# Where the keys are measured: few, small enough for any model, and far enough apart to tell frequencies apart.
_POSITIONS = (0, 1, 2, 5, 17, 101)
REMEDY = 'use sink_positions="absolute" and no summary'


@in_own_precision
def probe_rotary(model: Any, sliding: bool = False) -> dict[int, Rotary | None]:
    """Finds out how the keys of each plain full-attention layer are rotated, by running the model's own code.

    One token runs at a few positions, each in a row of its own. It attends to itself alone, so between the rows a
    layer's keys differ by their rotation and its values not at all. The model is left as it was.

    Args:
        model: a transformers model, or a `PeftModel` around one.
        sliding: whether layers with a sliding window of their own are asked for too.

    Returns:
        The `Rotary` of each such layer, by layer index; None where keys do not depend on their position.

    Raises:
        ValueError: the keys or values of a layer depend on positions in any other way.
    """
    base = base_model(model)
    config = base.config.get_text_config(decoder=True)
    decoder = decoder_of(base)
    reason = _refusal(base, config, decoder)
    if reason is not None:
        raise ValueError(f"{config.model_type!r}: {reason}; {REMEDY}")
    limit = getattr(config, "max_position_embeddings", None) or max(_POSITIONS) + 1
    positions = torch.tensor([position for position in _POSITIONS if position < limit])
    # What is found must be ordinary tensors, in every mode of the caller's.
    with torch.inference_mode(False), torch.no_grad():
        layers = _layers_at(positions, decoder, config, (DynamicLayer, DynamicSlidingWindowLayer)[: 1 + sliding])
        frequencies = list(_frequencies(decoder))
        return {index: _rotary_of(index, layer, positions, frequencies, config) for index, layer in layers.items()}


def base_model(model: Any) -> Any:
    """The transformers model itself: inside a `PeftModel`, or what was given."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cross_attention_layers(config: PreTrainedConfig) -> set[int]:
    """The layers whose cross-attention some multimodal decoders (mllama) cache in the same list."""
    return set(getattr(config, "cross_attention_layers", None) or ())


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that holds the layers of its text decoder."""
    decoder = model.get_decoder()
    # A few models (modernbert-decoder) call their output layer "decoder".
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def moving_angles(config: PreTrainedConfig, decoder: torch.nn.Module | None) -> str | None:
    """Why a token's rotary angles are not fixed multiples of its index in the text, or None where they are."""
    kind = growing_rope_type(config)
    if kind is not None:
        return f"its rotary frequencies change as the text grows (rope_type {kind!r})"
    modules = () if decoder is None else decoder.modules()
    multiple = any(settings.get("mrope_section") for settings in _rope_settings(config))
    if multiple or any(getattr(module, "mrope_section", None) for module in modules):
        return "its rotary positions have several axes (mrope_section), and those of images are not token indices"
    return None


def refusal_by_config(config: PreTrainedConfig) -> str | None:
    """Why it is not understood how the keys of a model depend on positions, or None where its config says no reason."""
    decoder = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        return "the keys of encoder-decoder models are not known to be rotated by their positions"
    if getattr(decoder, "alibi", False):
        return "its attention adds a bias for positions (alibi) instead of rotating keys"
    return moving_angles(decoder, None)


def growing_rope_type(config: PreTrainedConfig) -> str | None:
    """The rope type whose frequencies change as the text grows, or None where none does."""
    for settings in _rope_settings(config):
        kind = str(settings.get("rope_type", settings.get("type", "")))
        if "dynamic" in kind or kind == "longrope":
            return kind
    return None


def _rope_settings(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The config's rope parameters, and those it nests by layer type."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, name, None)
        if isinstance(settings, dict):
            yield settings
            yield from (value for value in settings.values() if isinstance(value, dict))


def _refusal(model: PreTrainedModel, config: PreTrainedConfig, decoder: PreTrainedModel) -> str | None:
    if parallel_plan_of(model).stages > 1:
        return "its layers are shared by the stages of a pipeline, none of which can run a token through all of them"
    reason = refusal_by_config(model.config)
    if reason is not None:
        return reason
    if "position_ids" not in inspect.signature(type(decoder).forward).parameters:
        return f"{type(decoder).__name__} takes no position_ids, so its keys cannot be moved to other positions"
    return moving_angles(config, decoder)


def _layers_at(
    positions: torch.Tensor, decoder: Any, config: PreTrainedConfig, kinds: tuple[type, ...]
) -> dict[int, DynamicLayer]:
    """The layers of some kinds, with the keys and values `[B, H, 1, D]` of a token at one position a row."""
    ids = torch.full((len(positions), 1), _plain_token(config))
    cache = _Recorder(config=config)
    run_decoder(decoder, config, ids, positions[:, None], cache)
    cross = cross_attention_layers(config)
    return {i: layer for i, layer in enumerate(cache.layers) if type(layer) in kinds and i not in cross}


def run_decoder(
    decoder: Any, config: PreTrainedConfig, ids: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
) -> None:
    """Runs a text decoder, without dropout, over ids `[B, T]` at positions `[B, T]`, which go on what `cache` holds.

    Raises:
        ValueError: it does not run on these alone.
    """
    device = _input_device(decoder)
    ids = ids.to(device)
    training = [module for module in decoder.modules() if module.training]
    try:
        for module in training:
            module.training = False
        decoder(
            input_ids=ids,
            attention_mask=ids.new_ones(len(ids), cache.get_seq_length() + ids.shape[1]),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{config.model_type!r}: {type(decoder).__name__} does not run on token ids and positions alone "
            f"({type(error).__name__}: {error}); {REMEDY}"
        ) from error
    finally:
        for module in training:
            module.training = True


class _Recorder(DynamicCache):
    """Keeps the keys and hands out zeros, so that the rows' queries score alike and later layers see equal rows.

    With true keys, rounding errors reach later layers where attention has sinks (gpt_oss), and may flip the choice
    of an expert.
    """

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return torch.zeros_like(keys), values


def _input_device(decoder: Any) -> torch.device:
    """The device on which the decoder wants its token ids; accelerate may have offloaded its weights."""
    embeddings = decoder.get_input_embeddings()
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(embeddings.weight.device if device is None else device)


def _plain_token(config: PreTrainedConfig) -> int:
    """A token in the middle of the vocabulary that has no special meaning; a pad token may have all-zero keys."""
    special: set[Any] = set()
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")):
            special.update(value if isinstance(value, list) else [value])
    middle = config.vocab_size // 2
    return next((token for token in range(middle, config.vocab_size) if token not in special), middle)


def frequencies(model: Any) -> tuple[float, ...]:
    """Numbers that change when the model's rotary frequencies do: casting a model rounds them."""
    return tuple(float(found.sum()) for found in _frequencies(decoder_of(model)))


def _frequencies(decoder: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The different rotary frequencies the decoder holds: float64 `[r / 2]`, on the CPU."""
    seen: list[torch.Tensor] = []
    for name, buffer in decoder.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            inv_freq = buffer.cpu().double()
            if not any(torch.equal(inv_freq, other) for other in seen):
                seen.append(inv_freq)
                yield inv_freq


def _rotary_of(
    index: int,
    layer: DynamicLayer,
    positions: torch.Tensor,
    frequencies: list[torch.Tensor],
    config: PreTrainedConfig,
) -> Rotary | None:
    """The rotation that makes the layer's keys at position 0 those at the other positions."""
    keys, values = layer.keys, layer.values
    where = f"{config.model_type!r}, layer {index}"
    if keys is None or not keys.any():
        raise ValueError(f"{where}: a token at a few positions left no keys to compare; {REMEDY}")
    # The model rounds cos, sin, their products and the sums to its dtype.
    tolerance = 1e-4 + 8 * torch.finfo(keys.dtype).eps
    rotated, plain, part = keys, values, "key"
    if not _misfit(None, values, positions) <= tolerance:
        rotated, plain, part = values, keys, "value"  # latent attention keeps its rotary keys there
    candidates: list[Rotary | None] = [None, *_candidates(frequencies, rotated.shape[-1])]
    misfits = [_misfit(candidate, rotated, positions) for candidate in candidates]
    best = min(range(len(candidates)), key=misfits.__getitem__)
    if not misfits[best] <= tolerance:
        raise ValueError(
            f"{where}: its keys depend on positions in a way hfkv does not know. It knows keys without positions, and "
            "rotary embeddings of a head's first dims, adjacent or half-split pairs, with frequencies that the model "
            f"keeps as inv_freq; {REMEDY}"
        )
    if not _misfit(None, plain, positions) <= tolerance:
        raise ValueError(f"{where}: both what it caches as keys and as values depend on positions; {REMEDY}")
    found = candidates[best]
    if found is None:
        return found
    device = "cpu" if keys.device.type == "mps" else keys.device
    return Rotary(found.inv_freq.to(device), found.interleaved, part)


def _candidates(frequencies: list[torch.Tensor], head_dim: int) -> Iterator[Rotary]:
    for inv_freq in frequencies:
        if 2 * len(inv_freq) <= head_dim:
            for interleaved in (False, True):
                yield Rotary(inv_freq, interleaved)
                yield Rotary(-inv_freq, interleaved)


def _misfit(rotary: Rotary | None, states: torch.Tensor, positions: torch.Tensor) -> float:
    """The largest error of the states a candidate predicts, relative to each dim's own size.

    Some dims are a hundred times larger than the rest (qwen2): beside those alone, any error of the others is small.
    """
    states = states.cpu().double()
    predicted = states[:1].expand_as(states)
    if rotary is not None:
        predicted = rotary.rotate(predicted, positions[:, None, None])
    size = states.abs().amax(dim=0).clamp(min=states.abs().median())
    # Dims that are zero throughout agree.
    return ((predicted - states).abs() / size.clamp(min=torch.finfo(states.dtype).tiny)).max().item()
