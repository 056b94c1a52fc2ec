"""Operators go past torch's dispatcher in eager decoding, and through it wherever somebody looks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hfkv.kernels.operators import Operator

CALLS: list[int] = []


def _twice(x: torch.Tensor, out: list[torch.Tensor]) -> torch.Tensor:
    CALLS.append(len(x))
    out[0].copy_(x)
    return x * 2


twice = Operator("test_twice", _twice, lambda x, out: torch.empty_like(x), mutates_args=("out",))


@pytest.fixture(autouse=True)
def _none_yet() -> Iterator[None]:
    CALLS.clear()
    return


class Noted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def called(x: torch.Tensor) -> torch.Tensor:
    out = [torch.empty_like(x)]
    y = twice(x, out)
    assert torch.equal(out[0], x)
    return y


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_eager_decoding_calls_the_function(mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twice, "packet", None)
    with mode():
        x = torch.randn(3)
        y = called(x)
    assert torch.equal(y, x * 2)
    assert y.is_inference() == (mode is torch.inference_mode)
    assert len(CALLS) == 1


def test_modes_see_one_operator() -> None:
    with torch.no_grad(), Noted() as noted:
        twice(torch.ones(3), [torch.empty(3)])
    assert "hfkv.test_twice.default" in noted.seen


def test_a_traced_graph_holds_the_operator() -> None:
    with torch.no_grad():
        graph = make_fx(lambda x: twice(x, [torch.empty(3)]) + 1)(torch.ones(3))
    assert torch.ops.hfkv.test_twice.default in {node.target for node in graph.graph.nodes}


def test_fake_tensors_run_nothing() -> None:
    with torch.no_grad(), FakeTensorMode() as mode:
        x = torch.empty(3)
        assert twice(x, [torch.empty(3)]).shape == (3,)
    with torch.no_grad():
        assert twice(x, [mode.from_tensor(torch.empty(3))]).shape == (3,)
    assert not CALLS


@pytest.mark.filterwarnings("ignore")
def test_it_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, out: twice(x, [out]) + 1, backend="aot_eager", fullgraph=True)
    x, out = torch.randn(3), torch.empty(3)
    with torch.no_grad():
        assert torch.equal(compiled(x, out), x * 2 + 1)
    assert torch.equal(out, x)


def test_a_profile_names_the_operator() -> None:
    with torch.no_grad(), torch.profiler.profile() as profile:
        called(torch.randn(3))
    assert any(event.key == "hfkv::test_twice" for event in profile.key_averages())


def test_where_gradients_are_recorded_writes_are_counted() -> None:
    x, out = torch.ones(3), torch.zeros(3)
    twice(x, [out])
    assert out._version == 2  # the copy's, and the operator's
    y = twice(x.requires_grad_(), [torch.empty(3)])
    with pytest.raises(RuntimeError, match="autograd"):
        y.sum().backward()


def test_subclasses_go_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sub(torch.Tensor):
        pass

    packets = []
    packet = twice.packet
    monkeypatch.setattr(twice, "packet", lambda *args: packets.append(args) or packet(*args))
    with torch.no_grad():
        called(torch.ones(3).as_subclass(Sub))
        with torch.device("cpu"):
            called(torch.ones(3))
    assert len(packets) == 2
