"""On a GPU: layers of a real size, graphs captured and replayed, and no memory of the size of weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hfkv.kernels.experts.slots import ExpertSlots
from hfkv.kernels.experts.triton import expert_linear
from hfkv.kernels.experts.triton_combine import combine
from tests.kernels.expert_cases import FORMS, assert_close, choose, stack

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# Of Qwen3-30B-A3B, with fewer experts; two of them nobody's.
NUM_EXPERTS, TOP_K, INPUTS, OUTPUTS = 30, 8, 2048, 768


def layer(form: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Two linear layers and a weighted sum, as a model has them."""
    up = stack(form, (NUM_EXPERTS, OUTPUTS, INPUTS), dtype, CUDA)
    down = stack(form, (NUM_EXPERTS, INPUTS, OUTPUTS), dtype, CUDA)

    def forward(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        slots = ExpertSlots(index, NUM_EXPERTS)
        y = expert_linear(x, up, slots, OUTPUTS, rows_are_slots=False)
        y = expert_linear(y, down, slots, INPUTS, rows_are_slots=True)
        return combine(y, weights, x.dtype)

    return forward


def inputs(num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.rand(num_tokens, NUM_EXPERTS + 2).topk(TOP_K, dim=1).indices
    weights = torch.rand(num_tokens, TOP_K)
    return torch.randn(num_tokens, INPUTS).to(CUDA, dtype), index.to(CUDA), weights.to(CUDA, dtype)


@pytest.mark.parametrize("num_tokens", [1, 3, 33, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_layers_of_a_real_size(form: str, dtype: torch.dtype, num_tokens: int) -> None:
    parts = stack(form, (NUM_EXPERTS, OUTPUTS, INPUTS), dtype, CUDA)
    x, index, _ = inputs(num_tokens, dtype)
    bias = torch.randn(NUM_EXPERTS, OUTPUTS).to(CUDA, dtype)
    slots = ExpertSlots(index, NUM_EXPERTS)
    for kernel in ("gemv", "gemm", "invariant", None):
        args = parts, slots, OUTPUTS, bias
        out = expert_linear(x, *args, rows_are_slots=False, kernel=kernel)  # type: ignore[arg-type]
        assert_close(out, x, *args, rows_are_slots=False)
        assert not out[slots.experts >= NUM_EXPERTS].any()


@pytest.mark.parametrize("form", ["none", "mixed"])
def test_the_invariant_kernel_gives_the_same_bits_alone_and_in_company(form: str) -> None:
    parts = stack(form, (NUM_EXPERTS, OUTPUTS, INPUTS), torch.bfloat16, CUDA)
    x, index, _ = inputs(500, torch.bfloat16)

    def linear(low: int, high: int) -> torch.Tensor:
        slots = ExpertSlots(index[low:high], NUM_EXPERTS)
        return expert_linear(x[low:high], parts, slots, OUTPUTS, rows_are_slots=False, kernel="invariant")

    whole = linear(0, 500)
    for low, high in ((0, 1), (1, 40), (40, 500)):
        assert torch.equal(linear(low, high), whole[low * TOP_K : high * TOP_K])


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("form", ["none", "int8", "mixed"])
def test_a_captured_forward_follows_the_router(form: str, num_tokens: int) -> None:
    forward = layer(form, torch.bfloat16)
    static = inputs(num_tokens, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(*static)
    for _ in range(3):
        fresh = inputs(num_tokens, torch.bfloat16)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, forward(*fresh))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_nothing_of_the_size_of_weights_is_written(form: str, num_tokens: int) -> None:
    forward = layer(form, torch.bfloat16)
    args = inputs(num_tokens, torch.bfloat16)
    forward(*args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward(*args)
    # Rows of slots, at two bytes a number, with room for the order and the allocator's rounding.
    rows = num_tokens * TOP_K * (INPUTS + OUTPUTS) * 2
    assert torch.cuda.max_memory_allocated() - before <= 2 * rows + (64 << 10)


@pytest.mark.parametrize("form", ["none", "mixed"])
def test_a_compiled_forward_is_one_graph(form: str) -> None:
    forward = layer(form, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True)
    for num_tokens in (1, 40, 50):
        args = inputs(num_tokens, torch.bfloat16)
        assert torch.equal(compiled(*args), forward(*args))


def test_nothing_waits_for_the_device() -> None:
    forward = layer("mixed", torch.bfloat16)
    for num_tokens in (1, 40):
        args = inputs(num_tokens, torch.bfloat16)
        forward(*args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_offsets_are_sorted_without_waiting() -> None:
    slots = choose(40, 2, 8, CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        order, offsets = slots.order, slots.offsets
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert order.sort().values.equal(torch.arange(80, device=CUDA))
    assert offsets[-1] == 80
