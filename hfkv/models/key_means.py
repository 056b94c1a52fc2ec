"""`find_key_means`: the mean key of every layer and kv head of a model, from a text that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from hfkv.codecs.autocast import in_own_precision
from hfkv.codecs.key_mean import KeyMean
from hfkv.codecs.waves import Waves
from hfkv.models.probe import base_model, decoder_of, probe_rotary, run_decoder
from hfkv.models.rotary import Rotary

# Tokens that a forward reads at once.
_CHUNK = 256


@in_own_precision
def find_key_means(model: Any, ids: torch.Tensor) -> dict[int, KeyMean]:
    """Finds out what the keys of each attention layer have in common, before they are rotated by their positions.

    The model reads the text once, without an output layer, and is left as it was.

    Args:
        model: a transformers model, or a `PeftModel` around one.
        ids: token ids of a text, int64 `[T]`.

    Returns:
        The `KeyMean` of each layer whose keys the model caches as such, by layer index. Latents have none.

    Raises:
        ValueError: the keys of a layer depend on positions in a way that is not known; see `probe_rotary`.
    """
    base = base_model(model)
    config = base.config.get_text_config(decoder=True)
    ids = ids[: getattr(config, "max_position_embeddings", None) or len(ids)]
    rotary = {i: each for i, each in probe_rotary(base, sliding=True).items() if each is None or each.part == "key"}
    sums = _Sums(config, rotary)
    with torch.inference_mode(False), torch.no_grad():
        for begin in range(0, len(ids), _CHUNK):
            piece = ids[begin : begin + _CHUNK]
            positions = torch.arange(begin, begin + len(piece))
            run_decoder(decoder_of(base), config, piece[None], positions[None], sums)
        return means_of({index: total / len(ids) for index, total in sums.totals.items()}, rotary)


def means_of(vectors: Mapping[int, torch.Tensor], rotary: Mapping[int, Rotary | None]) -> dict[int, KeyMean]:
    """The `KeyMean` of layers, by index, that have these mean keys `[H, D]` and rotations; None is no rotation."""
    waves: list[Waves] = []
    return {
        index: KeyMean(vector, _waves_of(rotary[index], vector.shape[1], waves)) for index, vector in vectors.items()
    }


def _waves_of(rotary: Rotary | None, head_dim: int, known: list[Waves]) -> Waves:
    """The cosines and sines of a rotation, the same object for the same ones."""
    inv_freq = torch.empty(0, dtype=torch.float64) if rotary is None else rotary.inv_freq.cpu().double()
    interleaved = rotary is not None and rotary.interleaved
    for waves in known:
        if (waves.interleaved, waves.head_dim) == (interleaved, head_dim) and torch.equal(waves.inv_freq, inv_freq):
            return waves
    known.append(Waves(inv_freq, interleaved, head_dim))
    return known[-1]


class _Sums(DynamicCache):
    """Adds up the keys that layers are given, turned back to position 0."""

    def __init__(self, config: Any, rotary: dict[int, Rotary | None]) -> None:
        super().__init__(config=config)
        self.rotary = rotary
        self.totals: dict[int, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if layer_idx in self.rotary:
            first, rotary, keys = self.get_seq_length(layer_idx), self.rotary[layer_idx], key_states.float()
            if rotary is not None:
                keys = rotary.rotate(keys, -torch.arange(first, first + keys.shape[2], device=keys.device))
            self.totals[layer_idx] = self.totals.get(layer_idx, 0) + keys[0].sum(1)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
