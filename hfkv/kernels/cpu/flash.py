"""Attention to tokens of any codec on a CPU, decoded a stretch at a time where they must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from hfkv.codecs.autocast import in_own_precision
from hfkv.codecs.hadamard import rotate_states
from hfkv.kernels.cpu.planes import decode_stretch, rotated_back
from hfkv.kernels.cpu.threads import do_parts
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended, merge_all, nothing, with_sink_logits
from hfkv.kernels.visibility import alike, bounds_of, first_seen, seen
from hfkv.stores.layout import Layout

# Queries looked at together, and tokens decoded together: a token is decoded once for so many queries.
TILE, STRETCH = 1024, 2048
MIN_TILE, MIN_STRETCH = 64, 256
SHORT = 512  # tokens of padding that cost less than a row on its own


@in_own_precision
def flash_attention(
    query: torch.Tensor, keys: Encoded, values: Encoded, layout: Layout, visibility: Visibility, scoring: Scoring
) -> Attended:
    """Attention of any number of queries, a stretch of tokens at a time (FlashAttention).

    The padding of a row is neither decoded nor attended to, keys are not repeated for the heads that share them, a
    mask is made only for a tile of queries and a stretch, and no more than `STRETCH` tokens are decoded at any time.
    Plain tokens in contiguous planes are read where they lie.

    Arguments and results are the same as in `decode_attention`; a codec may also have no affine form.
    """
    num_queries = query.shape[2]
    attended = nothing(query, values.head_dim)
    firsts = first_seen(visibility, layout)
    is_plain = keys.codec.is_lossless and values.codec.is_lossless
    is_read = is_plain and not layout.is_paged
    at_most = len(firsts) if is_read else STRETCH // MIN_STRETCH
    near = SHORT if num_queries == 1 or layout.length <= SHORT else 0
    dtype = query.dtype if is_plain else _compute_dtype(query.dtype, num_queries)
    for rows in alike(firsts, at_most, near):
        length = max(layout.length, 1) if is_read else max(STRETCH // (rows.stop - rows.start), MIN_STRETCH)
        for tile in tiles(visibility, layout, scoring, rows, min(firsts[rows]), num_queries):
            its_query = query[rows, :, tile.queries]
            if keys.codec.is_rotated:
                its_query = rotate_states(its_query.float())
            its_query = its_query.to(dtype)

            def attend(stretch: tuple[int, int], query: torch.Tensor = its_query, tile: Tile = tile) -> Attended:
                key, value = (decode_stretch(states, layout, tile.rows, *stretch, dtype) for states in (keys, values))
                return tile.attend(query, key, value, *stretch)

            stretches = tile.stretches(length)
            # With many queries the operations are large ones, and outputs of every stretch would be held at once.
            is_few = num_queries < MIN_TILE and not is_read
            parts = do_parts(attend, list(stretches)) if is_few else map(attend, stretches)
            part = merge_all(parts) or nothing(its_query, values.head_dim)
            out, lse = rotated_back(part, values.codec, query.dtype)
            attended.out[rows, :, tile.queries], attended.lse[rows, :, tile.queries] = out, lse
    out, lse = with_sink_logits(attended, scoring.sink_logits)
    return Attended(out.to(query.dtype), lse)


def _compute_dtype(dtype: torch.dtype, num_queries: int) -> torch.dtype:
    """The dtype in which queries of `dtype` attend to decoded tokens."""
    # A rotated row, or one whose scale was rounded up, may be beyond float16; and in bfloat16 what was decoded would
    # be rounded once more, which for few queries saves nothing.
    return torch.float32 if dtype == torch.float16 or num_queries < MIN_TILE else dtype


def tiles(
    visibility: Visibility, layout: Layout, scoring: Scoring, rows: slice, first: int, num_queries: int
) -> Iterator[Tile]:
    """Yields the queries of rows that go together, in tiles, except queries that see nothing.

    Args:
        first: index of the first token that the queries of `rows` may see.
    """
    # Rows that go together may differ in padding, which sees nothing.
    pads = 0 if visibility.mask is not None else min(visibility.pads[rows])
    padding = max(pads - (visibility.seen - num_queries), 0)
    length = _tile_length(visibility, num_queries)
    for begin in range(padding, num_queries, length):
        queries = slice(begin, min(begin + length, num_queries))
        # Where only a part of the tokens is given, the queries' own may not be among them.
        own = visibility.seen - num_queries + begin + visibility.num_slots - visibility.held_from
        yield Tile(queries, layout, _of(visibility, queries, num_queries), scoring, rows, first, own)


def _tile_length(visibility: Visibility, num_queries: int) -> int:
    """The number of queries looked at together: about half a window, so that little is computed in vain."""
    if visibility.bounds is None or num_queries == 1:
        return TILE
    size = visibility.seen - int(visibility.bounds[:, -1].min())
    return min(max(size // 2, MIN_TILE), TILE)


def _of(visibility: Visibility, queries: slice, num_queries: int) -> Visibility:
    """The visibility for `queries`, of `num_queries` in all."""
    return replace(
        visibility,
        seen=visibility.seen - num_queries + queries.stop,
        bounds=None if visibility.bounds is None else visibility.bounds[:, queries],
        mask=None if visibility.mask is None else visibility.mask[:, :, queries],
    )


@dataclass(frozen=True)
class Tile:
    """Some queries of rows that go together.

    Attributes:
        queries: slice of all queries.
        visibility: tokens that these queries see.
        first: index of the first token that they may see.
        own: index of the first query's own token.
    """

    queries: slice
    layout: Layout
    visibility: Visibility
    scoring: Scoring
    rows: slice
    first: int
    own: int

    def stretches(self, at_most: int) -> Iterator[tuple[int, int]]:
        """Yields stretches of `at_most` tokens that some query sees; many queries' own tokens are one by itself."""
        for begin, end in self._spans():
            is_own = begin >= self.own and self._is_many and self.visibility.mask is None
            length = end - begin if is_own else at_most
            for start in range(begin, end, max(length, 1)):
                yield start, min(start + length, end)

    @property
    def _is_many(self) -> bool:
        return self.queries.stop - self.queries.start > 1

    def _spans(self) -> Iterator[tuple[int, int]]:
        visibility, first, length = self.visibility, self.first, self.layout.length
        if visibility.mask is not None:
            yield first, length
            return
        own, end = (min(self.own + count, length) for count in (0, self.queries.stop - self.queries.start))
        if visibility.bounds is not None:
            shift = visibility.num_slots - visibility.held_from
            bounds = visibility.bounds[self.rows] if len(visibility.bounds) > 1 else visibility.bounds
            lowest, highest = (int(bound) + shift for bound in bounds.aminmax())
            behind_sinks = max(visibility.num_slots, max(visibility.pads[self.rows]) + visibility.sinks + shift)
            if behind_sinks < lowest:
                yield first, min(behind_sinks, own)
                first = max(first, lowest)
            if self._is_many:
                # Tokens that only some of the queries see, on their own: the rest needs no mask.
                highest = min(highest, own)
                yield first, highest
                first = max(first, highest)
        if self._is_many:
            yield first, own
            first = max(first, own)
        yield first, end

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, begin: int, end: int) -> Attended:
        """Attention of the queries `[rows, Hq, q, D]` to the tokens `begin .. end - 1`, given as `[rows, H, n, D]`."""
        visible = seen(self.visibility, self.layout, self.rows, begin, end, query.shape[2])
        if self.scoring.softcap is not None or key.shape[3] != value.shape[3]:
            return _explicit(query, key, value, visible, self.scoring)
        if visible is not None and self._is_causal(begin, end - begin, query.shape[2]):
            return _causal(query, key, value, self.scoring.scale)
        return _flash(query, key, value, visible, self.scoring.scale)

    def _is_causal(self, begin: int, count: int, num_queries: int) -> bool:
        """Whether each query sees exactly the tokens up to its own."""
        visibility = self.visibility
        if visibility.mask is not None or begin < visibility.num_slots:
            return False
        if bounds_of(visibility, self.rows, begin) is not None:
            return False
        first = visibility.held_from + begin - visibility.num_slots
        return begin == self.own and count == num_queries > 1 and max(visibility.pads[self.rows]) <= first


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Attended:
    """Causal attention; one query head of every kv head at a time, so that no kv head is repeated."""
    heads = key.shape[1]
    if heads == query.shape[1]:
        return Attended(*_flash_op(query, key, value, None, scale, is_causal=True))
    groups = query.unflatten(1, (heads, -1)).unbind(2)
    done = [_flash_op(group, key, value, None, scale, is_causal=True) for group in groups]
    out, lse = (torch.stack(parts, dim=2).flatten(1, 2) for parts in zip(*done, strict=True))
    return Attended(out, lse)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scale: float
) -> Attended:
    """Attention with the queries that share a kv head side by side."""
    heads = query.shape[1:3]
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
        groups = heads[0] // key.shape[1]
        mask = mask.repeat(1, 1, groups, 1) if mask.shape[1] == 1 else mask.unflatten(1, (-1, groups)).flatten(2, 3)
    folded = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    out, lse = _flash_op(folded, key, value, mask, scale, is_causal=False)
    out, lse = out.reshape(len(out), *heads, -1), lse.reshape(len(out), *heads)
    if visible is not None:
        sees_none = ~visible.any(-1)
        out, lse = out.masked_fill(sees_none[..., None], 0), lse.masked_fill(sees_none, -torch.inf)
    return Attended(out, lse)


def _flash_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator that scaled_dot_product_attention runs on a CPU, called itself for its log-sum-exp."""
    # It is slow with one row in bfloat16: 27 ms for 8 heads of 32k tokens, 11 ms with two rows (2 cores of an EPYC).
    if query.shape[2] == 1 and query.dtype == torch.bfloat16:
        twice = query.expand(-1, -1, 2, -1)
        mask = None if mask is None else mask.expand(-1, -1, 2, -1)
        out, lse = _flash_op(twice, key, value, mask, scale, is_causal=False)
        return out[:, :, :1], lse[:, :, :1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )


def _explicit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scoring: Scoring
) -> Attended:
    """Attention with a softcap or values of another width, which the operator does not know: a kv head at a time."""
    groups = query.shape[1] // key.shape[1]

    def attend(head: int) -> Attended:
        heads = slice(head * groups, (head + 1) * groups)
        scores = (query[:, heads] * scoring.scale).float() @ key[:, head, None].float().transpose(2, 3)
        if scoring.softcap is not None:
            scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        if visible is not None:
            scores.masked_fill_(~(visible if visible.shape[1] == 1 else visible[:, heads]), -torch.inf)
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_()
        return Attended(weights @ value[:, head, None].float(), lse)

    heads = range(key.shape[1])
    done = do_parts(attend, heads) if query.shape[2] < MIN_TILE else list(map(attend, heads))
    out, lse = (torch.cat(parts, dim=1) for parts in zip(*done, strict=True))
    return Attended(out, lse)
