"""`Rotary`: how a layer's keys are rotated by their positions."""

from __future__ import annotations

import dataclasses

import torch

from hfkv.codecs.waves import rotary_angles


@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation by position of what a layer caches.

    Attributes:
        inv_freq: float64 `[r / 2]`, the angle by which one position turns each pair of dims; negative where the model
            turns the other way. The first r dims of a head are rotated, the others are not.
        interleaved: whether the pairs are the dims (2i, 2i + 1), or else (i, i + r / 2).
        part: which of the cached pair is rotated: ``"key"``, or ``"value"`` where latents are cached as keys and
            the rotary keys as values (MLA).
    """

    inv_freq: torch.Tensor
    interleaved: bool
    part: str = "key"

    def rotate(self, states: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Rotates keys or queries as if they stood some positions further on.

        Args:
            states: `[B, H, T, D]`.
            by: positions, negative ones too; broadcastable to `[B, 1, T]`.

        Returns:
            The rotated states, of the same shape and dtype.
        """
        dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        angles = rotary_angles(self.inv_freq, by, states.device).to(states.device, dtype)
        cos, sin = angles.cos(), angles.sin()
        rotated, rest = states.tensor_split((2 * len(self.inv_freq),), dim=-1)
        # [B, H, T, r / 2, 2] or [B, H, T, 2, r / 2]: where the two dims of a pair are.
        shape, pair = ((-1, 2), -1) if self.interleaved else ((2, -1), -2)
        first, second = rotated.to(dtype).unflatten(-1, shape).unbind(pair)
        rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), pair).flatten(-2)
        return torch.cat((rotated.to(states.dtype), rest), dim=-1)
