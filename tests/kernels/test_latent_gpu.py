"""On a GPU: latents of DeepSeek-V3's size, graphs captured and replayed, and no memory of the size of what is held."""

from __future__ import annotations

import pytest
import torch

from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.triton.append import append
from hfkv.kernels.triton.latent import latent_attention
from hfkv.kernels.triton.support import TRITON_CODECS, unsupported_latent
from hfkv.stores.layout import Layout
from tests.kernels.held import check, contiguous, garbage, paged, shuffled, worst

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
NUM_HEADS, LATENT, ROTARY = 128, 512, 64
BATCH, LENGTH, PAGE_SIZE = 2, 4096, 64
PLAIN = Scoring((128 + 64) ** -0.5)


@pytest.fixture(autouse=True)
def _supported(request: pytest.FixtureRequest) -> None:
    codec = request.node.callspec.params["codec"] if hasattr(request.node, "callspec") else "int8"
    reason = unsupported_latent(CUDA, torch.bfloat16, (codec,), LATENT, ROTARY)
    if reason is not None:
        pytest.skip(reason)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA).to(dtype)


def held(codec: str, is_paged: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Encoded, Encoded, Layout]:
    latents, rotary = (randn(BATCH, 1, LENGTH, dim, dtype=dtype) for dim in (LATENT, ROTARY))
    if not is_paged:
        return contiguous(codec, latents, 3, 100), contiguous(codec, rotary, 3, 100), Layout(LENGTH, start=3)
    spans = ((0, PAGE_SIZE),) * (LENGTH // PAGE_SIZE)
    table = shuffled(BATCH, len(spans))
    parts = (paged(codec, x, table, spans, PAGE_SIZE) for x in (latents, rotary))
    return *parts, Layout(LENGTH, table=table, spans=spans)


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("codec", TRITON_CODECS)
def test_latents_of_a_real_size(codec: str, dtype: torch.dtype, is_paged: bool, num_queries: int) -> None:
    query = randn(BATCH, NUM_HEADS, num_queries, LATENT + ROTARY, dtype=dtype)
    arguments = (query, *held(codec, is_paged, dtype), Visibility(LENGTH, (0, 1000)), PLAIN)
    for num_splits in (1, None):
        check(latent_attention, *arguments, twin=latent_attention_naive, num_splits=num_splits)


@pytest.mark.parametrize("num_heads", [1, 16, 20, 40])
@pytest.mark.parametrize("codec", TRITON_CODECS)
def test_every_tile_of_rows_with_all_that_scores_may_be(codec: str, num_heads: int) -> None:
    bounds = torch.full((1, 1), 500, device=CUDA)
    visibility = Visibility(LENGTH, (0, 1000), sinks=4, bounds=bounds)
    scoring = Scoring(PLAIN.scale, softcap=20.0, sink_logits=torch.randn(num_heads, device=CUDA))
    query = randn(BATCH, num_heads, 1, LATENT + ROTARY)
    check(latent_attention, query, *held(codec, True), visibility, scoring, twin=latent_attention_naive)


@pytest.mark.parametrize("codec", TRITON_CODECS)
def test_a_captured_graph_writes_and_reads_latents(codec: str) -> None:
    latents, rotary = (garbage(codec, (BATCH, 1, 300, dim), torch.bfloat16, CUDA) for dim in (LATENT, ROTARY))
    new = randn(BATCH, 1, 1, LATENT), randn(BATCH, 1, 1, ROTARY)
    query = randn(BATCH, NUM_HEADS, 1, LATENT + ROTARY)

    def at(seen: int) -> tuple[Layout, Visibility]:
        return Layout(seen), Visibility(seen, (0, 1))

    before, after = (DeviceInputs.allocate(*at(seen), CUDA) for seen in (0, 1))

    def step() -> torch.Tensor:
        append(*new, latents, rotary, Layout(0), inputs=before)
        return latent_attention(query, latents, rotary, *at(1), PLAIN, inputs=after).out

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seen in range(130):
        before.update(*at(seen))
        after.update(*at(seen + 1))
        for static in (*new, query):
            static.copy_(torch.randn(static.shape, device=CUDA))
        graph.replay()
        if seen in (0, 1, 63, 64, 129):
            expected, _ = latent_attention_naive(query, latents, rotary, *at(seen + 1), PLAIN, torch.float64)
            assert worst(out, expected) < 0.05


@pytest.mark.parametrize("codec", TRITON_CODECS)
def test_nothing_of_the_size_of_what_is_held_is_written(codec: str) -> None:
    query = randn(BATCH, NUM_HEADS, 1, LATENT + ROTARY)
    arguments = (query, *held(codec, False), Visibility(LENGTH, (0, 0)), PLAIN)
    latent_attention(*arguments, num_splits=2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    latent_attention(*arguments, num_splits=2)
    # Two splits of the output in float32, the output, and the allocator's rounding.
    assert torch.cuda.max_memory_allocated() - before <= query.numel() * 12 + (64 << 10)
