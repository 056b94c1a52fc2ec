"""Attention of many queries on a CPU to latents that are expanded a stretch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from hfkv.codecs.autocast import in_own_precision
from hfkv.codecs.hadamard import rotate_states
from hfkv.kernels.cpu import flash as cpu_flash
from hfkv.kernels.cpu.flash import Tile, tiles
from hfkv.kernels.cpu.planes import decode_stretch
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended, merge, nothing, with_sink_logits
from hfkv.kernels.visibility import alike, first_seen
from hfkv.stores.layout import Layout

Expand = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@in_own_precision
def expanded_attention(
    query: torch.Tensor,
    latents: Encoded,
    rotary: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    *,
    expand: Expand,
) -> Attended:
    """Attention of many queries to expanded latents; each stretch is expanded once for all queries.

    No more than `STRETCH` tokens are decoded and expanded at any time; padding, and tokens that no query sees, never
    are.

    Args:
        query: queries `[B, Hq, q, dn + dr]` on the CPU, bf16, fp16 or fp32.
        latents: encoded latents `[B, 1, T, r]`, contiguous or in pages.
        rotary: encoded rotary keys `[B, 1, T, dr]`, in the same rows of the same store; all heads share this part.
        layout: places of the held tokens in the planes.
        visibility: tokens that each query sees.
        scoring: treatment of the scores.
        expand: function that makes the other part of keys `[rows, Hq, n, dn]` and values `[rows, Hq, n, dv]` from
            latents `[rows, 1, n, r]`, n >= 1, in the query's dtype.

    Returns:
        The output `[B, Hq, q, dv]` in the query's dtype, and the float32 log-sum-exp `[B, Hq, q]`, as in
        `attention_naive` with keys and values expanded.
    """
    num_queries = query.shape[2]
    attended = None
    firsts = first_seen(visibility, layout)
    near = cpu_flash.SHORT if layout.length <= cpu_flash.SHORT else 0
    # As many rows as fit into a stretch.
    for rows in alike(firsts, cpu_flash.STRETCH // max(layout.length, cpu_flash.MIN_STRETCH), near):
        some = list(tiles(visibility, layout, scoring, rows, min(firsts[rows]), num_queries))
        parts = _Expanded(latents, rotary, layout, rows, expand).attend(query[rows], some)
        for tile, part in zip(some, parts, strict=True):
            if part is None:
                continue
            if attended is None:
                attended = nothing(query, part.out.shape[3])
            attended.out[rows, :, tile.queries], attended.lse[rows, :, tile.queries] = part
    if attended is None:
        attended = nothing(query, expand(query.new_zeros(1, 1, 1, latents.head_dim))[1].shape[3])
    out, lse = with_sink_logits(attended, scoring.sink_logits)
    return Attended(out.to(query.dtype), lse)


class _Expanded:
    """The keys and values of rows that go together, a stretch of them at a time."""

    def __init__(self, latents: Encoded, rotary: Encoded, layout: Layout, rows: slice, expand: Expand) -> None:
        self.latents, self.rotary, self.layout, self.rows, self.expand = latents, rotary, layout, rows, expand
        self.length = cpu_flash.STRETCH // (rows.stop - rows.start)
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(self, query: torch.Tensor, some: list[Tile]) -> list[Attended | None]:
        """Attention of each tile, None where it sees nothing; `query` is `[rows, Hq, q, dn + dr]`."""
        done: list[Attended | None] = [None] * len(some)
        spans = [list(tile.stretches(self.layout.length)) for tile in some]
        for begin, end in self._stretches(some):
            shown = [
                (index, max(low, begin), min(high, end))
                for index, of_tile in enumerate(spans)
                for low, high in of_tile
                if max(low, begin) < min(high, end)
            ]
            if not shown:
                continue
            # The part of the stretch that is seen.
            low, high = min(part[1] for part in shown), max(part[2] for part in shown)
            keys, values, value_dim = self._read(low, high, query.dtype)
            if query.shape[3] < keys.shape[3]:
                query = torch.nn.functional.pad(query, (0, keys.shape[3] - query.shape[3]))
            for index, start, stop in shown:
                tile, held = some[index], slice(start - low, stop - low)
                part = tile.attend(query[:, :, tile.queries], keys[:, :, held], values[:, :, held], start, stop)
                part = Attended(part.out[..., :value_dim], part.lse)
                before = done[index]
                done[index] = part if before is None else merge(before, part)
        return done

    def _stretches(self, some: list[Tile]) -> Iterator[tuple[int, int]]:
        """Yields all tokens that tiles may see, in stretches that cut no tile's own tokens."""
        if not some:
            return
        first, own, end = some[0].first, max(some[0].own, some[0].first), self.layout.length
        of_tile = some[0].queries.stop - some[0].queries.start
        length = max(self.length // of_tile, 1) * of_tile
        for begin in range(first, own, self.length):
            yield begin, min(begin + self.length, own)
        for begin in range(own, end, length):
            yield begin, min(begin + length, end)

    def _read(self, begin: int, end: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Reads keys and values `[rows, Hq, n, max(dn + dr, dv)]`, zeros behind them, and dv."""
        rotary = self._decoded(self.rotary, begin, end, dtype)
        nope, value = self.expand(self._decoded(self.latents, begin, end, dtype))
        widths = nope.shape[3], nope.shape[3] + rotary.shape[3], value.shape[3]
        if self.buffers is None:
            # The operator takes keys and values of one width.
            shape = (*nope.shape[:2], min(self.length, self.layout.length), max(widths))
            self.buffers = nope.new_empty(shape), nope.new_empty(shape)
            for states, width in zip(self.buffers, widths[1:], strict=True):
                states[..., width:] = 0
        keys, values = (states[:, :, : end - begin] for states in self.buffers)
        keys[..., : widths[0]] = nope
        keys[..., widths[0] : widths[1]] = rotary
        values[..., : widths[2]] = value
        return keys, values, widths[2]

    def _decoded(self, encoded: Encoded, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Decodes tokens to `[rows, 1, n, D]` of `dtype`."""
        if not encoded.codec.is_rotated:
            return decode_stretch(encoded, self.layout, self.rows, begin, end, dtype)
        return rotate_states(decode_stretch(encoded, self.layout, self.rows, begin, end, torch.float32)).to(dtype)
