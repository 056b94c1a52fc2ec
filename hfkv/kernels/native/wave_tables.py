"""`WaveTables`: the cosines and sines by which native attention turns the mean that was taken off keys."""

from __future__ import annotations

from array import array
from weakref import WeakKeyDictionary

import torch

from hfkv.codecs.waves import Waves, rotary_angles
from hfkv.kernels.placed_mean import PlacedMean

# Positions looked at together, and nodes, Chebyshev's, from which the sums of what turns slowly are interpolated.
_TILE, _NODES = 64, 16
_MIDDLE = (_TILE - 1) / 2
# The most that a pair turns from the middle to an end, as an angle, to be interpolated: to 7e-8, which is float32's own
# precision (5.0: 1.6e-7, 5.5: 7e-7).
_SLOW = 4.75
_LEAST_TURNS = 64


class WaveTables:
    """The numbers that ``key_mean.h`` reads.

    Args:
        waves: the rotation.
        num_turns: number of multiples of 64 positions to have, from 0 on; those below 0 are the same ones.

    Attributes:
        head: the number of pairs, of those in front that only fill up a vector, of slow ones (those too) and of turns;
            then the indices of the first numbers of all pairs, and those of the second ones. Pairs are in the order of
            their angles, slow ones first.
        numbers: float32, one behind the other: of each other pair its cosines and sines at the positions behind the
            middle, and what even and odd sums at each node are multiplied by there, `[fast + 8, 2, 32]`; of each slow
            pair, the cosine and the sine at each node in turn, `[slow, 16]`; cosines and sines of 0 to 63 positions
            and half a tile, `[64, 2, pairs]`; those of the turns, `[num_turns, 2, pairs]`.
    """

    def __init__(self, waves: Waves, num_turns: int) -> None:
        self.num_turns = num_turns
        order = waves.inv_freq.abs().argsort()
        num_fillers = -len(order) % _NODES
        angles = torch.cat((torch.zeros(num_fillers), waves.inv_freq[order]))
        num_slow = int((angles.abs() * _MIDDLE <= _SLOW).sum()) // 2 * 2
        first, second = ([0] * num_fillers + index[order].tolist() for index in waves.pairs())
        self.head = array("q", (len(angles), num_fillers, num_slow, num_turns, *first, *second))
        behind = torch.arange(_TILE // 2, dtype=torch.float64) + 0.5
        at = _MIDDLE * torch.cos((2 * torch.arange(_NODES // 2, dtype=torch.float64) + 1) * torch.pi / (2 * _NODES))
        parts = (
            torch.cat((_waves(angles[num_slow:], behind).permute(2, 1, 0), _interpolated(at, behind))),
            _waves(angles[:num_slow], at).permute(2, 0, 1),
            _waves(angles, torch.arange(_TILE) + _MIDDLE),
            _waves(angles, torch.arange(num_turns) * _TILE),
        )
        self.numbers = torch.cat([part.flatten() for part in parts]).float()

    @classmethod
    def of(cls, waves: Waves, reach: int) -> WaveTables:
        """The tables of a rotation for positions below `reach`, kept as long as that is there.

        Args:
            waves: the rotation.
            reach: number of positions on either side of 0.
        """
        known, needed = _known.get(waves), reach // _TILE + 2
        if known is None or known.num_turns < needed:
            # A step asks for one position more than the step before.
            num_turns = max(needed, _LEAST_TURNS if known is None else 2 * known.num_turns)
            with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                known = _known[waves] = cls(waves, num_turns)
        return known

    @classmethod
    def placed(cls, mean: PlacedMean, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the native code is told of a mean, besides its vector.

        Args:
            mean: the mean of the keys of a layer.
            batch: number of rows.
            length: number of held tokens.

        Returns:
            `head`, the number of slots and the rows' shifts, int64; and `numbers`.

        Raises:
            ValueError: the mean is not one of so many rows, or some slots are at other positions.
        """
        if len(mean.shifts) != batch or mean.slots is not None:
            what = f"of {len(mean.shifts)} rows" if mean.slots is None else "with slots elsewhere"
            raise ValueError(f"native kernels take a mean of {batch} rows, slot i at position i, got one {what}")
        shifts = mean.shifts
        reach = max(mean.num_slots, max(shifts) + length, -min(shifts))
        tables = cls.of(mean.mean.waves, reach)
        places = tables.head + array("q", (mean.num_slots, *shifts))
        return torch.frombuffer(places, dtype=torch.int64), tables.numbers


_known: WeakKeyDictionary[Waves, WaveTables] = WeakKeyDictionary()


def _waves(angles: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Cosines and sines at positions, float64 `[n, 2, pairs]`."""
    found = rotary_angles(angles, positions, torch.device("cpu"))
    return torch.stack((found.cos(), found.sin()), dim=1)


def _interpolated(nodes: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """By what the values of even and of odd functions at nodes are multiplied to have them elsewhere.

    Args:
        nodes: those above 0, float64 `[m]`; there are the same ones below.
        at: float64 `[n]`.

    Returns:
        float64 `[m, 2, n]`: of even functions, and of odd ones.
    """
    # Lagrange's polynomials of all nodes, `[2 m, n]`.
    every = torch.cat((nodes, -nodes))
    apart, others = at - every[:, None], every[:, None] - every
    found = torch.stack(
        [
            (torch.cat((apart[:i], apart[i + 1 :])) / torch.cat((others[i, :i], others[i, i + 1 :]))[:, None]).prod(0)
            for i in range(len(every))
        ]
    )
    above, below = found.chunk(2)
    return torch.stack((above + below, above - below), dim=1)
