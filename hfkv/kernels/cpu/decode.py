"""Attention of few queries to encoded tokens on a CPU, without decoding them."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hfkv.codecs import Affine
from hfkv.codecs.autocast import in_own_precision
from hfkv.codecs.hadamard import rotate_states
from hfkv.kernels.cpu.bf16_matmul import bf16_products
from hfkv.kernels.cpu.int8_matmul import QUERY_DIGITS, WEIGHT_DIGITS, from_digits, int8_matmul, to_digits
from hfkv.kernels.cpu.planes import read_stretch, rotated_back
from hfkv.kernels.cpu.threads import do_parts
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended, merge, nothing, with_sink_logits
from hfkv.kernels.placed_mean import PlacedMean
from hfkv.kernels.visibility import alike, first_seen, seen
from hfkv.stores.layout import Layout

# Numbers in a stretch's scores, and bytes of its copied or unpacked tokens: they stay in the caches. The best
# of ten pairs on 2 cores of an EPYC with 32k tokens, 8 kv heads of 128, 4 queries each; others cost up to 1.5 x.
_SCORES, _COPIED = 1 << 18, 1 << 22
# Tokens. Longer stretches would lose small weights beside a large one; so many of padding cost less than a row on its
# own.
_MIN_STRETCH, _LONG, _NEAR = 256, 8192, 1024
_SLACK = 1 / 8  # of a stretch
# Numbers of keys; a stretch costs 0.3 ms besides what grows with its length, which is 0.5 ms a million.
_FOR_TWO = 1 << 22


@in_own_precision
def decode_attention(
    query: torch.Tensor, keys: Encoded, values: Encoded, layout: Layout, visibility: Visibility, scoring: Scoring
) -> Attended:
    """Attention of few queries to encoded tokens, a stretch at a time (Flash-Decoding).

    Queries and weights become fixed-point numbers of 21 and 28 bits, so that int8 products with exact sums do the
    work; the keys' scales go into the scores, the values' scales into the weights. A token is read once for all queries
    of its kv head, in its own bytes: 2 (D + 2) of them in int8.

    Args:
        query: queries `[B, Hq, q, D]` on the CPU, bf16, fp16 or fp32.
        keys, values: keys and values, each encoded by a codec with an affine form.
        layout: places of the held tokens in the planes.
        visibility: tokens that each query sees.
        scoring: treatment of the scores.

    Returns:
        The output `[B, Hq, q, Dv]` in the query's dtype, and the float32 log-sum-exp `[B, Hq, q]`, as in
        `attention_naive`.
    """
    batch, num_heads, num_queries, _ = query.shape
    kv_heads = keys.planes[0].shape[1]
    folded = query.float().reshape(batch, kv_heads, -1, query.shape[3]) * scoring.scale
    parts: tuple[torch.Tensor, ...] = (rotate_states(folded) if keys.codec.is_rotated else folded,)
    if keys.mean is not None:
        parts += folded * keys.mean.mean.vector[:, None], folded * keys.mean.mean.across[:, None]
    decode = Decode((keys,), values, layout, visibility, scoring, num_queries, num_heads, mean=keys.mean)
    return rotated_back(decode.all_rows(parts), values.codec, query.dtype)


@dataclass(frozen=True)
class Decode:
    """Attention of the queries of all rows, side by side for each kv head, to stretches of tokens.

    Attributes:
        keys: parts of the keys, one for each part of the queries; scores are the sum over parts.
        values: encoded values; None where the first part of the keys are the values too.
        dtype: dtype that products take: int8 (digits of integers; float32 of other numbers), bfloat16 or float32.
        mean: what was taken off the keys, or None. Behind the other parts the queries have two more then: what meets
            the cosines by which it is turned, and what meets the sines.
    """

    keys: tuple[Encoded, ...]
    values: Encoded | None
    layout: Layout
    visibility: Visibility
    scoring: Scoring
    num_queries: int
    num_heads: int
    dtype: torch.dtype = torch.int8
    mean: PlacedMean | None = None

    def all_rows(self, query: tuple[torch.Tensor, ...]) -> Attended:
        """Computes output `[B, Hq, q, Dv]` and log-sum-exp `[B, Hq, q]`, float32, for parts of queries `[B, H, R, Di]`.

        The queries are float32 times the scale, or bfloat16 without it.
        """
        firsts = first_seen(self.visibility, self.layout)
        num_rows = query[0][0, :, :, 0].numel()
        # Fewer rows rather than shorter stretches: a product of a few tokens costs as much as one of a hundred.
        at_most = _SCORES // (num_rows * min(max(self.layout.length, 1), _LONG))
        groups = alike(firsts, at_most, _NEAR)
        has_digits = [self.dtype == part.codec.numbers == torch.int8 for part in self.keys]
        has_digits += [False] * (len(query) - len(self.keys))
        queries = [
            [_Query.of(part[rows].flatten(0, 1), has) for part, has in zip(query, has_digits, strict=True)]
            for rows in groups
        ]
        spans = [self._spans(its_query, min(firsts[rows])) for its_query, rows in zip(queries, groups, strict=True)]
        parts = [(group, span) for group, of_group in enumerate(spans) for span in of_group]
        attended = iter(do_parts(lambda part: self._part(queries[part[0]], groups[part[0]], *part[1]), parts))
        done = [
            functools.reduce(merge, itertools.islice(attended, len(of_group))) if of_group else self._nothing(its_query)
            for its_query, of_group in zip(queries, spans, strict=True)
        ]
        out, lse = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*done, strict=True))
        shape = (len(firsts), self.num_heads, self.num_queries)
        return with_sink_logits(Attended(out.view(*shape, -1), lse.view(shape)), self.scoring.sink_logits)

    def _spans(self, query: list[_Query], first: int) -> list[tuple[int, int]]:
        """Cuts the tokens from `first` on into stretches, for queries `[N, R, Di]`; N = rows · H, R = G · q."""
        count, num_rows, _ = query[0].states.shape
        keys = self.keys[0]
        length = _SCORES // (count * num_rows)
        if self.dtype != torch.bfloat16:
            length = min(length, _LONG)
        at_most = _COPIED if self.dtype != torch.bfloat16 or self.layout.is_paged else 4 * _COPIED
        for part in (keys, self.values or keys):
            if part.planes[0].dtype == self.dtype == torch.int8 and not self.layout.is_paged:
                continue  # read where it lies
            # Numbers that int8 does not hold come in float32.
            is_wide = part.codec.numbers == torch.bfloat16 or self.dtype == torch.int8 != part.codec.numbers
            length = min(length, at_most // (count * part.head_dim * (4 if is_wide else self.dtype.itemsize)))
        length = max(length, _MIN_STRETCH)
        # A little longer rather than a few tokens on their own, but two where that is worth a second thread.
        least = 2 if (self.layout.length - first) * count * keys.head_dim >= _FOR_TWO else 1
        num_spans = max(math.ceil((self.layout.length - first) / length - _SLACK), least)
        length = max(math.ceil((self.layout.length - first) / num_spans), 1)
        return [(begin, min(begin + length, self.layout.length)) for begin in range(first, self.layout.length, length)]

    def _nothing(self, query: list[_Query]) -> Attended:
        return nothing(query[0].states.float(), (self.values or self.keys[0]).head_dim)

    def _part(self, query: list[_Query], rows: slice, begin: int, end: int) -> Attended:
        """Computes output `[N, R, Dv]` and log-sum-exp `[N, R]` of queries `[N, R, Di]` over one stretch."""
        first, *others = (read_stretch(part, self.layout, rows, begin, end, self.dtype) for part in self.keys)
        scores = _scores(query[0], first)
        for part, stretch in zip(query[1:], others, strict=False):
            scores += _scores(part, stretch)
        if self.mean is not None:
            for part, waves in zip(query[-2:], self.mean.of_rows(rows).waves(begin, end), strict=True):
                # All heads at once; all rows too, where they stand alike.
                side_by_side = part.states.view(len(waves), -1, waves.shape[-1])
                scores += (side_by_side @ waves.transpose(1, 2)).view(scores.shape)
        if query[0].states.dtype == torch.bfloat16:
            scores *= self.scoring.scale
        if self.scoring.softcap is not None:
            scores = scores.div_(self.scoring.softcap).tanh_().mul_(self.scoring.softcap)
        visible = seen(self.visibility, self.layout, rows, begin, end, self.num_queries)
        if visible is not None:
            groups = scores.unflatten(0, (rows.stop - rows.start, -1)).unflatten(2, (-1, self.num_queries))
            hidden = ~visible.unflatten(1, (1, 1) if visible.shape[1] == 1 else groups.shape[1:3])
            groups.masked_fill_(hidden, -torch.inf)
        scores = scores.contiguous()
        top = scores.amax(-1, keepdim=True)
        if visible is not None:
            top.masked_fill_(top == -torch.inf, 0)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        if self.values is not None:
            first = read_stretch(self.values, self.layout, rows, begin, end, self.dtype)
        out = _output(weights, first) / total.clamp_min(torch.finfo(torch.float32).tiny)
        return Attended(out, (top + total.log())[..., 0])


class _Query(NamedTuple):
    """Queries in the form that products with every stretch take.

    Attributes:
        states: queries `[N, R, Di]`.
        digits: digits of the queries, int8 `[N, 3, R, Di]`, or None.
        scale: scale of the digits, float32 `[N, R, 1]`, or None.
    """

    states: torch.Tensor
    digits: torch.Tensor | None
    scale: torch.Tensor | None

    @classmethod
    def of(cls, states: torch.Tensor, has_digits: bool) -> _Query:
        return cls(states, *(to_digits(states, QUERY_DIGITS) if has_digits else (None, None)))


def _scores(query: _Query, keys: Affine) -> torch.Tensor:
    """Scores, float32 `[N, R, n]`."""
    if query.digits is not None and query.scale is not None:
        scores = from_digits(_products(query.digits, keys.numbers.transpose(1, 2))).mul_(query.scale)
    elif keys.numbers.dtype == torch.bfloat16:
        scores = bf16_products(keys.numbers, query.states)
    else:
        scores = query.states @ keys.numbers.transpose(1, 2)
    if keys.scale is not None:
        scores *= keys.scale[:, None]
    return scores if keys.low is None else scores.addcmul_(query.states.sum(-1, keepdim=True), keys.low[:, None])


def _output(weights: torch.Tensor, values: Affine) -> torch.Tensor:
    """Output, float32 `[N, R, Dv]`, for weights `[N, R, n]`."""
    scaled = weights if values.scale is None else weights * values.scale[:, None]
    if values.numbers.dtype == torch.int8:
        digits, scale = to_digits(scaled, WEIGHT_DIGITS)
        out = from_digits(_products(digits, values.numbers)).mul_(scale)
    else:
        out = (scaled.to(values.numbers.dtype) @ values.numbers).float()
    return out if values.low is None else out.add_(weights @ values.low[..., None])


def _products(digits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Digits `[N, c, R, K]` times `[N, K, n]`, int32 `[N, c, R, n]`: one by one, since torch has no batched product."""
    sums = torch.empty(*digits.shape[:-1], numbers.shape[-1], dtype=torch.int32)
    for a, b, out in zip(digits.flatten(1, 2), numbers, sums.flatten(1, 2), strict=True):
        int8_matmul(a, b, out)
    return sums
