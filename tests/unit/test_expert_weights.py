"""The forms in which experts are kept: what they cost and what they lose."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hfkv.experts.checkpoint import CODECS
from hfkv.experts.int4 import BYTES, TORCH, Int4Weights
from hfkv.experts.int8 import Int8Weights
from hfkv.experts.packed import PackedWeights, unpackable
from hfkv.experts.weights import ExpertWeights, PlainWeights
from hfkv.kernels.experts.naive import decode_naive as decode_codes

CPU = torch.device("cpu")
# N and K that are multiples of nothing, of groups, and of every kernel's tiles.
SHAPES = [(3, 33, 17), (2, 48, 40), (2, 64, 96), (1, 7, 5)]


def written(form: str, matrices: torch.Tensor) -> ExpertWeights:
    if form == "packed" and (reason := unpackable(matrices)):
        pytest.skip(reason)
    if form in ("plain", "packed"):
        return {"plain": PlainWeights, "packed": PackedWeights}[form](matrices.clone())
    weights = CODECS[form](tuple(matrices.shape), matrices.dtype, matrices.device)  # type: ignore[arg-type]
    weights.write_all(matrices)
    return weights


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


@pytest.mark.parametrize("form", ["plain", "packed", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_decoded_matrices(form: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    matrices = torch.randn(shape).to(dtype)
    weights = written(form, matrices)
    for num_rows in (1, 3, 40):
        x = torch.randn(num_rows, shape[2]).to(dtype)
        for expert in range(shape[0]):
            expected = x.float() @ weights.decode(expert).float().t()
            assert weights.linear(x, expert).dtype == dtype
            assert relative(weights.linear(x, expert), expected) <= (2e-6 if dtype == torch.float32 else 1.2e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_what_is_not_compressed_is_exact(form: str, shape: tuple[int, int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        matrices = torch.randn(shape).to(dtype)
        weights = written(form, matrices)
        assert torch.equal(weights.read_all(), matrices)
        assert weights.nbytes() == matrices.nbytes


def test_errors_and_bytes_of_a_layer() -> None:
    """Gaussian experts of H 512 and I 1024, gated: the bounds that are promised."""
    up, down = torch.randn(2, 2048, 512) * 0.02, torch.randn(2, 512, 1024) * 0.02
    x = torch.randn(128, 512)

    def layer(first: ExpertWeights, second: ExpertWeights, expert: int) -> torch.Tensor:
        gate, value = first.linear(x.to(first.dtype), expert).chunk(2, dim=-1)
        return second.linear(F.silu(gate) * value, expert).float()

    exact = [layer(PlainWeights(up), PlainWeights(down), expert) for expert in range(2)]
    bf16_bytes = 2 * (up.numel() + down.numel())
    for form, most_bytes, most_error in (("int8", 0.54, 2e-2), ("int4", 0.30, 1.2e-1)):
        for dtype in (torch.float32, torch.bfloat16):
            first, second = written(form, up.to(dtype)), written(form, down.to(dtype))
            assert first.nbytes() + second.nbytes() <= most_bytes * bf16_bytes
            for expert in range(2):
                assert relative(layer(first, second, expert), exact[expert]) <= most_error


def test_int8_is_within_half_a_step() -> None:
    matrices = torch.randn(2, 40, 64) * torch.logspace(-6, 6, 40)[None, :, None]
    weights = written("int8", matrices)
    assert isinstance(weights, Int8Weights)
    # Half a step, and what the scale's own rounding to bfloat16 cuts off at the end of the range.
    bound = weights.scales[..., None] * 0.5 + matrices.abs().amax(2, keepdim=True) / 256
    assert bool(((matrices - weights.read_all()).abs() <= bound).all())


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rows_of_zeros_and_of_one_number_are_exact(form: str) -> None:
    matrices = torch.zeros(1, 64, 64)
    matrices[0, 1] = 0.5
    assert torch.allclose(written(form, matrices).read_all(), matrices, atol=4e-3)
    assert not written(form, matrices * 0).read_all().any()


@pytest.mark.parametrize("form", ["plain", "packed", "int8", "int4"])
def test_one_expert_is_written_alone(form: str) -> None:
    matrices, other = torch.randn(3, 48, 64), torch.randn(48, 64)
    weights = written(form, matrices)
    before = weights.read_all()
    weights.write(1, other)
    assert torch.equal(weights.decode(0), before[0])
    assert torch.equal(weights.decode(2), before[2])
    assert torch.equal(weights.decode(1), written(form, other[None]).decode(0))
    if form != "plain":
        with pytest.raises(ValueError, match=r"a matrix of \[48, 64\], got \[64, 48\]"):
            weights.write(1, other.t())


@pytest.mark.parametrize("form", ["plain", "packed", "int8", "int4"])
def test_copies_are_equal_and_apart(form: str) -> None:
    weights = written(form, torch.randn(2, 48, 64))
    copies = [weights.to(CPU, torch.float32), copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))]
    before = weights.read_all()
    weights.write(0, torch.zeros(48, 64))
    for other in copies:
        assert type(other) is type(weights)
        assert torch.equal(other.read_all(), before)
    assert weights.to(CPU, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["plain", "int8"])
def test_kernels_are_given_what_is_kept(form: str) -> None:
    weights = written(form, torch.randn(2, 48, 40))
    for expert in range(2):
        rows = [decode_codes(part, expert) for part in weights.codes()]
        assert torch.allclose(torch.cat(rows), weights.decode(expert).float(), atol=1e-6)


def test_int4_is_portable() -> None:
    """A CPU's own order of nibbles goes to the order of kernels and files, and back."""
    weights = written("int4", torch.randn(2, 90, 70))
    assert isinstance(weights, Int4Weights)
    planes = {name: plane.clone() for name, plane in weights.portable_planes().items()}
    again = Int4Weights.of_planes({name: plane.clone() for name, plane in planes.items()}, torch.float32)
    assert torch.equal(again.read_all(), weights.read_all())
    assert all(torch.equal(plane, planes[name]) for name, plane in again.portable_planes().items())
    weights.nibbles = planes["nibbles"]
    for expert in range(2):
        whole = torch.empty(90, 70)
        for part in weights.codes():
            assert part.columns is not None
            whole[part.columns[expert].long()] = decode_codes(part, expert)
        # The products of a CPU round steps and centres in float32, as this does.
        assert torch.allclose(whole, again.decode(expert), atol=1e-5)


@pytest.mark.parametrize("order", [BYTES, TORCH])
def test_an_order_goes_with_the_weights(order: str) -> None:
    """Whoever reads them, with native kernels or without, has the same numbers; files of before have torch's order."""
    matrices = torch.randn(2, 90, 70).bfloat16()
    weights = Int4Weights((2, 90, 70), torch.bfloat16, CPU, order=order)
    weights.write_all(matrices)
    expected = weights.read_all()
    x = torch.randn(40, 70).bfloat16()
    for other in (written("int4", matrices), pickle.loads(pickle.dumps(weights)), weights.to(CPU, torch.bfloat16)):
        assert torch.equal(other.read_all(), expected)
        assert relative(other.linear(x, 1), x.float() @ expected[1].float().t()) <= 1.2e-2
    planes = weights.cpu_planes()
    as_before = object.__new__(Int4Weights)
    state = {**vars(weights), **{name: planes[name] for name in ("nibbles", "groups", "units")}}
    as_before.__setstate__({name: value for name, value in state.items() if name != "order"})
    assert torch.equal(as_before.read_all(), expected)


def test_what_cannot_be_packed_says_why() -> None:
    assert unpackable(torch.zeros(1, 4, 4)) is None
    assert "not float16" in str(unpackable(torch.zeros(1, 4, 4, dtype=torch.float16)))
    assert unpackable(torch.zeros(1, 4, 4, device="meta")) == "on meta"


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_int4_is_read_back_without_a_product() -> None:
    weights = Int4Weights((1, 256, 128), torch.bfloat16, torch.device("cpu"))
    weights.write(0, torch.randn(256, 128))
    with Operations() as operations:
        weights.decode(0)
    # It took seconds for a large matrix, by a product with the identity in float32.
    assert operations.names
    assert not [name for name in operations.names if "mm" in name]
