"""`decode_attention`: a few queries over all that is held, cut into splits that run side by side."""

from __future__ import annotations

import torch

from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.kernels.triton.operator import attend
from hfkv.stores.layout import Layout


def decode_attention(
    query: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    *,
    inputs: DeviceInputs | None = None,
    capacity: int | None = None,
    num_splits: int | None = None,
) -> Attended:
    """Attention of a few queries to encoded tokens: what `attention_naive` computes.

    Split-KV flash decoding (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html): the query heads
    of a kv head are the rows of one tile, and several programs share its keys. What is held is read once and as it is
    stored, per token and kv head Dk + Dv numbers: 2 bytes each as bf16, one (and 4 bytes of scales) in int8 and fp8,
    half a byte (and 8) in int4, three or two bits (and 2 or 4 bytes) in int3 and int2; the query and the output make up
    for the rotation of these (QuaRot, arXiv 2404.00456).

    Args:
        query: `[B, Hq, q, Dk]`, bf16, fp16 or fp32.
        keys, values: encoded planes.
        layout: where the held tokens lie.
        visibility: which of them each query sees.
        scoring: scale, softcap and sink logits.
        inputs: layout and visibility on the device, for captured graphs; None to upload them. What kernels read is in
            there: of `layout` and `visibility` only what does not change is used then.
        capacity: tokens to choose the number of splits for; None for those held, or with `inputs` for all there is room
            for.
        num_splits: splits; None to choose.

    Returns:
        The output `[B, Hq, q, Dv]` of the query's dtype, zeros where a query sees nothing, and the log-sum-exp of its
        scores `[B, Hq, q]` float32, -inf there.

    Raises:
        ValueError: shapes or a mean that do not belong together, or a scoring that kernels do not do.
    """
    return attend(
        *(query, keys, values, layout, visibility, scoring, inputs),
        capacity=capacity,
        num_splits=0 if num_splits is None else num_splits,
        is_prefill=False,
    )
