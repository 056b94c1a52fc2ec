"""`append`, in Triton and in C++: the codecs' own bytes, where the layout says."""

import math
from typing import Any

import pytest
import torch
from torch.library import opcheck

from hfkv.codecs import CODECS
from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.naive import append_naive
from hfkv.kernels.native import kernels as native
from hfkv.kernels.native.library import library, why_not
from hfkv.kernels.selftest.inputs import turned
from hfkv.kernels.triton import append as triton
from hfkv.stores.layout import Layout
from tests.kernels.held import WHOLE, garbage, shuffled, sparse

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of the interpreter, about NaN

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=["triton", "native"])
def append(request: pytest.FixtureRequest, device: torch.device) -> Any:
    codecs = [request.getfixturevalue("codec")] if "codec" in request.fixturenames else []
    if request.param == "triton":
        if not {*WHOLE}.issuperset(codecs):
            pytest.skip("takes its time, interpreted: test_triton_bits.py")
        return triton.append
    if device.type != "cpu" or library() is None:
        pytest.skip(why_not() or "on a CPU only")
    return native.append


def assert_same_bytes(one: Encoded, other: Encoded) -> None:
    for plane, expected in zip(one.planes, other.planes, strict=True):
        assert plane.stride() == expected.stride()
        assert torch.equal(plane.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def check(
    append: Any,
    codecs: tuple[str, str],
    new: tuple[torch.Tensor, torch.Tensor],
    layout: Layout,
    shape: tuple[int, int, int],
    is_transposed: tuple[bool, bool] = (False, False),
) -> None:
    """Asserts that `append` writes what `append_naive` does, and nothing else."""
    sides = [
        [garbage(codec, (*shape, x.shape[3]), x.dtype, x.device) for codec, x in zip(codecs, new, strict=True)]
        for _ in range(2)
    ]
    for side in sides:
        side[:] = [turned(part) if is_turned else part for part, is_turned in zip(side, is_transposed, strict=True)]
    append(*new, *sides[0], layout)
    append_naive(*new, *sides[1], layout)
    for one, other in zip(*sides, strict=True):
        assert_same_bytes(one, other)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("num_new", "head_dims", "page_size"),
    [(1, (128, 128), 0), (17, (96, 64), 6), (63, (80, 5), 0), (1, (256, 128), 64), (9, (512, 64), 6)],
)
def test_bytes_are_the_codecs_own(
    append: Any,
    codec: str,
    dtype: torch.dtype,
    num_new: int,
    head_dims: tuple[int, int],
    page_size: int,
    device: torch.device,
) -> None:
    if append is native.append and native.code_of(codec, dtype) is None:
        pytest.skip("plain fp16 tokens are not its own")
    batch, num_heads = 2, 1
    new = tuple(torch.randn(batch, num_heads, num_new, dim, device=device).mul(3).to(dtype) for dim in head_dims)
    new[0][0, 0, 0, 1] = 1000
    if page_size == 0:
        check(append, (codec, codec), new, Layout(5, start=3), (batch, num_heads, 5 + 3 + num_new + 2))
        return
    spans = ((2, page_size), (0, page_size - 1), (1, page_size - 2))
    table = shuffled(batch, 3 + math.ceil(num_new / page_size))
    check(append, (codec, codec), new, Layout(9, table=table, spans=spans), (table.numel(), num_heads, page_size))


@pytest.mark.parametrize("codec", CODECS)
def test_hard_rows_and_strides(append: Any, codec: str, device: torch.device) -> None:
    # [B, n, H, D] in memory, every second number of it: no stride is what it usually is.
    new = torch.randn(2, 40, 2, 256, device=device)[..., ::2].transpose(1, 2)
    new[0, 0, 0] = 0
    new[0, 0, 1] = -0.0
    new[0, 0, 2] = 7.013  # a range of nothing, and an offset that bfloat16 rounds
    new[0, 0, 3] = torch.linspace(-1, 1, 128)
    new[0, 0, 4] = 1e-39
    new[0, 0, 5] = 1e-41
    new[0, 0, 6, 3] = 1e30
    new[0, 0, 7] = torch.arange(128) - 63.5  # halves, once divided by the scale
    new[0, 0, 8:12] *= torch.tensor([3e-5, 8e4, 1e6, 1e25])[:, None]  # about where scales of eight bits end
    check(append, (codec, codec), (new, new.flip(2)), Layout(1), (2, 2, 41))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rounding_of_fp8(append: Any, dtype: torch.dtype, device: torch.device) -> None:
    # A row whose scale is 1, with the numbers of float8 and those half way between two of them.
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2))
    new = torch.cat((numbers, -numbers, numbers[:6])).to(dtype).view(1, 1, 2, 256).to(device)
    check(append, ("fp8", "fp8"), (new, new), Layout(0), (1, 1, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
def test_what_is_not_finite_stays_in_its_row(append: Any, codec: str, bad: float, device: torch.device) -> None:
    new = torch.randn(1, 1, 3, 64, device=device)
    written = []
    for value in (bad, 0.5):
        new[0, 0, 1, 5] = value
        encoded = garbage(codec, (1, 1, 3, 64), new.dtype, device)
        append(new, new, encoded, encoded, Layout(0))
        written.append(CODECS[codec].decode(encoded.planes, 64, torch.float32)[0, 0])
    assert not written[0][1].isfinite().any()
    assert torch.equal(written[0][::2], written[1][::2])
    assert written[1].isfinite().all()


def test_keys_and_values_may_have_codecs_of_their_own(append: Any, device: torch.device) -> None:
    new = torch.randn(2, 1, 3, 64, device=device), torch.randn(2, 1, 3, 32, device=device)
    check(append, ("int8", "int4"), new, Layout(0), (2, 1, 3))


@pytest.mark.pairwise
@pytest.mark.parametrize("codec", WHOLE)
@pytest.mark.parametrize(("num_new", "head_dim"), [(1, 64), (17, 80)])
@pytest.mark.parametrize("page_size", [0, 8])
def test_tokens_may_lie_side_by_side_instead_of_their_numbers(
    codec: str, num_new: int, head_dim: int, page_size: int, device: torch.device
) -> None:
    new = tuple(torch.randn(2, 2, num_new, dim, device=device) for dim in (64, head_dim))
    layout, shape = Layout(5, start=2), (2, 2, 30)
    if page_size:
        table = shuffled(2, 5)
        layout, shape = Layout(9, table=table, spans=((2, 8), (0, 3))), (table.numel(), 2, page_size)
    for is_transposed in ((False, True), (True, True)):
        check(triton.append, ("int8", codec), new, layout, shape, is_transposed)


@pytest.mark.parametrize("codecs", [("none", "none"), ("int8", "int4"), ("int4", "fp8")])
def test_keys_and_values_are_one_launch(
    codecs: tuple[str, str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []
    kernel = triton._append_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton, "_append_kernel", Counted())
    new = torch.randn(2, 3, 1, 64, device=device)
    check(triton.append, codecs, (new, new.flip(3)), Layout(2), (2, 3, 4))
    assert launches == [(1, 3, 2)]


def test_an_empty_store_is_filled_from_its_first_page(append: Any, device: torch.device) -> None:
    new = torch.randn(1, 1, 20, 64, device=device)
    check(append, ("none", "int8"), (new, new), Layout(0, table=torch.tensor([[2, 0, 1]])), (3, 1, 8))


def test_no_tokens_are_no_work(append: Any, device: torch.device) -> None:
    new = torch.randn(1, 1, 0, 64, device=device)
    check(append, ("int8", "int8"), (new, new), Layout(3), (1, 1, 3))


@pytest.mark.parametrize(
    "layout", [Layout(6, start=1), Layout(15, table=torch.tensor([[0, 1]]), spans=((0, 8), (0, 7)))]
)
def test_a_full_store_is_refused(append: Any, layout: Layout, device: torch.device) -> None:
    new = torch.randn(1, 1, 2, 64, device=device)
    planes = garbage("int8", (2 if layout.is_paged else 1, 1, 8, 64), new.dtype, device)
    with pytest.raises(ValueError, match=r"2 new tokens.* room"):
        append(new, new, planes, planes, layout)


def test_one_set_of_inputs_serves_every_step(append: Any, device: torch.device) -> None:
    table = shuffled(2, 3)
    sides = [garbage("int8", (6, 1, 4, 64), torch.float32, device) for _ in range(2)]
    inputs = DeviceInputs.allocate(Layout(0, table=table[:, :1]), None, device, columns=3)
    for length in range(9):
        new = torch.randn(2, 1, 1, 64, device=device)
        spans = tuple((0, min(4, length - first)) for first in range(0, length, 4))
        layout = Layout(length, table=table[:, : length // 4 + 1], spans=spans)
        inputs.update(layout, None)
        append(new, new, sides[0], sides[0], layout, inputs=inputs)
        append_naive(new, new, sides[1], sides[1], layout)
    assert_same_bytes(*sides)


def test_planes_larger_than_32_bits_count(append: Any, device: torch.device) -> None:
    if append is native.append:
        pytest.skip("takes planes in one piece only, and refuses others")
    plane = sparse((1, 1, 40_001, 64), (1, 1, 65_536, 1), device)
    scale = torch.zeros(1, 1, 40_001, 1, dtype=torch.bfloat16, device=device)
    encoded = Encoded(CODECS["int8"], (plane, scale), 64)
    new = torch.randn(1, 1, 1, 64, device=device)
    append(new, new, encoded, encoded, Layout(40_000))
    assert torch.equal(plane[:, :, 40_000:], CODECS["int8"].encode(new)[0])


@pytest.mark.filterwarnings("ignore")
def test_the_operator_keeps_torchs_contract(device: torch.device) -> None:
    new = torch.randn(1, 1, 2, 64, device=device)
    planes = [list(garbage("int8", (1, 1, 3, 64), new.dtype, device).planes) for _ in range(2)]
    for plane in (*planes[0], *planes[1]):
        plane.zero_()
    inputs = DeviceInputs.allocate(Layout(0), None, device)
    opcheck(torch.ops.hfkv.append.default, (new, new, *planes, "int8", "int8", inputs.meta, 0, False))
