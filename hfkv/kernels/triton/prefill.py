"""`prefill_attention`: many queries over what is held, their own tokens included."""

from __future__ import annotations

import torch

from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.kernels.triton.operator import attend
from hfkv.stores.layout import Layout


def prefill_attention(
    query: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    *,
    inputs: DeviceInputs | None = None,
    capacity: int | None = None,
) -> Attended:
    """Attention of many queries to encoded tokens: what `attention_naive` computes.

    FlashAttention-2 (arXiv 2307.08691) over tiles of queries, the heads of a group side by side in a tile; tiles of
    keys that none of a tile's queries sees (padding, the future, what a window has left behind) are not read. The
    others are read once per tile of queries, as many bytes a token as in `decode_attention`.

    Args:
        query: `[B, Hq, q, Dk]`, bf16, fp16 or fp32.
        keys, values: encoded planes, the queries' own tokens already in them.
        layout: where the held tokens lie.
        visibility: which of them each query sees.
        scoring: scale, softcap and sink logits.
        inputs: layout and visibility on the device, for captured graphs; None to upload them.
        capacity: not used: the tiles of queries are enough programs.

    Returns:
        What `decode_attention` returns.

    Raises:
        ValueError: shapes or a mean that do not belong together, or a scoring that kernels do not do.
    """
    return attend(query, keys, values, layout, visibility, scoring, inputs, capacity=capacity, is_prefill=True)
