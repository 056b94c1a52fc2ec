"""`Int4Weights`: experts in four bits, except the outputs that would lose most, which have eight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from hfkv.experts.int4_fit import GROUP, fit
from hfkv.experts.int8 import Int8Weights
from hfkv.experts.weights import ExpertWeights, aligned, check_matrix
from hfkv.kernels.experts.codes import Codes
from hfkv.kernels.experts.crossover import can_decode, is_native
from hfkv.kernels.native.experts import expert_numbers, expert_products
from hfkv.kernels.native.library import library, processor

# One output in twenty is kept in eight bits, and the four-bit ones are a multiple of what kernels take at once: 4.7
# bits a number. The relative error of Gaussian experts is 11.8 %, against 12.1 % without, at 4.5 bits.
_INT4_SHARE = (19, 20)
_OUTPUTS = 16
# Rows that torch's order never mixes with others, a multiple of its blocks.
_BLOCK = 256
_FEW = 4
BYTES, TORCH = "bytes", "torch"
_PLANES = ("nibbles", "groups", "units", "columns", "last_columns")
_REST = "rest_"

_Turn = Callable[[torch.Tensor], torch.Tensor]


class Int4Weights(ExpertWeights):
    """Nibbles with a step and a centre for 32 neighbouring inputs, beside `Int8Weights` for a few outputs.

    Attributes:
        nibbles: uint8 `[E, N4, Kp / 2]`; in group g, byte j holds inputs 32 g + j (low) and 32 g + 16 + j (high).
        order: `BYTES` for that, or `TORCH` for the order of torch's own product on a CPU: where there are no native
            kernels or no AVX-512, and in the slots and files of offloaded experts.
        groups: int8 `[E, Kp / 32, N4, 2]`, step and centre, in units.
        units: bfloat16 `[E, N4, 2]`, the units of both for each output.
        rest: the other outputs, in eight bits.
        columns: which output each row is, int16 or int32 `[E, N4]`; `last_columns` the same of `rest`, `[E, N - N4]`.
    """

    form = "int4"
    is_lossy = True

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, *, order: str | None = None
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.order = _order_on(device, order)
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
        if x.device.type != "cpu":
            return F.linear(x, self.decode(expert).to(x.dtype))
        if self.order == BYTES and is_native("int4", x):
            out = x.new_empty(len(x), self.shape[1])
            for planes in self._parts():
                expert_products(x, out, expert, **planes)
            return out
        # Torch's product of four bits takes hundreds of times as long in float32 as in bfloat16.
        if self.order == BYTES or (x.dtype != torch.bfloat16 and x.shape[0] > _FEW):
            return F.linear(x, self._numbers(expert, x.dtype))
        outputs = torch.empty(x.shape[0], self.shape[1], dtype=x.dtype)
        outputs[:, self._outputs(expert)] = self._products(x, expert)
        return outputs

    def _parts(self) -> list[dict[str, torch.Tensor]]:
        """The planes of the outputs in four bits, and of those in eight, as the native kernels take them."""
        int4 = {"weight": self.nibbles, "groups": self.groups, "units": self.units, "columns": self.columns}
        int8 = {"weight": self.rest.int8, "scale": self.rest.scales, "columns": self.last_columns}
        return [part for part in (int4, int8) if part["weight"].shape[1]]

    def _numbers(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """An expert's matrix for a product on a CPU."""
        if self.order == TORCH or not can_decode(dtype):
            return self.decode(expert).to(dtype)
        numbers = torch.empty(self.shape[1:], dtype=dtype)
        for planes in self._parts():
            expert_numbers(numbers, expert, **planes)
        return numbers

    def decode(self, expert: int) -> torch.Tensor:
        unpack = _from_torch_order if self.order == TORCH else _from_bytes
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
            self.nibbles[expert] = _to_torch_order(nibbles) if self.order == TORCH else _to_bytes(nibbles)

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
    def of_planes(cls, planes: dict[str, torch.Tensor], dtype: torch.dtype, *, order: str | None = None) -> Int4Weights:
        """The weights written from `portable_planes`, in `order`, or in the one that is read fastest here."""
        weights = object.__new__(cls)
        rest = {name.removeprefix(_REST): plane for name, plane in planes.items() if name.startswith(_REST)}
        weights.rest = Int8Weights.of_planes(rest, dtype)
        for name in _PLANES:
            setattr(weights, name, aligned(planes[name]))
        experts, num_int4 = weights.columns.shape
        weights.shape = (experts, num_int4 + weights.rest.shape[1], weights.rest.shape[2])
        weights.dtype = dtype
        weights.order = _order_on(weights.nibbles.device, order)
        if weights.order == TORCH:
            for expert, packed in enumerate(weights.nibbles):
                weights.nibbles[expert] = _to_torch_order(_from_bytes(packed))
        return weights

    def portable_planes(self) -> dict[str, torch.Tensor]:
        """The `planes` in an order that no processor decides."""
        return {**self.planes(), "nibbles": self._turned(TORCH, _from_torch_order, _to_bytes)}

    def cpu_planes(self) -> dict[str, torch.Tensor]:
        """The `planes` in the order of torch's product on this CPU."""
        return {**self.planes(), "nibbles": self._turned(BYTES, _from_bytes, _to_torch_order)}

    def _turned(self, order: str, unpack: _Turn, pack: _Turn) -> torch.Tensor:
        if self.order != order or not self.nibbles.numel():
            return self.nibbles
        return torch.stack([pack(unpack(packed)) for packed in self.nibbles])

    def __getstate__(self) -> dict[str, Any]:
        # In an order that whoever reads it knows, on another processor or without native kernels.
        return {"planes": self.portable_planes(), "dtype": self.dtype, "shape": self.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "planes" in state:
            self.__dict__ = dict(vars(Int4Weights.of_planes(state["planes"], state["dtype"])), shape=state["shape"])
        else:  # as it was written when torch's order was a CPU's only one
            self.__dict__ = dict(state, order=TORCH if state["nibbles"].device.type == "cpu" else BYTES)

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


def _order_on(device: torch.device, order: str | None) -> str:
    """The order on a device: the given one, or on a CPU that of the products that are the fastest there."""
    if device.type != "cpu":
        return BYTES
    # With narrower vectors than AVX-512's the native products of int4 take ten times as long.
    return order or (BYTES if library() is not None and "avx512f" in processor() else TORCH)


def _to_bytes(nibbles: torch.Tensor) -> torch.Tensor:
    """Packs uint8 `[N, K]`, 0 to 15, into `[N, K / 2]` bytes."""
    low, high = nibbles.view(nibbles.shape[0], -1, 2, GROUP // 2).unbind(2)
    return (low | (high << 4)).flatten(1)


def _from_bytes(packed: torch.Tensor) -> torch.Tensor:
    if not packed.numel():
        return packed.new_empty(packed.shape[0], packed.shape[1] * 2)
    halves = packed.view(packed.shape[0], -1, 1, GROUP // 2)
    return torch.cat([halves & 15, halves >> 4], dim=2).flatten(1)


def _to_torch_order(nibbles: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)


def _from_torch_order(packed: torch.Tensor) -> torch.Tensor:
    parts = [packed.new_empty(0, packed.shape[1] * 2)]
    for part in packed.split(_BLOCK) if packed.numel() else ():
        nibbles = torch.stack([part & 15, part >> 4], dim=-1).flatten()
        levels = torch.empty_like(nibbles)
        levels[_torch_places(part.shape[0], part.shape[1] * 2)] = nibbles
        parts.append(levels.view(part.shape[0], -1))
    return torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _torch_places(rows: int, inputs: int) -> torch.Tensor:
    """Finds where each nibble of a few rows comes from: indices are sent through the processor's order."""
    with torch.inference_mode(False):
        index = torch.arange(rows * inputs).view(rows, inputs)
        places = torch.zeros(rows * inputs, dtype=torch.long)
        for shift in range(0, (rows * inputs).bit_length(), 4):
            packed = _to_torch_order((index >> shift) & 15)
            places |= torch.stack([packed & 15, packed >> 4], dim=-1).flatten().long() << shift
    return places
