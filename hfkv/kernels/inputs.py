"""Arguments of kernels: encoded planes, the tokens that queries see, and the treatment of scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from hfkv.codecs import Codec
from hfkv.kernels.placed_mean import PlacedMean


class Encoded(NamedTuple):
    """The keys or the values of a layer, as a codec wrote them.

    Attributes:
        codec: codec that wrote them.
        planes: planes `[B, H, C, d_i]` or, in pages, `[N, H, P, d_i]`; the data first.
        head_dim: width D of a decoded row.
        mean: what was taken off keys before they were encoded; None where nothing was.
    """

    codec: Codec
    planes: tuple[torch.Tensor, ...]
    head_dim: int
    mean: PlacedMean | None = None


@dataclass(frozen=True, eq=False)
class Visibility:
    """Says which of the held tokens each query attends to.

    Of the `length` tokens of a `Layout`, those from index `first` on are looked at. The one at index i stands at
    position ``pads[b] + i`` where ``i < num_slots`` (an attention sink in its slot, which is filled only if that
    position is below `held_from`), else at ``held_from + i - num_slots``. Query n of q stands at ``t = seen - q + n``
    and sees position j where ``pads[b] <= j <= t`` and (``j >= bounds[b, n]`` or ``j < pads[b] + sinks``). Queries
    that see nothing (padding, rows of nothing but padding) get zeros.

    Attributes:
        seen: number of tokens since the start, the queries' own included.
        first: index of the first token looked at.
        held_from: oldest position held behind the slots.
        num_slots: number of slots in front of the newest tokens.
        sinks: number of positions that every query of a row sees, counted from its first real token.
        pads: number of pad tokens before each row's first real one, for B rows.
        bounds: lowest position that each query sees, sinks apart, int64 `[B or 1, q]`; None without a lower bound.
        mask: bool `[B or 1, 1 or Hq, q, length - first]`: tokens that are seen, in place of all of the above; None as a
            rule.
    """

    seen: int
    pads: tuple[int, ...]
    first: int = 0
    held_from: int = 0
    num_slots: int = 0
    sinks: int = 0
    bounds: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def of(self, begin: int, end: int) -> Visibility:
        """The visibility of the tokens `begin .. end - 1` alone, counted from the first of them.

        Slots that are looked at must all be among them, or none.
        """
        if begin == 0 and self.mask is None:
            return self
        first = max(self.first, begin)
        mask = None if self.mask is None else self.mask[..., first - self.first : max(end - self.first, 0)]
        if begin == 0:
            return replace(self, mask=mask)
        return replace(
            self,
            first=first - begin,
            held_from=self.held_from + begin - self.num_slots,
            num_slots=0,
            mask=mask,
        )


@dataclass(frozen=True)
class Scoring:
    """The treatment of attention scores.

    Attributes:
        scale: factor on the scores.
        softcap: bound of a tanh on the scores, or None.
        sink_logits: one logit a head that takes weight and has no value (gpt_oss), `[Hq]`, or None.
        dropout: probability that a weight is dropped; kernels take 0 only.
        weights: whether the weights are wanted; kernels do not give them.
    """

    scale: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    dropout: float = 0.0
    weights: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether scaled_dot_product_attention does all of it."""
        return self.softcap is None and self.sink_logits is None and not self.weights
