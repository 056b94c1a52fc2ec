"""Planes filled by hand, with garbage where nothing is held, and how well attention over them is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hfkv.codecs import CODECS
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.naive import attention_naive
from hfkv.stores.layout import Layout

# Triton's codecs but for int3 and int2, whose interpreted kernels take their time: `test_triton_bits.py`.
WHOLE = ("none", "int8", "int4", "fp8")

Spans = tuple[tuple[int, int], ...]
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def garbage(codec: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Encoded:
    """Planes `[.., d]` for `[.., D]` of nothing but set bits: NaN in every float."""
    sample = CODECS[codec].encode(torch.zeros(1, 1, 1, shape[3], dtype=dtype))
    planes = [
        torch.full((*shape[:3], plane.shape[3] * plane.element_size()), 0xFF, dtype=torch.uint8).view(plane.dtype)
        for plane in sample
    ]
    return Encoded(CODECS[codec], tuple(plane.to(device) for plane in planes), shape[3])


def contiguous(codec: str, tokens: torch.Tensor, start: int = 0, spare: int = 0) -> Encoded:
    """`[B, H, T, D]` encoded from slot `start` on, with `spare` slots behind."""
    batch, num_heads, length, head_dim = tokens.shape
    encoded = garbage(codec, (batch, num_heads, start + length + spare, head_dim), tokens.dtype, tokens.device)
    for plane, new in zip(encoded.planes, CODECS[codec].encode(tokens), strict=True):
        plane[:, :, start : start + length] = new
    return encoded


def paged(codec: str, tokens: torch.Tensor, table: torch.Tensor, spans: Spans, page_size: int) -> Encoded:
    """`[B, H, T, D]` encoded into the pages of `table`."""
    batch, num_heads, _, head_dim = tokens.shape
    num_pages = int(table.max()) + 1
    encoded = garbage(codec, (num_pages, num_heads, page_size, head_dim), tokens.dtype, tokens.device)
    for plane, new in zip(encoded.planes, CODECS[codec].encode(tokens), strict=True):
        count = 0
        for column, (low, high) in enumerate(spans):
            for row in range(batch):
                plane[int(table[row, column]), :, low:high] = new[row, :, count : count + high - low]
            count += high - low
    return encoded


def shuffled(batch: int, columns: int) -> torch.Tensor:
    """A block table of pages in no order."""
    return torch.randperm(batch * columns).view(batch, columns)


def sparse(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Bytes so far apart that their offsets need more than 32 bits, in memory that is never touched elsewhere."""
    torch.use_deterministic_algorithms(False)
    try:
        return torch.empty_strided(shape, strides, dtype=torch.int8, device=device)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def odd_spans(length: int, page_size: int) -> Spans:
    """Spans of `length` tokens: a hole in front, in the middle and behind."""
    low = page_size // 3
    spans = [(low, page_size), (0, page_size - low), (page_size - 1, page_size)]
    spans = spans if sum(high - low for low, high in spans) < length else []
    rest = length - sum(high - low for low, high in spans)
    spans += [(0, page_size)] * (rest // page_size)
    return tuple(spans + [(0, rest % page_size)] * (rest % page_size > 0))


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; that of equal infinities is 0, NaN if there is one."""
    one = one.double()
    return torch.where(one == other, 0.0, (one - other).abs()).max().item()


def check(
    attention: Attention,
    query: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    *,
    twin: Attention = attention_naive,
    **options: object,
) -> None:
    """Asserts that a kernel errs at most twice as much as plain torch does in the query's dtype."""
    arguments = (query, keys, values, layout, visibility, scoring)
    out, lse = attention(*arguments, **options)
    exact_out, exact_lse = twin(*arguments, torch.float64)
    plain_out, plain_lse = twin(*arguments, query.dtype)
    assert out.shape == exact_out.shape
    assert out.dtype == query.dtype
    assert lse.shape == exact_lse.shape
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    assert torch.equal(out[lse.isinf()], torch.zeros_like(out[lse.isinf()]))
    assert worst(out, exact_out) <= 2 * worst(plain_out, exact_out) + 1e-5
    assert worst(lse, exact_lse) <= 2 * worst(plain_lse, exact_lse) + 1e-5
