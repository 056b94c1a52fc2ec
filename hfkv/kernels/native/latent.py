"""Attention in the latent space, in C++: each latent is read once, as key and as value of all heads."""

from __future__ import annotations

import torch

from hfkv.kernels.cpu.latent import latent_attention
from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.kernels.native.kernels import StepAttention, is_for_torch
from hfkv.kernels.native.library import loaded
from hfkv.stores.layout import Layout

# Queries of all heads from which on products of shorter vectors than AVX-512's are slower than torch's. One core of an
# EPYC held down to AVX2, 4k tokens of 512: 16 rows 2.0 against 3.0 ms, 128 rows 14.8 against 14.2.
_MANY, _LANES = 128, 16


def attend_latents(
    query: torch.Tensor,
    latents: Encoded,
    rotary: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    inputs: DeviceInputs | None = None,
) -> Attended:
    """Attention of absorbed queries to encoded latents and rotary keys; see `hfkv.kernels.latent_naive`.

    Args:
        query: absorbed queries `[B, Hq, q, r + dr]`, fp32, bf16 or fp16.
        latents: encoded latents `[B, 1, T, r]`, contiguous or in pages; they are the values too.
        rotary: rotary keys `[B, 1, T, dr]`, dr >= 1, by the same codec or another, in the same rows of the same store.
            Plain ones are fp32 or bf16.
        layout: places of the held tokens in the planes.
        visibility: tokens that each query sees.
        scoring: treatment of the scores.
        inputs: layout and visibility as `device_inputs` gives them; made here where they are not given.

    Returns:
        The output `[B, Hq, q, r]` in the query's dtype, and the float32 log-sum-exp `[B, Hq, q]`.

    Raises:
        ValueError: the layout names tokens that are not in the planes.
        MemoryError: there is no memory for what is summed.
    """
    is_torchs = inputs is None and query.shape[1] * query.shape[2] >= _MANY and loaded().hfkv_lanes() < _LANES
    if is_torchs or is_for_torch(latents, rotary):
        return latent_attention(query, latents, rotary, layout, visibility, scoring)
    query = query.contiguous()
    of_step = StepAttention(query, latents, rotary, layout, visibility, scoring, inputs, is_latent=True)
    out = of_step.run(query, (*latents.planes, *rotary.planes), scoring.scale)
    return Attended(out.transpose(1, 2), of_step.lse)
