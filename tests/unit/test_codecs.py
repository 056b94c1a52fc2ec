"""Codecs: row-local, bounded errors, the bytes they promise."""

import pytest
import torch

from hfkv.codecs import CODECS, trellis
from hfkv.codecs.hadamard import hadamard_block, rotate

HEAD_DIMS = (16, 17, 64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def states(head_dim: int, tokens: int = 33, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys as models make them: a few channels much larger than the others."""
    x = torch.randn(2, 3, tokens, head_dim)
    x[..., 1] *= 12
    return x.to(dtype)


@pytest.mark.pairwise
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_written_the_same_alone_as_among_others(name: str, head_dim: int, dtype: torch.dtype) -> None:
    codec, x = CODECS[name], states(head_dim, dtype=dtype)
    together = codec.encode(x)
    for split in (1, 5, 32):
        pieces = [codec.encode(piece) for piece in x.split(split, dim=2)]
        for index, plane in enumerate(together):
            again = torch.cat([piece[index] for piece in pieces], dim=2)
            assert torch.equal(plane.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decoding_has_the_shape_and_dtype_asked_for(name: str, head_dim: int) -> None:
    codec, x = CODECS[name], states(head_dim, dtype=torch.bfloat16)
    y = codec.decode(codec.encode(x), head_dim, torch.bfloat16)
    assert y.shape == x.shape
    assert y.dtype == torch.bfloat16
    empty = codec.decode(codec.encode(x[:, :, :0]), head_dim, torch.bfloat16)
    assert empty.shape == (2, 3, 0, head_dim)


@pytest.mark.parametrize("name", CODECS)
def test_rows_of_no_numbers(name: str) -> None:
    x = torch.randn(2, 1, 5, 0)
    planes = CODECS[name].encode(x)
    assert all(plane.shape[:3] == (2, 1, 5) for plane in planes)
    assert CODECS[name].decode(planes, 0, torch.float32).shape == x.shape


def test_none_is_bit_equal() -> None:
    x = states(64)
    assert torch.equal(CODECS["none"].decode(CODECS["none"].encode(x), 64, x.dtype), x)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_int8_error_is_below_half_a_step(head_dim: int) -> None:
    x = states(head_dim)
    error = (x - CODECS["int8"].decode(CODECS["int8"].encode(x), head_dim, x.dtype)).abs().amax(-1)
    # The scale is rounded to bfloat16: 2 ** -8 of it, on top of half a step.
    assert bool((error <= x.abs().amax(-1) / 254 * (1 + 2**-7)).all())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_int4_error_is_below_half_a_step_of_the_rotated_row(head_dim: int) -> None:
    x = states(head_dim)
    y = rotate(x)
    step = (y.amax(-1) - y.amin(-1)) / 15
    decoded = CODECS["int4"].decode(CODECS["int4"].encode(x), head_dim, x.dtype)
    error = (rotate(decoded) - y).abs().amax(-1)
    assert bool((error <= step / 2 * (1 + 2**-4) + y.abs().amax(-1) * 2**-8).all())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fp8_error_is_below_half_a_step_of_its_mantissa(head_dim: int) -> None:
    x = states(head_dim)
    error = (x - CODECS["fp8"].decode(CODECS["fp8"].encode(x), head_dim, x.dtype)).abs()
    smallest = x.abs().amax(-1, keepdim=True) / 448 * 2**-9
    assert bool((error <= x.abs() * 2**-4 + smallest).all())


@pytest.mark.parametrize(("name", "limit"), [("int8", 0.53), ("fp8", 0.53), ("int4", 0.30)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bytes_against_bf16(name: str, limit: float, head_dim: int) -> None:
    x = states(head_dim, dtype=torch.bfloat16)
    encoded = sum(plane.numel() * plane.element_size() for plane in CODECS[name].encode(x))
    assert encoded <= limit * x.numel() * x.element_size()


@pytest.mark.parametrize(
    ("head_dim", "int3", "int2"), [(64, 25, 18), (128, 49, 34), (96, 37, 26), (17, 10, 7), (1, 4, 3)]
)
def test_bytes_of_few_bits(head_dim: int, int3: int, int2: int) -> None:
    row = torch.randn(1, 1, 1, head_dim)
    for name, expected in (("int3", int3), ("int2", int2)):
        assert sum(plane.nbytes for plane in CODECS[name].encode(row)) == expected


@pytest.mark.parametrize(("name", "most"), [("int3", 0.0345), ("int2", 0.0815)])
def test_normal_numbers_lose_little(name: str, most: float) -> None:
    """The least that a normal number loses on its own is 0.0345 with three bits (Lloyd-Max) and 0.1175 with two."""
    x = torch.randn(1, 1, 2000, 128)
    y = CODECS[name].decode(CODECS[name].encode(x), 128, x.dtype)
    assert ((x - y).square().mean() / x.square().mean()).item() <= most


@pytest.mark.parametrize("name", ["int3", "int2"])
def test_what_no_scale_of_eight_bits_brings_about(name: str) -> None:
    """Rows too small for one are zeros, and those too large are no numbers: never others."""
    x = torch.randn(1, 1, 3, 64) * torch.tensor([1e-6, 1.0, 1e6])[:, None]
    small, usual, large = CODECS[name].decode(CODECS[name].encode(x), 64, x.dtype)[0, 0]
    assert torch.equal(small, torch.zeros(64))
    assert usual.isfinite().all()
    assert large.isnan().all()


def test_no_string_of_the_trellis_is_nearer_than_the_one_that_is_found() -> None:
    doubled = (torch.randn(20, 3) * 2 * trellis.DEVIATION).round().int()
    strings, numbers = trellis.encode(doubled)
    assert torch.equal(trellis.decode(strings, 3).int(), numbers)
    bits = torch.arange(1 << 12)  # six before the first number, and two of each
    all_strings = torch.stack((bits << 2 & 255, bits >> 6), dim=-1).to(torch.uint8)
    errors = (doubled[:, None] - 2 * trellis.decode(all_strings, 3).int()).square().sum(-1)
    assert torch.equal((doubled - 2 * numbers).square().sum(-1), errors.amin(1))


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros_and_nan_stays_nan(name: str) -> None:
    codec = CODECS[name]
    x = torch.zeros(1, 1, 2, 64)
    x[0, 0, 1, 3] = float("nan")
    y = codec.decode(codec.encode(x), 64, x.dtype)
    assert torch.equal(y[0, 0, 0], torch.zeros(64))
    assert bool(y[0, 0, 1, 3].isnan())


@pytest.mark.parametrize("name", CODECS)
def test_the_largest_numbers_of_half_precision_stay_finite(name: str) -> None:
    most = torch.finfo(torch.float16).max
    x = torch.full((1, 1, 4, 64), most, dtype=torch.float16) * torch.tensor([1, -1, 0.999, 0.98])[:, None]
    x[:, :, :, ::3] = 1
    assert bool(CODECS[name].decode(CODECS[name].encode(x.half()), 64, torch.float16).isfinite().all())


MAGNITUDES = {
    **dict.fromkeys(("int8", "int4", "fp8"), (1e-30, 1e-6, 1e5, 1e30)),
    **dict.fromkeys(("int3", "int2"), (1e-4, 1e-2, 1e2, 6e4)),
}


@pytest.mark.parametrize(("name", "magnitude"), [(name, size) for name, sizes in MAGNITUDES.items() for size in sizes])
def test_any_magnitude_keeps_its_relative_error(name: str, magnitude: float) -> None:
    x = torch.randn(1, 1, 8, 64) * magnitude
    y = CODECS[name].decode(CODECS[name].encode(x), 64, x.dtype)
    x, y = x.double(), y.double()
    most = {"int8": 0.012, "fp8": 0.035, "int4": 0.12, "int3": 0.2, "int2": 0.32}[name]
    assert ((x - y).norm() / x.norm()).item() < most


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_rows_of_the_smallest_numbers_lose_their_tops_at_most(name: str) -> None:
    # A scale that has few bits left brings a row's largest number up to half as far again as codes go.
    x = torch.linspace(0.5, 1.5, 300)[None, None, :, None] * torch.randn(1, 1, 300, 64) * 2.0**-125
    y = CODECS[name].decode(CODECS[name].encode(x), 64, x.dtype)
    x, y = x.double(), y.double()
    assert bool(((x - y).norm(dim=-1) <= x.norm(dim=-1) / 4).all())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_rotation_is_its_own_inverse_and_keeps_lengths(head_dim: int) -> None:
    x = torch.randn(3, 5, head_dim)
    torch.testing.assert_close(rotate(rotate(x)), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1))
    if hadamard_block(head_dim) > 1:
        assert not torch.allclose(rotate(x), x)
