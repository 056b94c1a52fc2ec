"""Attention in the latent space on a CPU: the latents are read once, as keys and as values of all heads."""

from __future__ import annotations

import torch

from hfkv.codecs import Codec
from hfkv.codecs.autocast import in_own_precision
from hfkv.codecs.hadamard import rotate_states
from hfkv.kernels.cpu import bf16_matmul, int8_matmul
from hfkv.kernels.cpu.decode import Decode
from hfkv.kernels.cpu.planes import rotated_back
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.stores.layout import Layout

# Queries of all heads from which on int8 is cast to bfloat16 a stretch at a time: the digits of a query are three rows,
# of a weight four. One core of an EPYC, 4k tokens of 512, bfloat16 queries: 32 rows 7.9 against 8.7 ms, 64 rows
# 9.9 against 13.8, 256 rows 21 against 30, but 16 rows 8.9 against 7.3. Casting to float32 lost in all of these.
_MANY = 32


@in_own_precision
def latent_attention(
    query: torch.Tensor, latents: Encoded, rotary: Encoded, layout: Layout, visibility: Visibility, scoring: Scoring
) -> Attended:
    """Attention of absorbed queries to latents and rotary keys, a stretch at a time.

    A latent is read once for all heads, in its own bytes: 2 (r + dr) of bfloat16, r + dr + 4 of int8. Scores are never
    rounded to half precision: int8 and int4 are multiplied by digits of queries (see `decode_attention`), bfloat16
    twice (see `bf16_products`), as are the codes of fp8 and, for many queries, of int8, which bfloat16 holds exactly.

    Args:
        query: absorbed queries `[B, Hq, q, r + dr]` on the CPU, bf16, fp16 or fp32: the part that goes with latents,
            then the one that goes with rotary keys.
        latents: encoded latents `[B, 1, T, r]`, contiguous or in pages; they are the values too.
        rotary: rotary keys `[B, 1, T, dr]`, by the same codec or another, in the same rows of the same store.
        layout: places of the held tokens in the planes.
        visibility: tokens that each query sees.
        scoring: treatment of the scores.

    Returns:
        The output `[B, Hq, q, r]` in the query's dtype, and the float32 log-sum-exp `[B, Hq, q]`, as in
        `latent_attention_naive`.
    """
    dtype = _dtype(query.dtype, (latents.codec, rotary.codec), query.shape[1] * query.shape[2])
    parts = query.flatten(1, 2)[:, None].split([latents.head_dim, rotary.head_dim], dim=-1)  # [B, 1, Hq · q, ...]
    if dtype != torch.bfloat16:
        parts = tuple(part.float() * scoring.scale for part in parts)
    sides = latents, rotary
    parts = tuple(
        rotate_states(part) if side.codec.is_rotated else part for part, side in zip(parts, sides, strict=True)
    )
    decode = Decode(sides, None, layout, visibility, scoring, query.shape[2], query.shape[1], dtype)
    return rotated_back(decode.all_rows(parts), latents.codec, query.dtype)


def _dtype(of_query: torch.dtype, codecs: tuple[Codec, Codec], num_rows: int) -> torch.dtype:
    """The dtype that products take."""
    has_integers = any(codec.numbers == torch.int8 for codec in codecs)
    # A query that is rotated is no bfloat16 any more.
    holds = not any(codec.is_rotated for codec in codecs) and (not has_integers or num_rows >= _MANY)
    if holds and of_query == torch.bfloat16 and bf16_matmul.is_exact():
        return torch.bfloat16
    return torch.int8 if has_integers and int8_matmul.is_exact() else torch.float32
