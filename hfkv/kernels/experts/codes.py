"""`Codes`: what a kernel reads of a stack of expert matrices, as it is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Inputs that share a step and a centre in int4, in as many nibbles of half as many bytes.
GROUP = 32
_CODECS = {torch.int8: "int8", torch.uint8: "int4"}


def codec_of(weight: torch.Tensor) -> str:
    """Gives the codec of expert weights by their dtype: `"none"`, `"int8"` or `"int4"`."""
    return _CODECS.get(weight.dtype, "none")


@dataclass(frozen=True, eq=False)
class Codes:
    """Some rows, or all, of E matrices `[N outputs, K inputs]`, to the end of which Kp rounds K up in int4.

    Byte j of the 16 of a group of int4 holds column j of the group's 32 in its low nibble, and column 16 + j in its
    high one. A stack may consist of several parts, each with rows of its own.

    Attributes:
        weight: a float `[E, N, K]`, of any strides; int8 `[E, N, K]`, of any strides; or int4, uint8 `[E, N, Kp / 2]`,
            its last dimension contiguous.
        scale: of int8 only: float32 `[E, N]`; a value is code * scale.
        groups: of int4 only: int8 `[E, Kp / 32, N, 2]`, the step's and the centre's code of each group.
        rows: of int4 only: float32 or bfloat16 `[E, N, 2]`, the units of these; in float32, step = groups[..., 0] *
            rows[..., 0], centre = groups[..., 1] * rows[..., 1], and a value is (nibble - 8) * step + centre.
        columns: int32 or int16 `[E, N]`, the output that each row computes; None: row n computes output n.
        num_inputs: K.

    Raises:
        ValueError: tensors that do not belong together.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    groups: torch.Tensor | None
    rows: torch.Tensor | None
    columns: torch.Tensor | None
    num_inputs: int

    def __post_init__(self) -> None:
        if self.weight.dtype not in _CODECS and not self.weight.is_floating_point():
            raise ValueError(f"weights are floats, int8 or int4 in uint8, not {self.weight.dtype}")
        if self.weight.ndim != 3 or self.weight.shape[2] != self.width:
            raise ValueError(f"{self.codec} weights of {self.num_inputs} inputs are not {list(self.weight.shape)}")
        if self.codec == "int4" and self.weight.stride(2) != 1 and self.weight.numel() > 0:
            raise ValueError("the bytes of a row of int4 must lie side by side")
        experts, outputs, _ = self.weight.shape
        num_groups = -(-self.num_inputs // GROUP)
        wanted: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {}
        if self.codec == "int8":
            wanted["scale"] = (torch.float32,), (experts, outputs)
        if self.codec == "int4":
            wanted["groups"] = (torch.int8,), (experts, num_groups, outputs, 2)
            wanted["rows"] = (torch.float32, torch.bfloat16), (experts, outputs, 2)
        if self.columns is not None:
            wanted["columns"] = (torch.int32, torch.int16), (experts, outputs)
        for name in ("scale", "groups", "rows", "columns"):
            tensor: torch.Tensor | None = getattr(self, name)
            found = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
            dtypes, shape = wanted.get(name, ((), None))
            if found not in [(dtype, shape) for dtype in dtypes] and (found is not None or dtypes):
                raise ValueError(f"{name} of {self.codec} weights: {found}, where {wanted.get(name)} belongs")
            if tensor is not None and not (tensor.is_contiguous() and tensor.device == self.weight.device):
                raise ValueError(f"{name} must be contiguous, and where the weights are")

    @property
    def codec(self) -> str:
        """`"none"`, `"int8"` or `"int4"`."""
        return codec_of(self.weight)

    @property
    def width(self) -> int:
        """Numbers of a row of `weight`."""
        return -(-self.num_inputs // GROUP) * GROUP // 2 if self.codec == "int4" else self.num_inputs

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.weight.shape[0]

    @property
    def num_rows(self) -> int:
        """N, or the number of them in this part."""
        return self.weight.shape[1]


def check_linear(
    x: torch.Tensor,
    parts: tuple[Codes, ...],
    num_rows: int,
    num_experts: int,
    num_outputs: int,
    bias: torch.Tensor | None,
) -> None:
    """Raises ValueError where the arguments of an expert linear layer do not belong together.

    Args:
        x: `[num_rows, K]`.
        parts: which have `num_outputs` rows in all, each its own column.
        num_rows: T or S.
        num_experts: E.
        num_outputs: outputs of the whole layer.
        bias: `[E, num_outputs]` or None.
    """
    if not parts or sum(part.num_rows for part in parts) != num_outputs:
        raise ValueError(f"{num_outputs} outputs, of which the parts compute {[part.num_rows for part in parts]}")
    if len(parts) > 1 and any(part.columns is None for part in parts):
        raise ValueError("several parts, one of which does not say which outputs it computes")
    if any((part.num_experts, part.num_inputs) != (num_experts, parts[0].num_inputs) for part in parts):
        raise ValueError(f"parts that are not {num_experts} matrices of {parts[0].num_inputs} inputs each")
    if tuple(x.shape) != (num_rows, parts[0].num_inputs):
        raise ValueError(f"x {list(x.shape)}, where [{num_rows}, {parts[0].num_inputs}] was to be expected")
    if any(part.codec == "none" and part.weight.dtype != x.dtype for part in parts):
        raise ValueError(f"x of {x.dtype}, and weights of another dtype")
    if bias is not None and tuple(bias.shape) != (num_experts, num_outputs):
        raise ValueError(f"a bias {list(bias.shape)} for {num_experts} experts of {num_outputs} outputs")
