"""`ExpertStack`: the parameter of a layer's experts, kept in another form than a plain tensor."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_leaves, tree_map_only

from hfkv.experts.weights import ExpertWeights
from hfkv.models.proxy import Proxy

logger = logging.getLogger("hfkv")

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class ExpertStack(Proxy):
    """Stands for the weights of all experts of a layer, in the model's own layout, as one parameter.

    The ``hfkv`` experts read `weights`. Any other code sees an ordinary tensor, decoded when it is read (one expert
    alone where it asks for ``stack[e]``), and what it writes (an adapter merged, a checkpoint loaded) is written to
    `weights`. Writing to a slice of it is lost, ``stack[e] = matrix`` is not.

    Attributes:
        weights: what is kept, as matrices `[outputs, inputs]`.
        is_transposed: whether the model's own layout is `[E, inputs, outputs]`.
    """

    weights: ExpertWeights
    is_transposed: bool

    @staticmethod
    def __new__(cls, weights: ExpertWeights, is_transposed: bool = False, **unknown: Any) -> ExpertStack:
        if unknown or not isinstance(weights, ExpertWeights):
            raise TypeError(
                "experts that hfkv keeps cannot be put away or dispatched by accelerate: do that first, then hfkv.patch"
            )
        experts, outputs, inputs = weights.shape
        stack = torch.Tensor._make_wrapper_subclass(
            cls,
            (experts, inputs, outputs) if is_transposed else (experts, outputs, inputs),
            dtype=weights.dtype,
            device=weights.device,
            requires_grad=False,
        )
        stack.weights, stack.is_transposed = weights, is_transposed
        return stack

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"ExpertStack({self.weights.form}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def plain(self) -> torch.Tensor:
        return self._turned(self.weights.read_all()).contiguous()

    def _turned(self, matrices: torch.Tensor) -> torch.Tensor:
        """Turns matrices between the model's layout and that of `weights`."""
        return matrices.transpose(-2, -1) if self.is_transposed else matrices

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, ExpertStack):
            if func in _ALIASES:
                return ExpertStack(first.weights, first.is_transposed)
            if func in _COPIES:
                return first._copied(kwargs.get("device"), kwargs.get("dtype"))
            if func is torch.ops.aten.select.int and args[1] == 0:
                matrix = first.weights.decode(first._index(args[2]))
                return first._turned(matrix.clone() if first.weights.form == "plain" else matrix)
            if func is torch.ops.aten.copy_.default and _is_alike(first, args[1]):
                # As they are: writing few bytes again would round them again.
                first.weights.take(args[1].weights)
                first._note_write()
                return first
        if func._schema.is_mutable and (written := _written(func, args, kwargs)):
            plains = {id(stack): stack.plain() for stack in written}
            result = func(*_with(plains, args), **_with(plains, kwargs))
            for stack in written:
                stack._write_all(plains[id(stack)])
            return written[0] if isinstance(result, torch.Tensor) else result
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} experts, and no {index}")
        return index % len(self)

    def _write_all(self, whole: torch.Tensor) -> None:
        if self.weights.is_lossy:
            logger.warning("weights of experts are written as %s again, which rounds them again", self.weights.form)
        self.weights.write_all(self._turned(whole))
        self._note_write()

    def _note_write(self) -> None:
        # Below autograd, where operations on this tensor end up, torch counts no writes.
        increment_version(list(self.weights.planes().values()))

    def _copied(self, device: Any = None, dtype: Any = None) -> ExpertStack:
        device = self.device if device is None else torch.device(device)
        return ExpertStack(self.weights.to(device, dtype or self.dtype), self.is_transposed)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0):
            self.weights.write(self._index(int(index)), self._turned(torch.as_tensor(value)))
            self._note_write()
            return
        plain = self.plain()
        plain[index] = value
        self._write_all(plain)

    @property
    def data(self) -> torch.Tensor:
        return ExpertStack(self.weights, self.is_transposed)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, ExpertStack):
            torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            self.weights, self.is_transposed = value.weights, value.is_transposed
        else:
            self._write_all(value)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        copied = as_parameter(self._copied(), self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.weights, self.is_transposed, self.requires_grad)

    # What says whether weights are the same as before looks behind a tensor through these two.
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [f"plane_{name}" for name in self.weights.planes()], None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("plane_"):
            return self.weights.planes()[name.removeprefix("plane_")]
        raise AttributeError(f"an ExpertStack has no attribute {name!r}")


def _is_alike(one: ExpertStack, other: Any) -> bool:
    is_same = isinstance(other, ExpertStack) and type(one.weights) is type(other.weights)
    return is_same and one.weights.can_take(other.weights)


def as_parameter(stack: ExpertStack, requires_grad: bool) -> nn.Parameter:
    """Makes `stack` a module's parameter."""
    return nn.Parameter(stack, requires_grad=requires_grad)


def _rebuild(weights: ExpertWeights, is_transposed: bool, requires_grad: bool) -> nn.Parameter:
    return as_parameter(ExpertStack(weights, is_transposed), requires_grad)


def _written(func: Any, args: Any, kwargs: Any) -> list[ExpertStack]:
    """The stacks that `func` writes to."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_leaves(given) if isinstance(leaf, ExpertStack)]
    return found


def _with(plains: dict[int, torch.Tensor], given: Any) -> Any:
    """Copies `given` with plain tensors instead of stacks, taken from `plains` where they are there."""
    return tree_map_only(Proxy, lambda stack: plains[id(stack)] if id(stack) in plains else stack.plain(), given)
