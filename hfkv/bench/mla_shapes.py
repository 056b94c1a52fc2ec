"""Shapes of latent attention for the suite ``mla``, and what caches of them are filled with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DeepseekV3Config, PreTrainedConfig

from hfkv.bench.errors import BenchError
from hfkv.bench.tokens import Tokens

# Names in configs of what `MLAShape` has.
_NAMES = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "latent": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
    "query_latent": "q_lora_rank",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
}


@dataclass(frozen=True)
class MLAShape:
    """Latent attention as DeepSeek-V3's code computes it.

    Attributes:
        hidden: size of the hidden states.
        heads: Hq.
        latent: r, numbers of a token's latent.
        nope, rope, value: of a head's key without and with positions, and of its value.
        query_latent: r of the queries; None where they are projected at once.
        intermediate: the width of a dense MLP.
        layers: how many the whole model has.
    """

    hidden: int
    heads: int
    latent: int
    nope: int
    rope: int
    value: int
    query_latent: int | None
    intermediate: int
    layers: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> MLAShape:
        """The numbers of any model's config.

        Raises:
            BenchError: it has no latent attention, or says its numbers by other names.
        """
        found: dict[str, Any] = {field: getattr(config, name, None) for field, name in _NAMES.items()}
        missing = [_NAMES[field] for field, number in found.items() if not number and field != "query_latent"]
        if missing:
            raise BenchError(
                f"the suite mla is of latent attention, and the config of {config.model_type!r} lacks "
                f"{', '.join(missing)}; take a --shape or another model"
            )
        return cls(**found)

    def config(self, num_layers: int) -> DeepseekV3Config:
        """The config of a model of so many layers, dense MLPs and a small vocabulary."""
        fields = {name: getattr(self, field) for field, name in _NAMES.items()}
        fields |= {"num_hidden_layers": num_layers, "first_k_dense_replace": num_layers, "num_mtp_layers": 0}
        fields |= {"num_key_value_heads": self.heads, "vocab_size": 131, "max_position_embeddings": 131_072}
        return DeepseekV3Config(**fields, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})

    def token_bytes(self, dtype: torch.dtype) -> int:
        """The bytes of one token in one layer's cache."""
        return (self.latent + self.rope) * dtype.itemsize

    def expanded_bytes(self, dtype: torch.dtype) -> int:
        """The bytes of one token's keys and values of all heads, and of what they are put together from."""
        return self.heads * (2 * self.nope + self.rope + self.value) * dtype.itemsize

    def __str__(self) -> str:
        queries = "" if self.query_latent is None else f", queries' {self.query_latent}"
        heads = f"{self.heads} heads of {self.nope} + {self.rope} and {self.value}"
        return f"hidden {self.hidden}, {heads}, latent {self.latent}{queries}"


MLA_SHAPES = {
    "deepseek-v2-lite": MLAShape(2048, 16, 512, 128, 64, 128, None, 10_944, 27),
    "deepseek-v3": MLAShape(7168, 128, 512, 128, 64, 128, 1536, 18_432, 61),
    "mla-tiny": MLAShape(128, 4, 64, 32, 16, 32, 48, 128, 2),
}


class LatentTokens(Tokens):
    """Latents and rotary keys of standard normal numbers for one layer, the same for all layers and contenders.

    Args:
        batch: B.
        count: T.
        shape: the shape of the layer.
        dtype: their dtype.
        device: where they are.
        seed: the seed of the numbers.

    Attributes:
        keys, values: the latents `[B, 1, T, r]` and the rotary keys `[B, 1, T, dr]`, as transformers caches them.
    """

    def __init__(
        self, batch: int, count: int, shape: MLAShape, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self.count = count
        generator = torch.Generator(device).manual_seed(seed)
        self.keys, self.values = (
            torch.randn(batch, 1, count, size, dtype=dtype, device=device, generator=generator)
            for size in (shape.latent, shape.rope)
        )
