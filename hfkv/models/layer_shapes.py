"""Shapes by name of what one layer has besides plain heads: latent attention, and experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import DeepseekV3Config, PreTrainedConfig

from hfkv.policy.errors import RequestError


class MLAShape(NamedTuple):
    """Latent attention as DeepSeek-V3's code computes it, each number by its name in configs."""

    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None  # None where queries are projected at once
    intermediate_size: int
    num_hidden_layers: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> MLAShape:
        """The numbers of any model's config.

        Raises:
            RequestError: it has no latent attention, or says its numbers by other names.
        """
        found = {name: getattr(config, name, None) for name in cls._fields}
        missing = [name for name, number in found.items() if not number and name != "q_lora_rank"]
        if missing:
            raise RequestError(
                f"the suite mla is of latent attention, and the config of {config.model_type!r} lacks "
                f"{', '.join(missing)}; take a --shape or another model"
            )
        return cls(**found)  # type: ignore[arg-type]

    def config(self, num_layers: int) -> DeepseekV3Config:
        """The config of a model of so many layers, dense MLPs and a small vocabulary."""
        fields = {**self._asdict(), "num_key_value_heads": self.num_attention_heads, "vocab_size": 131}
        fields |= {"num_hidden_layers": num_layers, "first_k_dense_replace": num_layers, "num_mtp_layers": 0}
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        return DeepseekV3Config(**fields, max_position_embeddings=131_072, rope_parameters=rope)

    def token_bytes(self, dtype: torch.dtype) -> int:
        """The bytes of one token in one layer's cache."""
        return (self.kv_lora_rank + self.qk_rope_head_dim) * dtype.itemsize

    def expanded_bytes(self, dtype: torch.dtype) -> int:
        """The bytes of one token's keys and values of all heads, and of what they are put together from."""
        head = 2 * self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return self.num_attention_heads * head * dtype.itemsize

    def __str__(self) -> str:
        queries = "" if self.q_lora_rank is None else f", queries' {self.q_lora_rank}"
        heads = f"{self.num_attention_heads} heads of {self.qk_nope_head_dim} + {self.qk_rope_head_dim}"
        return f"hidden {self.hidden_size}, {heads} and {self.v_head_dim}, latent {self.kv_lora_rank}{queries}"


class MoEShape(NamedTuple):
    """The sizes of one layer of experts: H, I of one expert, E, and K, the experts a token chooses."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def expert_size(self) -> int:
        """Numbers of one expert's weights."""
        return 3 * self.hidden * self.intermediate

    def __str__(self) -> str:
        return f"H {self.hidden}, I {self.intermediate}, E {self.experts}, K {self.top_k}"


MLA_SHAPES = {
    "deepseek-v2-lite": MLAShape(2048, 16, 512, 128, 64, 128, None, 10_944, 27),
    "deepseek-v3": MLAShape(7168, 128, 512, 128, 64, 128, 1536, 18_432, 61),
    "mla-tiny": MLAShape(128, 4, 64, 32, 16, 32, 48, 128, 2),
}
MOE_SHAPES = {
    "moe-small": MoEShape(1024, 2048, 16, 2),
    "qwen3-30b-a3b": MoEShape(2048, 768, 128, 8),
    "mixtral-8x7b": MoEShape(4096, 14_336, 8, 2),
    "moe-tiny": MoEShape(128, 192, 8, 2),
}
