"""`Waves`: the cosines and sines by which a rotation by position turns a row."""

from __future__ import annotations

import math

import torch

# Positions for which cosines and sines are worked out together.
_BLOCK = 64


class Waves:
    """The cosines and sines of a rotation, one of each for every number of a row.

    A row x of position 0 is ``x * cos + across(x) * sin`` at another position. Layers that rotate alike share one of
    these, and what it has worked out.

    Args:
        inv_freq: float64 `[r / 2]`, the angle by which one position turns each pair of numbers. The first r numbers of
            a row are turned, the others are not.
        interleaved: whether the pairs are the numbers (2i, 2i + 1), or else (i, i + r / 2).
        head_dim: width D of a row.
    """

    def __init__(self, inv_freq: torch.Tensor, interleaved: bool, head_dim: int) -> None:
        self.inv_freq = inv_freq.detach().to("cpu", torch.float64)
        self.interleaved, self.head_dim = interleaved, head_dim
        # The last ranges asked for: first and last position, device, cosines and sines.
        self._known: list[tuple[int, int, torch.device, torch.Tensor, torch.Tensor]] = []

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_known": []}

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The index of the first and of the second number of each pair, int64 `[r / 2]`."""
        index = torch.arange(len(self.inv_freq))
        return (2 * index, 2 * index + 1) if self.interleaved else (index, index + len(index))

    def across(self, rows: torch.Tensor) -> torch.Tensor:
        """Gives rows `[..., D]` with the numbers of each pair in each other's place, the first negative; else zeros."""
        first, second = self.pairs()
        out = torch.zeros_like(rows)
        out[..., first], out[..., second] = -rows[..., second], rows[..., first]
        return out

    def at(self, first: int, last: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and the sines at the positions `first .. last - 1`, negative ones too, float32 `[n, D]` each."""
        for low, high, where, cos, sin in self._known:
            if low <= first and last <= high and where == device:
                return cos[first - low : last - low], sin[first - low : last - low]
        low = first // _BLOCK * _BLOCK
        # A step asks for one position more than the step before.
        high = (last + (last - first) // 4 + _BLOCK) // _BLOCK * _BLOCK
        with torch.inference_mode(False), torch.no_grad():
            found = self.of(torch.arange(low, high), device)
        self._known = [(low, high, device, *found), *self._known[:1]]
        return self.at(first, last, device)

    def of(self, positions: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and the sines at any positions `[...]`, float32 `[..., D]` each; not kept."""
        angles = rotary_angles(self.inv_freq, positions.cpu(), torch.device("cpu"))
        cos, sin = torch.ones(*positions.shape, self.head_dim), torch.zeros(*positions.shape, self.head_dim)
        for index in self.pairs():
            cos[..., index], sin[..., index] = angles.cos().float(), angles.sin().float()
        return cos.to(device), sin.to(device)


def rotary_angles(inv_freq: torch.Tensor, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The angles at some positions, exact however large those are.

    Args:
        inv_freq: `[r / 2]`.
        positions: `[...]`.
        device: where the angles are wanted.

    Returns:
        float64 `[..., r / 2]` between 0 and 2 pi, on `device`, or on the CPU where that has no float64.
    """
    if device.type == "mps":
        device = torch.device("cpu")
    angles = positions.to(device, torch.float64)[..., None] * inv_freq.to(device, torch.float64)
    return angles.remainder(2 * math.pi)
