"""`Int4Weights`: experts in four bits, except the outputs that would lose most, which have eight."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from hfkv.experts.int4_fit import GROUP, fit
from hfkv.experts.int8 import Int8Weights
from hfkv.experts.weights import ExpertWeights, aligned, check_matrix
from hfkv.kernels.experts.codes import Codes

# One output in twenty is kept in eight bits, and the four-bit ones are a multiple of what kernels take at once: 4.7
# bits a number. The relative error of Gaussian experts is 11.8 %, against 12.1 % without, at 4.5 bits.
_INT4_SHARE = (19, 20)
_OUTPUTS = 16
# Rows that torch's order never mixes with others, a multiple of its blocks.
_BLOCK = 256
_FEW = 4
_PLANES = ("nibbles", "groups", "units", "columns", "last_columns")
_REST = "rest_"


class Int4Weights(ExpertWeights):
    """Nibbles with a step and a centre for 32 neighbouring inputs, beside `Int8Weights` for a few outputs.

    Attributes:
        nibbles: uint8 `[E, N4, Kp / 2]`; in group g, byte j holds inputs 32 g + j (low) and 32 g + 16 + j (high). On a
            CPU they are in the order of torch's own product instead.
        groups: int8 `[E, Kp / 32, N4, 2]`, step and centre, in units.
        units: bfloat16 `[E, N4, 2]`, the units of both for each output.
        rest: the other outputs, in eight bits.
        columns: which output each row is, int16 or int32 `[E, N4]`; `last_columns` the same of `rest`, `[E, N - N4]`.
    """

    form = "int4"
    is_lossy = True

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype = shape, dtype
        experts, outputs, inputs = shape
        num_int4 = outputs * _INT4_SHARE[0] // _INT4_SHARE[1] // _OUTPUTS * _OUTPUTS
        padded = -(-inputs // GROUP) * GROUP
        self.nibbles = torch.zeros(experts, num_int4, padded // 2, dtype=torch.uint8, device=device)
        self.groups = torch.zeros(experts, padded // GROUP, num_int4, 2, dtype=torch.int8, device=device)
        self.units = torch.zeros(experts, num_int4, 2, dtype=torch.bfloat16, device=device)
        self.rest = Int8Weights((experts, outputs - num_int4, inputs), dtype, device)
        index_dtype = torch.int16 if outputs <= 2**15 else torch.int32
        columns = torch.arange(outputs, device=device).to(index_dtype)
        self.columns, self.last_columns = columns[:num_int4].repeat(experts, 1), columns[num_int4:].repeat(experts, 1)

    @property
    def device(self) -> torch.device:
        return self.nibbles.device

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        # Torch's product of four bits takes hundreds of times as long in float32 as in bfloat16.
        is_slow = x.dtype != torch.bfloat16 and x.shape[0] > _FEW
        if x.device.type != "cpu" or is_slow:
            return F.linear(x, self.decode(expert).to(x.dtype))
        outputs = torch.empty(x.shape[0], self.shape[1], dtype=x.dtype)
        outputs[:, self._outputs(expert)] = self._products(x, expert)
        return outputs

    def decode(self, expert: int) -> torch.Tensor:
        unpack = _from_cpu_order if self.device.type == "cpu" else _from_bytes
        levels = unpack(self.nibbles[expert]).float().unflatten(1, (-1, GROUP)) - 8
        steps = (self.groups[expert] * self.units[expert].float()).transpose(0, 1)
        int4 = torch.addcmul(steps[..., 1:], levels, steps[..., :1]).flatten(1)[:, : self.shape[2]]
        rows = torch.cat([int4, self.rest.decode(expert).float()])
        return rows[self._outputs(expert).argsort()].to(self.dtype)

    def write(self, expert: int, matrix: torch.Tensor) -> None:
        check_matrix(self, matrix)
        matrix = matrix.detach().to(self.device, torch.float32)
        num_int4 = self.nibbles.shape[1]
        # Four bits lose a share of each row: the largest rows lose most.
        columns = matrix.square().sum(dim=1).argsort(stable=True)
        int4, int8 = columns[:num_int4].sort().values, columns[num_int4:].sort().values
        self.columns[expert], self.last_columns[expert] = int4, int8
        self.rest.write(expert, matrix[int8])
        if num_int4:
            padding = self.nibbles.shape[2] * 2 - matrix.shape[1]
            nibbles, self.groups[expert], self.units[expert] = fit(F.pad(matrix[int4], (0, padding)))
            self.nibbles[expert] = _to_cpu_order(nibbles) if self.device.type == "cpu" else _to_bytes(nibbles)

    def to(self, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
        planes = self.portable_planes() if self.device.type != device.type else self.planes()
        moved = {name: plane.to(device, copy=True) for name, plane in planes.items()}
        if self.device.type != device.type:
            return Int4Weights.of_planes(moved, dtype)
        weights = object.__new__(Int4Weights)
        weights.__dict__.update(self.__dict__, dtype=dtype, rest=self.rest.to(device, dtype))
        weights.__dict__.update({name: plane for name, plane in moved.items() if not name.startswith(_REST)})
        return weights

    def codes(self) -> tuple[Codes, ...]:
        inputs = self.shape[2]
        parts = (
            Codes(self.nibbles, None, self.groups, self.units, self.columns, inputs),
            Codes(self.rest.int8, self.rest.scales, None, None, self.last_columns, inputs),
        )
        return tuple(part for part in parts if part.weight.shape[1])

    def planes(self) -> dict[str, torch.Tensor]:
        rest = {f"{_REST}{name}": plane for name, plane in self.rest.planes().items()}
        return {**{name: getattr(self, name) for name in _PLANES}, **rest}

    @classmethod
    def of_planes(cls, planes: dict[str, torch.Tensor], dtype: torch.dtype) -> Int4Weights:
        """The weights written from `portable_planes`."""
        weights = object.__new__(cls)
        rest = {name.removeprefix(_REST): plane for name, plane in planes.items() if name.startswith(_REST)}
        weights.rest = Int8Weights.of_planes(rest, dtype)
        for name in _PLANES:
            setattr(weights, name, aligned(planes[name]))
        experts, num_int4 = weights.columns.shape
        weights.shape = (experts, num_int4 + weights.rest.shape[1], weights.rest.shape[2])
        weights.dtype = dtype
        weights._order_nibbles()
        return weights

    def portable_planes(self) -> dict[str, torch.Tensor]:
        """The `planes` in an order that no processor decides."""
        return {**self.planes(), "nibbles": self._portable_nibbles()}

    def _portable_nibbles(self) -> torch.Tensor:
        if self.device.type != "cpu" or not self.nibbles.numel():
            return self.nibbles
        return torch.stack([_to_bytes(_from_cpu_order(packed)) for packed in self.nibbles])

    def _order_nibbles(self) -> None:
        """Turns nibbles from the portable order into this device's."""
        if self.device.type == "cpu" and self.nibbles.numel():
            for expert, packed in enumerate(self.nibbles):
                self.nibbles[expert] = _to_cpu_order(_from_bytes(packed))

    def _products(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Computes the outputs on a CPU, in the order of their rows here."""
        rest = self.rest.linear(x, expert)
        if not self.nibbles.shape[1]:
            return rest
        padding = self.nibbles.shape[2] * 2 - x.shape[1]
        x = F.pad(x, (0, padding)) if padding else x
        steps = self.groups[expert] * self.units[expert].to(x.dtype)
        int4 = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.nibbles[expert], GROUP, steps)
        return torch.cat([int4, rest], dim=1)

    def _outputs(self, expert: int) -> torch.Tensor:
        """The output that each row is, the ones in eight bits last."""
        return torch.cat([self.columns[expert], self.last_columns[expert]]).long()


def _to_bytes(nibbles: torch.Tensor) -> torch.Tensor:
    """Packs uint8 `[N, K]`, 0 to 15, into `[N, K / 2]` bytes."""
    low, high = nibbles.view(nibbles.shape[0], -1, 2, GROUP // 2).unbind(2)
    return (low | (high << 4)).flatten(1)


def _from_bytes(packed: torch.Tensor) -> torch.Tensor:
    if not packed.numel():
        return packed.new_empty(packed.shape[0], packed.shape[1] * 2)
    halves = packed.view(packed.shape[0], -1, 1, GROUP // 2)
    return torch.cat([halves & 15, halves >> 4], dim=2).flatten(1)


def _to_cpu_order(nibbles: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)


def _from_cpu_order(packed: torch.Tensor) -> torch.Tensor:
    parts = [packed.new_empty(0, packed.shape[1] * 2)]
    for part in packed.split(_BLOCK) if packed.numel() else ():
        nibbles = torch.stack([part & 15, part >> 4], dim=-1).flatten()
        levels = torch.empty_like(nibbles)
        levels[_cpu_places(part.shape[0], part.shape[1] * 2)] = nibbles
        parts.append(levels.view(part.shape[0], -1))
    return torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _cpu_places(rows: int, inputs: int) -> torch.Tensor:
    """Finds where each nibble of a few rows comes from: indices are sent through the processor's order."""
    with torch.inference_mode(False):
        index = torch.arange(rows * inputs).view(rows, inputs)
        places = torch.zeros(rows * inputs, dtype=torch.long)
        for shift in range(0, (rows * inputs).bit_length(), 4):
            packed = _to_cpu_order((index >> shift) & 15)
            places |= torch.stack([packed & 15, packed >> 4], dim=-1).flatten().long() << shift
    return places
