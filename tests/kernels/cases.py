"""Random encoded tokens, what queries see of them, and the error a kernel may have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hfkv.codecs import CODECS, Codecs
from hfkv.codecs.log_scale import NO_NUMBERS
from hfkv.kernels.encoding import encode
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.naive import attention_naive
from hfkv.policy.codec_pair import sides_of
from hfkv.stores.layout import Layout


@dataclass(frozen=True)
class Case:
    """Arguments of an attention kernel."""

    query: torch.Tensor
    keys: Encoded
    values: Encoded
    layout: Layout
    visibility: Visibility
    scoring: Scoring

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.query, self.keys, self.values, self.layout, self.visibility, self.scoring


def case(
    codec: str = "int8",
    *,
    batch: int = 1,
    kv_heads: int = 2,
    groups: int = 4,
    num_queries: int = 1,
    length: int = 63,
    head_dim: int = 64,
    value_dim: int | None = None,
    pads: tuple[int, ...] | None = None,
    page_size: int | None = None,
    odd_spans: bool = False,
    softcap: float | None = None,
    sink_logits: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """The newest `num_queries` of `length` tokens attend to all; contiguous planes begin at 3 and end 5 before their
    end.
    """
    torch.manual_seed(seed)
    value_dim = value_dim or head_dim
    parts, layout = [], Layout(length)
    for name, dim in zip(sides_of(codec), (head_dim, value_dim), strict=True):
        states = torch.randn(batch, kv_heads, length, dim, dtype=dtype)
        planes = encode(
            Codecs(CODECS[name], CODECS[name]), states, states
        )  # by the kernel, where there is one: int2 takes torch its time
        planes = planes[: len(planes) // 2]
        placed = []
        for plane in planes:
            if page_size is None:
                layout = Layout(length, start=3)
                placed.append(_in_buffer(plane))
            else:
                torch.manual_seed(seed)  # the same pages for every plane
                layout, pages = _in_pages(plane, page_size, odd_spans)
                placed.append(pages)
        parts.append(Encoded(CODECS[name], tuple(placed), dim))
    query = torch.randn(batch, kv_heads * groups, num_queries, head_dim, dtype=dtype) * 2
    logits = torch.randn(kv_heads * groups) if sink_logits else None
    scoring = Scoring(head_dim**-0.5, softcap, logits)
    return Case(query, parts[0], parts[1], layout, Visibility(length, pads or (0,) * batch), scoring)


def spoil(scales: torch.Tensor) -> None:
    """Makes scales say that their rows are no numbers."""
    scales.fill_(torch.nan if scales.is_floating_point() else NO_NUMBERS)


def _in_buffer(plane: torch.Tensor) -> torch.Tensor:
    buffer = _poisoned((*plane.shape[:2], plane.shape[2] + 8, plane.shape[3]), plane.dtype)
    buffer[:, :, 3 : 3 + plane.shape[2]] = plane
    return buffer


def _in_pages(plane: torch.Tensor, page_size: int, odd_spans: bool) -> tuple[Layout, torch.Tensor]:
    batch, heads, length, width = plane.shape
    spans, left = [], length
    while left:
        low, high = (1, page_size - 1) if odd_spans and page_size > 2 and len(spans) % 2 == 0 else (0, page_size)
        high = min(high, low + left)
        spans.append((low, high))
        left -= high - low
    order = torch.randperm(batch * len(spans) + 2)[: batch * len(spans)].view(batch, -1)
    pages = _poisoned((batch * len(spans) + 2, heads, page_size, width), plane.dtype)
    begin = 0
    for column, (low, high) in enumerate(spans):
        for row in range(batch):
            pages[order[row, column], :, low:high] = plane[row, :, begin : begin + high - low]
        begin += high - low
    return Layout(length, table=order, spans=tuple(spans)), pages


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """All bits set: NaN for floats, garbage for integers."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((size,), 0xFF, dtype=torch.uint8).view(dtype).view(shape)


def check(kernel: Any, given: Case, twin: Any = attention_naive) -> None:
    """The error against the twin in float64 is at most twice that of the twin in the query's dtype, and 1e-5."""
    exact = twin(*given.arguments, dtype=torch.float64)
    plain = twin(*given.arguments, dtype=given.query.dtype)
    got = kernel(*given.arguments)
    assert got[0].dtype == given.query.dtype
    for ours, theirs, expected in zip(got, plain, exact, strict=True):
        assert ours.shape == expected.shape
        assert torch.equal(ours.isinf(), expected.isinf())
        finite = ~expected.isinf()
        error, allowed = ((part.double() - expected)[finite] for part in (ours, theirs))
        assert not error.isnan().any()
        if finite.any():
            assert error.abs().max() <= 2 * allowed.abs().max() + 1e-5


def windowed(given: Case, size: int, sinks: int, num_slots: int, held_from: int) -> Case:
    """The same tokens under a window: the first `num_slots` are sink slots, the others begin at `held_from`."""
    num_queries = given.query.shape[2]
    newest = given.layout.length - num_slots
    seen = held_from + newest
    pads = torch.tensor(given.visibility.pads)[:, None]
    t = torch.arange(seen - num_queries, seen) - pads
    bounds = pads + (t + 1 - size).clamp_min(0)
    visibility = replace(
        given.visibility, seen=seen, held_from=held_from, num_slots=num_slots, sinks=sinks, bounds=bounds
    )
    return replace(given, visibility=visibility)


def cut_short(monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    """Has torch's kernels for a CPU cut short texts in several stretches and tiles, as they cut long ones."""
    monkeypatch.setattr("hfkv.kernels.cpu.decode._SCORES", 1 << 10)
    monkeypatch.setattr("hfkv.kernels.cpu.decode._MIN_STRETCH", 16)
    monkeypatch.setattr("hfkv.kernels.cpu.flash.TILE", 24)
    monkeypatch.setattr("hfkv.kernels.cpu.flash.MIN_TILE", 5)
    monkeypatch.setattr("hfkv.kernels.cpu.flash.STRETCH", stretch)
    monkeypatch.setattr("hfkv.kernels.cpu.flash.MIN_STRETCH", 16)
