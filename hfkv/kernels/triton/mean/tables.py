"""`mean_arguments`: the mean that was taken off keys, and the cosines and sines by which kernels turn it."""

from __future__ import annotations

import functools
from weakref import WeakKeyDictionary

import torch

from hfkv.codecs.waves import Waves, rotary_angles
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.placed_mean import PlacedMean
from hfkv.kernels.triton.tiling import padded

# Positions from one turn to the next: the fewest tokens of a tile.
TURN = 16
# Positions that tables have at least: those of the longest tile, from any place of a turn on.
_LEAST = 1024


class MeanTables:
    """The cosines and sines of a rotation, at positions from -`before` on.

    Args:
        waves: the rotation.
        before, behind: numbers of positions below 0, a multiple of 16, and from there on.
        device: where they are read.
        dtype: dtype of a product's factors.

    Attributes:
        waves: at each position from 0 on, and in front of it in memory at those below: `[behind, 2, F]` of `dtype`,
            where F is the number of pairs, padded with zeros to a power of two, 16 or more.
        turns: the same at every 16th position, float32.
    """

    def __init__(self, waves: Waves, before: int, behind: int, device: torch.device, dtype: torch.dtype) -> None:
        self.before, self.behind = before, behind
        angles = rotary_angles(waves.inv_freq, torch.arange(-before, behind, device=device), device)
        found = torch.stack((angles.cos(), angles.sin()), dim=1).float().to(device)
        found = torch.nn.functional.pad(found, (0, padded(found.shape[2]) - found.shape[2]))
        self.waves, self.turns = found.to(dtype)[before:], found[::TURN].contiguous()[before // TURN :]

    @classmethod
    def of(cls, waves: Waves, low: int, high: int, device: torch.device, dtype: torch.dtype) -> MeanTables:
        """The tables of a rotation for the positions `low .. high - 1`, kept as long as that is there."""
        of_waves = _known.setdefault(waves, {})
        known = of_waves.get((device, dtype))
        if known is None or known.before < -low or known.behind < high:
            # A step asks for one position more than the step before.
            before, behind = (0, _LEAST) if known is None else (known.before, known.behind)
            before = before if before >= -low else padded(-low, TURN)
            behind = behind if behind >= high else padded(high, _LEAST)
            with torch.inference_mode(False), torch.no_grad():
                known = of_waves[device, dtype] = cls(waves, before, behind, device, dtype)
        return known


_known: WeakKeyDictionary[Waves, dict[tuple[torch.device, torch.dtype], MeanTables]] = WeakKeyDictionary()


def mean_arguments(
    keys: Encoded, mean: PlacedMean, batch: int, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, bool]:
    """Gives what the attention operator takes of a mean.

    Args:
        keys: the keys of a layer.
        mean: their mean.
        batch: number of rows.
        length: number of held tokens.
        dtype: dtype of the queries.

    Returns:
        The vector, float32 `[H, D]`; `waves` and `turns` of `MeanTables`; the number of slots and the rows' shifts,
        int32 `[1 + B]`; the number of pairs, and whether they lie side by side.

    Raises:
        ValueError: the mean is not one of these keys or of so many rows, or some slots are at other positions.
        RuntimeError: a CUDA graph is being captured: it would replay the positions of this call for ever.
    """
    if len(mean.shifts) != batch or mean.slots is not None:
        what = f"of {len(mean.shifts)} rows" if mean.slots is None else "with slots elsewhere"
        raise ValueError(f"Triton kernels take a mean of {batch} rows, slot i at position i, got one {what}")
    vector, shifts, stream = mean.mean.vector, mean.shifts, 0
    data = keys.planes[0]
    if vector.shape != (data.shape[1], keys.head_dim) or vector.device != data.device:
        raise ValueError(
            f"a mean of shape {tuple(vector.shape)} on {vector.device} is not one of {data.shape[1]} kv heads of "
            f"{keys.head_dim} dimensions on {data.device}"
        )
    if vector.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a captured graph does not follow the positions of keys less their mean: attend eagerly")
        stream = torch.cuda.current_stream(vector.device).cuda_stream
    waves, high = mean.mean.waves, max(mean.num_slots, max(shifts) + length, 1)
    # Products of half precision are of float16: it has more bits than bfloat16, and the range of these.
    factor_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    tables = MeanTables.of(waves, min(shifts), high, vector.device, factor_dtype)
    places = _places(mean.num_slots, shifts, vector.device, stream)
    return vector, tables.waves, tables.turns, places, len(waves.inv_freq), waves.interleaved


@functools.lru_cache(maxsize=64)
def _places(num_slots: int, shifts: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    """The number of slots and the rows' shifts, int32 `[1 + B]`: the layers of a step share one upload of a stream."""
    with torch.inference_mode(False):
        places = torch.tensor((num_slots, *shifts), dtype=torch.int32)
        return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places.to(device)
