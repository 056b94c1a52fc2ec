"""`HeldLatents`: the tokens of a layer whose keys are latents and whose values are rotary keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from hfkv.attention.latent.projection import LatentProjection
from hfkv.cache.snapshot import HeldTokens
from hfkv.kernels.dispatch import Kernel, expanded_kernel, latent_kernel


@dataclass(eq=False)
class HeldLatents(HeldTokens):
    """Latents as keys and values both: attention to them is attention to one kv head, in one of two forms.

    Attributes:
        projection: what expands a stretch of latents for the model's own queries; None where queries are absorbed.
    """

    projection: LatentProjection | None = None

    @classmethod
    def of(cls, held: HeldTokens, projection: LatentProjection | None = None) -> HeldLatents:
        """The tokens of `held`, as latents."""
        return cls(**vars(held), projection=projection)

    @property
    def is_latent(self) -> bool:
        """Whether the keys are latents: always."""
        return True

    @property
    def out_dim(self) -> int:
        """The width of what attention gives: r, or dv where latents are expanded."""
        return self.parts["key"].head_dim if self.projection is None else self.projection.widths.value

    def joined(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What absorbed queries meet, `[B, 1, n, r + dr]`, and what is summed, `[B, 1, n, r]`."""
        return torch.cat((keys, values.to(keys.dtype)), dim=-1), keys

    def kernel(self, query: torch.Tensor) -> Kernel:
        """The kernel for absorbed queries, or the one that expands."""
        is_innermost = bool(self.store.tokens_innermost)
        if self.projection is not None:
            expanded = expanded_kernel(query.dtype, query.device, is_innermost, self.codecs.is_pair)
            return expanded._replace(run=expanded.run and partial(expanded.run, expand=self.projection.expand))
        widths = (self.parts["key"].head_dim, self.parts["value"].head_dim)
        return latent_kernel(self.codecs.name, query.dtype, query.device, query.shape[2], widths, is_innermost)
