"""`ExpertStack` as any code sees it: an ordinary parameter."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hfkv
from hfkv.experts.families import experts_of
from hfkv.experts.int8 import Int8Weights
from hfkv.experts.packed import PackedWeights, unpackable
from hfkv.experts.stack import ExpertStack, as_parameter
from hfkv.models.fingerprint import _plain
from tests.moe_models import model_of


class Layer(nn.Module):
    def __init__(self, stack: ExpertStack) -> None:
        super().__init__()
        self.w = as_parameter(stack, requires_grad=True)


def layer(w: torch.Tensor, is_transposed: bool = False) -> Layer:
    return Layer(ExpertStack(PackedWeights(w.transpose(1, 2) if is_transposed else w), is_transposed))


@pytest.fixture(params=[False, True], ids=["outputs first", "inputs first"])
def is_transposed(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_it_is_a_parameter_with_the_models_own_shape(is_transposed: bool) -> None:
    w = torch.randn(4, 48, 32)
    stack = layer(w, is_transposed).w
    assert isinstance(stack, nn.Parameter)
    assert stack.requires_grad
    assert (stack.shape, stack.dtype, stack.device) == (w.shape, w.dtype, w.device)
    assert torch.equal(stack + 0, w)
    assert torch.equal(stack[torch.tensor(-1)], w[-1])
    assert "packed" in repr(stack)


def test_one_expert_is_decoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(4, 48, 32)
    stack = layer(w).w
    monkeypatch.setattr(PackedWeights, "read_all", lambda self: pytest.fail("all were decoded"))
    assert torch.equal(stack[2], w[2])


WRITES: dict[str, Callable[[nn.Parameter, torch.Tensor], object]] = {
    "data": lambda p, d: setattr(p, "data", d),
    "copy_": lambda p, d: p.data.copy_(d),
    "set item": lambda p, d: [p.data.__setitem__(e, d[e]) for e in range(len(d))],
    "set slice": lambda p, d: p.data.__setitem__(slice(None), d),
    "load": lambda p, d: setattr(p, "data", d.clone()),
    "add": lambda p, d: p.data.add_(d - p.data),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_is_read(write: str, is_transposed: bool) -> None:
    module, new = layer(torch.randn(3, 48, 32), is_transposed), torch.randn(3, 48, 32)
    kept = module.w
    WRITES[write](module.w, new)
    assert module.w is kept
    assert torch.allclose(module.w + 0, new, atol=1e-6)


def test_an_adapter_is_merged_and_unmerged_as_peft_does_it(is_transposed: bool) -> None:
    w, delta = torch.randn(3, 48, 32), torch.randn(3, 48, 32)
    module = layer(w, is_transposed)
    module.w.data += delta
    assert torch.equal(module.w + 0, w + delta)
    module.w.data -= delta
    careful = module.w.data.clone()
    careful += delta
    assert torch.allclose(module.w + 0, w, atol=1e-6)
    module.w.data = careful
    assert torch.allclose(module.w + 0, w + delta, atol=1e-6)


def test_gradients_pass_to_what_is_multiplied_with_it() -> None:
    w = torch.randn(3, 48, 32)
    x = torch.randn(5, 32, requires_grad=True)
    F.linear(x, layer(w).w[1]).sum().backward()
    assert torch.allclose(x.grad, w[1].sum(0).expand(5, 32), atol=1e-5)


def test_it_is_copied_pickled_and_loaded() -> None:
    w = torch.randn(3, 48, 32)
    module = layer(w)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = layer(torch.zeros(3, 48, 32))
    loaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), loaded):
        assert isinstance(other.w, nn.Parameter)
        assert torch.equal(other.w + 0, w)
        other.w.data.zero_()
        assert torch.equal(module.w + 0, w)


def test_a_module_takes_it_to_another_dtype() -> None:
    w = torch.randn(3, 48, 32)
    module = layer(w).to(torch.bfloat16)
    assert module.w.dtype == torch.bfloat16
    assert torch.equal(module.w + 0, w.bfloat16())
    assert module.w.weights.form == ("plain" if unpackable(w.bfloat16()) else "packed")
    assert module.half().w.weights.form == "plain"  # nothing is packed in float16
    assert isinstance(module.w, nn.Parameter)


def test_writing_to_few_bytes_again_says_that_it_rounds(caplog: pytest.LogCaptureFixture) -> None:
    weights = Int8Weights((2, 8, 32), torch.float32, torch.device("cpu"))
    w = torch.randn(2, 8, 32)
    Layer(ExpertStack(weights)).w.data = w
    assert "written as int8 again" in caplog.text
    assert (weights.read_all() - w).abs().max() < 0.05


def test_a_write_is_seen_by_who_asks_whether_weights_changed() -> None:
    module = layer(torch.randn(3, 48, 32))

    def look() -> list[tuple[int, int]]:
        return [(part.data_ptr(), part._version) for part in _plain(module.w)]

    before, numbers = look(), [part.clone() for part in _plain(module.w)]
    assert look() == before
    module.w.data += 1
    assert look() != before
    assert any(not torch.equal(a, b) for a, b in zip(numbers, _plain(module.w), strict=True))


def test_no_expert_but_the_named_one_is_written() -> None:
    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    stack = next(iter(experts_of(model).values())).down_proj
    for index in (4, -5):
        with pytest.raises(IndexError, match="there are 4 experts"):
            stack.data[index] = torch.zeros_like(stack[0])
        with pytest.raises(IndexError):
            torch.select(stack, 0, index)
