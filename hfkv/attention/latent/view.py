"""`LatentView`: keys or values that stand for latents not expanded yet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hfkv.attention.latent.projection import Widths
from hfkv.cache.read_only import ReadOnly
from hfkv.cache.snapshot import HeldTokens, Part
from hfkv.cache.view import KVView, refuse_window


class Latents:
    """What a layer with latent attention holds, and the module that expands it.

    Args:
        module: the attention module of transformers.
        latents, rotary: the views `[B, 1, T, r]` and `[B, 1, T, dr]` that the cache returned.
        say: takes what the model's owner should know, once.
    """

    def __init__(self, module: Any, latents: KVView, rotary: KVView, say: Callable[[str], None]) -> None:
        self.module, self.latents, self.rotary, self.say = module, latents, rotary, say
        self.widths = Widths.of(module)

    @property
    def held(self) -> HeldTokens:
        """The tokens: latents as keys, rotary keys as values."""
        held = self.latents.held
        assert isinstance(held, HeldTokens)
        return held

    @property
    def is_followed(self) -> bool:
        """Whether autograd follows what was cached: a backward pass must find the edge that raises."""
        return self.latents.requires_grad or self.rotary.requires_grad

    def decoded(self) -> dict[Part, torch.Tensor]:
        """The latents as plain keys, and the rotary keys as plain values."""
        return {"key": self.latents.decoded(), "value": self.rotary.decoded()}

    @functools.cached_property
    def expanded(self) -> dict[Part, torch.Tensor]:
        """Keys `[B, H, T, dn + dr]` and values `[B, H, T, dv]` of all tokens, by the module's own code."""
        key, value = type(self.module).expand_kv(self.module, *self.decoded().values())
        return {"key": key, "value": value}


class LatentView(ReadOnly):
    """Keys or values of every head: any torch operation expands all of them, as the model would have."""

    source: Latents
    part: Part

    @staticmethod
    def __new__(cls, source: Latents, part: Part, heads: int) -> LatentView:
        widths = source.widths
        width = widths.nope + widths.rotary if part == "key" else widths.value
        batch, _, count, _ = source.latents.shape
        view = torch.Tensor._make_wrapper_subclass(
            cls, (batch, heads, count, width), dtype=source.latents.dtype, device=source.latents.device
        )
        view.source, view.part = source, part
        return view

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"LatentView({self.part}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @property
    def held(self) -> HeldTokens:
        """The latents behind it."""
        return self.source.held

    def decoded(self) -> torch.Tensor:
        """The plain tensor, for code that applies the window itself."""
        return self.source.expanded[self.part]

    def plain(self) -> torch.Tensor:
        """The keys or values of all heads, for code that knows nothing of windows."""
        refuse_window(self.held)
        return self.decoded()


def latent_views(
    module: Any, latents: torch.Tensor, rotary: torch.Tensor, say: Callable[[str], None]
) -> tuple[LatentView, LatentView] | None:
    """The keys and values that stand for what a cache returned; None where that is not the latents of one layer."""
    if not isinstance(latents, KVView) or not isinstance(rotary, KVView) or latents.held is not rotary.held:
        return None
    if (latents.part, rotary.part) != ("key", "value") or not isinstance(latents.held, HeldTokens):
        return None
    source = Latents(module, latents, rotary, say)
    if source.is_followed and not source.held.is_windowed:
        return None  # code between here and the attention would lose the edge that raises
    heads = _num_heads(module, source)
    return LatentView(source, "key", heads), LatentView(source, "value", heads)


def _num_heads(module: Any, source: Latents) -> int:
    """The number of heads in this process: in a shard, fewer than in the config."""
    linear, widths = module.kv_b_proj, source.widths
    linear = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
    weight, count = linear._parameters.get("weight"), getattr(linear, "out_features", None)
    if weight is not None and weight.dim() == 2 and weight.shape[1] == widths.latent:
        count = len(weight.to_local() if hasattr(weight, "device_mesh") else weight)
    return module.config.num_attention_heads if count is None else count // (widths.nope + widths.value)
