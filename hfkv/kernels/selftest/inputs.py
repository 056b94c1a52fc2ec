"""Random arguments for the kernels that `selftest` tests; memory without tokens is poison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hfkv.codecs import CODECS
from hfkv.codecs.key_mean import KeyMean
from hfkv.codecs.waves import Waves
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.placed_mean import PlacedMean
from hfkv.policy.codec_pair import sides_of
from hfkv.stores.layout import Layout

STORES = ("contiguous", "paged")
# A page of an accelerator's store. The tokens fill three and a bit, and more than one split of a decode kernel.
PAGE_SIZE, NUM_TOKENS = 64, 203
NUM_KV_HEADS = 2


class HeadShape(NamedTuple):
    """The dimensions of a layer's heads: Dk, Dv and G; or r, dr and Hq for latents, which are one kv head.

    Attributes:
        key_dim, value_dim: widths of the cached keys and values.
        groups: number of query heads of each kv head.
        is_latent: whether absorbed queries attend to the cache (see `latent_attention_naive`).
    """

    key_dim: int = 64
    value_dim: int = 64
    groups: int = 4
    is_latent: bool = False

    @property
    def query_dim(self) -> int:
        """The width of the queries that the kernel is given."""
        return self.key_dim + self.value_dim if self.is_latent else self.key_dim

    @property
    def num_kv_heads(self) -> int:
        """The number of kv heads that are tested."""
        return 1 if self.is_latent else NUM_KV_HEADS


@dataclass(frozen=True)
class Scenario:
    """The conditions of attention besides its tokens and queries.

    Attributes:
        name: name for the reader.
        pads: number of pad tokens of each row.
        window: whether a window hides tokens, its sinks in slots.
        softcap: see `Scoring`.
        has_sink_logits: see `Scoring`.
        has_mean: whether a mean was taken off the keys.
    """

    name: str
    pads: tuple[int, ...] = (0,)
    window: bool = False
    softcap: float | None = None
    has_sink_logits: bool = False
    has_mean: bool = False


SETTINGS = (
    Scenario("plain"),
    # One row is nothing but padding.
    Scenario("left padding", pads=(0, 17, NUM_TOKENS)),
    # The second row's text begins so late that two of its sinks are still among the newest tokens.
    Scenario("window and sinks", pads=(0, 38), window=True),
    Scenario("softcap and sink logits", softcap=5.0, has_sink_logits=True),
    # Of codecs that a patched model has it taken off for. Rows, and sinks in slots, have positions of their own.
    Scenario("window, sinks and keys less their mean", pads=(0, 21), window=True, has_mean=True),
)
WINDOW_SIZE, NUM_SINKS, HELD_FROM = 100, 4, 40


def random_arguments(
    heads: HeadShape,
    codec: str,
    store: str,
    num_queries: int,
    setting: Scenario,
    device: torch.device,
    dtype: torch.dtype,
    values_innermost: bool = False,
) -> tuple[torch.Tensor, Encoded, Encoded, Layout, Visibility, Scoring]:
    """Makes random arguments of an attention kernel; memory without tokens is poison.

    Args:
        heads, codec, store, num_queries, setting, device, dtype: what to make arguments for.
        values_innermost: whether the tokens of the values' data lie side by side; see `hfkv.kernels.backend.Asked`.
    """
    generator = torch.Generator().manual_seed(0)
    batch, num_heads = len(setting.pads), heads.num_kv_heads * heads.groups
    layout = random_layout(batch, store, generator)
    parts = []
    for name, dim in zip(sides_of(codec), heads[:2], strict=True):
        planes = CODECS[name].encode(randn((batch, heads.num_kv_heads, NUM_TOKENS, dim), device, dtype, generator))
        parts.append(Encoded(CODECS[name], tuple(_placed(plane, layout) for plane in planes), dim))
    if values_innermost:
        parts[1] = turned(parts[1])
    if setting.has_mean:
        parts[0] = parts[0]._replace(mean=_mean(heads, setting, device, generator))
    query = randn((batch, num_heads, num_queries, heads.query_dim), device, dtype, generator) * 2
    logits = randn((num_heads,), device, dtype, generator) if setting.has_sink_logits else None
    scoring = Scoring(heads.query_dim**-0.5, setting.softcap, logits)
    return query, parts[0], parts[1], layout, _visibility(setting, num_queries, device), scoring


def _visibility(setting: Scenario, num_queries: int, device: torch.device) -> Visibility:
    if not setting.window:
        return Visibility(NUM_TOKENS, setting.pads)
    seen = HELD_FROM + NUM_TOKENS - NUM_SINKS
    pads = torch.tensor(setting.pads, device=device)[:, None]
    t = torch.arange(seen - num_queries, seen, device=device) - pads
    return Visibility(
        seen,
        setting.pads,
        held_from=HELD_FROM,
        num_slots=NUM_SINKS,
        sinks=NUM_SINKS,
        bounds=pads + (t + 1 - WINDOW_SIZE).clamp_min(0),
    )


def _mean(heads: HeadShape, setting: Scenario, device: torch.device, generator: torch.Generator) -> PlacedMean:
    half = heads.key_dim // 2
    waves = Waves(1e4 ** -(torch.arange(half, dtype=torch.float64) / half), False, heads.key_dim)
    vector = randn((heads.num_kv_heads, heads.key_dim), device, torch.float32, generator)
    first, num_slots = (HELD_FROM - NUM_SINKS, NUM_SINKS) if setting.window else (0, 0)
    return PlacedMean(KeyMean(vector, waves), tuple(first - pad for pad in setting.pads), num_slots)


def randn(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


def random_layout(batch: int, store: str, generator: torch.Generator) -> Layout:
    """A layout of contiguous tokens from slot 3 on, or of shuffled pages, every other one cut as drops leave them."""
    if store == "contiguous":
        return Layout(NUM_TOKENS, start=3)
    spans: list[tuple[int, int]] = []
    left = NUM_TOKENS
    while left:
        low, high = (0, PAGE_SIZE) if len(spans) % 2 else (5, PAGE_SIZE - 1)
        high = min(high, low + left)
        spans.append((low, high))
        left -= high - low
    table = torch.randperm(batch * len(spans), generator=generator).view(batch, -1)
    return Layout(NUM_TOKENS, table=table, spans=tuple(spans))


def _placed(plane: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Puts a plane `[B, H, T, d]` where the layout says."""
    batch, heads, length, width = plane.shape
    if layout.table is None:
        buffer = _poisoned((batch, heads, length + 8, width), plane)
        buffer[:, :, layout.start : layout.start + length] = plane
        return buffer
    pages = _poisoned((layout.table.numel(), heads, PAGE_SIZE, width), plane)
    for column, (begin, (low, high)) in enumerate(zip(layout.begins, layout.spans, strict=True)):
        for row in range(batch):
            pages[layout.table[row, column], :, low:high] = plane[row, :, begin : begin + high - low]
    return pages


def room(codec: str, new: torch.Tensor, layout: Layout) -> Encoded:
    """Makes planes of poison with room for the tokens held and the new ones `[B, H, n, D]`."""
    batch, heads, count, head_dim = new.shape
    blocks, slots = (batch, layout.start + layout.length + count + 2) if layout.table is None else (0, PAGE_SIZE)
    blocks = blocks if layout.table is None else layout.table.numel()
    planes = CODECS[codec].encode(new)
    return Encoded(CODECS[codec], tuple(_poisoned((blocks, heads, slots, p.shape[3]), p) for p in planes), head_dim)


def turned(tokens: Encoded) -> Encoded:
    """The same tokens, those of the data side by side."""
    data, *scales = tokens.planes
    return tokens._replace(planes=(data.transpose(2, 3).contiguous().transpose(2, 3), *scales))


def _poisoned(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Makes memory with all bits set: NaN for floats, garbage for integers."""
    size = torch.Size(shape).numel() * like.element_size()
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=like.device).view(like.dtype).view(shape)
