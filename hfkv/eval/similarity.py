"""Attention similarity: the direction of what each attention layer gives, with one cache and with another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from hfkv.cache.kv_cache import KVCache
from hfkv.eval.reader import CHUNK, CacheReader, chunk_slices, each_warning_once
from hfkv.models.probe import base_model
from hfkv.patches.patch import patch
from hfkv.policy.config import KVConfig


@torch.inference_mode()
def attention_similarity(
    model: Any, ids: torch.Tensor, kv: KVConfig | str | None, chunk: int = CHUNK
) -> dict[int, float]:
    """Compare what the attention modules give under the full cache and under another: the cosine, by layer.

    Each run feeds its own states forward. So a layer's figure holds the error of its own cache and what the layers
    below it passed on; it is not the error of that layer alone. All tokens of the text count alike.

    Args:
        model: A causal language model, or a `PeftModel` around one, not patched; it is left as it was.
        ids: Token ids of one text, [T], int64.
        kv: The cache to compare with the full one.
        chunk: Tokens a forward: later chunks see earlier ones through the cache.

    Returns:
        The mean over the tokens of the cosine between both outputs, -1 to 1, by layer index; only layers with keys
        and values of their own.

    Raises:
        ValueError: `ids` is empty or not one-dimensional, `chunk` is below 1, or see `CacheReader`.
    """
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"ids must be one non-empty row of tokens, not of shape {tuple(ids.shape)}")
    ids = ids.to(model.device)[None]
    pieces = chunk_slices(ids.shape[1], chunk)
    totals: dict[int, float] = {}
    with each_warning_once():
        full, other = CacheReader(model), CacheReader(model, kv)
        with attention_outputs(model) as outputs, patch(model):
            full.start(ids.shape[1])
            other.start(ids.shape[1])
            for piece in pieces:
                full.read(ids[:, piece])
                expected = dict(outputs)
                other.read(ids[:, piece])
                for layer, cosine in cosines(expected, outputs).items():
                    totals[layer] = totals.get(layer, 0.0) + cosine.sum().item()
    return {layer: total / ids.shape[1] for layer, total in totals.items()}


def cosines(full: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The cosine of every token between two runs' outputs [B, T, hidden], as [B, T], fp32, by layer."""
    return {layer: F.cosine_similarity(full[layer].float(), other[layer].float(), dim=-1) for layer in full}


@contextmanager
def attention_outputs(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    """Collects what the attention modules give, by forward hooks that are removed at the end.

    Yields:
        The outputs [B, T, hidden] of the latest forward by layer index; filled anew by each forward.
    """
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int, output: Any) -> None:
        outputs[layer] = output[0] if isinstance(output, tuple) else output

    hooks = [
        module.register_forward_hook(lambda module, args, output, layer=layer: keep(layer, output))
        for layer, module in attention_modules(model).items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def attention_modules(model: Any) -> dict[int, torch.nn.Module]:
    """Finds the modules that read a KV cache, by layer index: those that run while the cache is updated.

    Runs one token through the model, so no class names have to be known.
    """
    base = base_model(model)
    running: list[torch.nn.Module] = []
    found: dict[int, torch.nn.Module] = {}

    class Probe(KVCache):
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            found.setdefault(layer_idx, running[-1])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        running.pop()

    hooks = []
    for module in base.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, args: running.append(module)))
        hooks.append(module.register_forward_hook(leave))
    try:
        base(torch.zeros(1, 1, dtype=torch.long, device=base.device), past_key_values=Probe(base), use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(sorted(found.items()))
