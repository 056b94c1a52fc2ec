"""`StepAppend` and `StepAttention`: what the layers of a step share, and tokens that move before others are written."""

from __future__ import annotations

import pytest
import torch

from hfkv.kernels.inputs import Encoded
from hfkv.kernels.merge import Attended
from hfkv.kernels.naive import append_naive
from hfkv.kernels.native import library as native
from hfkv.kernels.native.kernels import StepAppend, step_append, step_attention
from hfkv.stores.layout import Layout
from tests.kernels.cases import case, check
from tests.kernels.held import garbage
from tests.kernels.test_native_library import ALL, same_bytes

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not() or "none")


def planes_of(codec: str, dtype: torch.dtype, rows: int = 2) -> Encoded:
    """Planes of any bytes."""
    planes = garbage(codec, (rows, 3, 16, 40), dtype, torch.device("cpu"))
    for plane in planes.planes:
        plane.view(torch.uint8).random_(0, 256)
    return planes


def clone(encoded: Encoded) -> Encoded:
    return encoded._replace(planes=tuple(plane.clone() for plane in encoded.planes))


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [1, 3, 6])
def test_tokens_at_the_front_move_before_new_ones_are_written(codec: str, dtype: torch.dtype, gap: int) -> None:
    new = torch.randn(2, 3, 2, 40).to(dtype), torch.randn(2, 3, 2, 40).to(dtype)
    ours = planes_of(codec, dtype), planes_of(codec, dtype)
    theirs = tuple(map(clone, ours))
    before = Layout(7, start=gap)
    step = StepAppend(*new, *ours, before, None, moved=(4, gap))
    step.run(*new, (*ours[0].planes, *ours[1].planes))
    for encoded in theirs:
        for plane in encoded.planes:
            bits = plane.view(torch.uint8)
            bits[:, :, gap : gap + 4] = bits[:, :, :4].clone()
    append_naive(*new, *theirs, before)
    for one, other in zip(ours, theirs, strict=True):
        assert same_bytes(one.planes, other.planes)


@pytest.mark.parametrize(
    ("moved", "layout"),
    [
        ((4, 3), Layout(7, start=2)),
        ((8, 2), Layout(7, start=2)),
        ((1, 1), Layout(3, table=torch.zeros(2, 1, dtype=torch.long), spans=((0, 3),))),
    ],
)
def test_what_would_move_from_outside_is_refused(moved: tuple[int, int], layout: Layout) -> None:
    new, planes = torch.randn(2, 3, 1, 40), planes_of("int8", torch.float32)
    before = clone(planes)
    step = StepAppend(new, new, planes, planes, layout, None, moved=moved)
    with pytest.raises(ValueError, match="find no room"):
        step.run(new, new, (*planes.planes, *planes.planes))
    assert same_bytes(planes.planes, before.planes)


def test_a_step_takes_tensors_that_lie_as_its_first_ones_only() -> None:
    new, planes = torch.randn(2, 3, 1, 40), planes_of("int8", torch.float32)
    step, both = StepAppend(new, new, planes, planes, Layout(3), None), (*planes.planes, *planes.planes)
    other = planes_of("int8", torch.float32, rows=3)
    moved = torch.randn(2, 1, 3, 40).transpose(1, 2)
    assert step.takes(new.clone(), new, both)
    assert not step.takes(moved, new, both)
    assert not step.takes(new, moved, both)
    assert not step.takes(new, new, (*other.planes, *other.planes))


@pytest.mark.parametrize("codec", ALL)
def test_a_step_attends_for_other_layers_too(codec: str) -> None:
    first, second = case(codec, seed=1), case(codec, seed=2)
    step = step_attention(*first.arguments, inputs=None)
    planes = (*second.keys.planes, *second.values.planes)
    assert step.takes(second.query, planes)

    def attend(*arguments: object) -> Attended:
        out = step.run(second.query, planes, second.scoring.scale)
        return Attended(out.transpose(1, 2), step.lse)

    check(attend, second)
    assert not torch.equal(attend().out, step.run(second.query, planes, second.scoring.scale * 2).transpose(1, 2))


def test_nothing_is_worked_out_for_what_a_kernel_has_to_prepare() -> None:
    new, planes = torch.randn(2, 3, 1, 40), planes_of("int8", torch.float32)
    assert step_append(new, new, planes, planes, Layout(3), inputs=None) is not None
    assert step_append(new, new.double(), planes, planes, Layout(3), inputs=None) is None
    assert step_append(torch.randn(2, 3, 1, 80)[..., ::2], new, planes, planes, Layout(3), inputs=None) is None
