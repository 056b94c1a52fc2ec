"""The naive twins: what every kernel must compute, in plain torch, for tests and self-tests only."""

from __future__ import annotations

from dataclasses import replace

import torch

from hfkv.kernels.device_inputs import Rows
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.stores.layout import Layout


def read_naive(encoded: Encoded, layout: Layout, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decodes the held tokens to `[B, H, length, D]` of `dtype`; of keys, with their mean."""
    planes = []
    for plane in encoded.planes:
        if layout.table is None:
            planes.append(plane[:, :, layout.start : layout.start + layout.length])
            continue
        # No indexing by tensors knows 8-bit floats.
        bits = plane.view(torch.uint8) if plane.element_size() == 1 else plane
        columns = [
            bits[layout.table[:, column].to(plane.device)][:, :, low:high]
            for column, (low, high) in enumerate(layout.spans)
        ]
        planes.append(torch.cat(columns, dim=2).view(plane.dtype))
    decoded = encoded.codec.decode(tuple(planes), encoded.head_dim, dtype)
    return decoded if encoded.mean is None else decoded + encoded.mean.turned(0, layout.length).to(dtype)


def visible_naive(visibility: Visibility, layout: Layout, num_queries: int, device: torch.device) -> torch.Tensor:
    """Marks the tokens that each query sees, bool `[B, 1 or Hq, q, length - first]`."""
    batch = len(visibility.pads)
    if visibility.mask is not None:
        return visibility.mask.expand(batch, -1, -1, -1)
    pads = torch.tensor(visibility.pads, device=device)[:, None, None]  # [B, 1, 1]
    t = torch.arange(visibility.seen - num_queries, visibility.seen, device=device)[:, None]  # [q, 1]
    i = torch.arange(visibility.first, layout.length, device=device)
    is_slot = i < visibility.num_slots
    j = torch.where(is_slot, pads + i, visibility.held_from + i - visibility.num_slots)  # [B, 1, T]
    is_there = ~is_slot | (j < visibility.held_from)
    bounds = 0 if visibility.bounds is None else visibility.bounds[:, :, None]
    visible = is_there & (j >= pads) & (j <= t) & ((j >= bounds) | (j < pads + visibility.sinks))
    return visible[:, None]


def attention_naive(
    query: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries `[B, Hq, q, D]` to the decoded tokens, all of it in `dtype`.

    Returns:
        The output `[B, Hq, q, Dv]` of `dtype`, zeros where a query sees nothing, and the logarithm of the sum of the
        exponentials of its scores (sink logits included) `[B, Hq, q]`, -inf where there are none.
    """
    groups = query.shape[1] // keys.planes[0].shape[1]
    k, v = (
        read_naive(part, layout, dtype)[:, :, visibility.first :].repeat_interleave(groups, dim=1)
        for part in (keys, values)
    )
    return attend_naive(query, k, v, layout, visibility, scoring)


def attend_naive(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to decoded keys `[B, Hq or 1, n, D]` and values `[B, Hq or 1, n, Dv]`; see `attention_naive`."""
    dtype = k.dtype
    scores = (query.to(dtype) * scoring.scale) @ k.transpose(2, 3)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    visible = visible_naive(visibility, layout, query.shape[2], query.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    if scoring.sink_logits is not None:
        logits = scoring.sink_logits.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, logits), dim=-1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
    # What a value holds that nobody sees must not reach the sum: 0 x NaN is NaN.
    v = torch.where(visible.any(dim=2).any(dim=1)[:, None, :, None], v, 0)
    return weights[..., : v.shape[2]] @ v, lse


def row_of(
    query: torch.Tensor, keys: Encoded, values: Encoded, layout: Layout, visibility: Visibility, rows: Rows, row: int
) -> tuple[torch.Tensor, Encoded, Encoded, Layout, Visibility]:
    """One row of a call whose rows are of different lengths, as a call of its own."""
    length = rows.lengths[row]
    if keys.mean is not None:
        keys = keys._replace(mean=keys.mean.of_rows(slice(row, row + 1)))
    if layout.table is None:
        keys, values = (part._replace(planes=tuple(p[row : row + 1] for p in part.planes)) for part in (keys, values))
        layout = Layout(length, layout.start)
    else:
        spans = tuple(
            (low, min(high, low + max(length - begin, 0)))
            for (low, high), begin in zip(layout.spans, layout.begins, strict=True)
        )
        layout = Layout(length, table=layout.table[row : row + 1], spans=spans)
    bounds, mask = (
        part if part is None or len(part) == 1 else part[row : row + 1] for part in (visibility.bounds, visibility.mask)
    )
    first = 0 if rows.first is None else rows.first[row]
    if mask is not None:
        mask = mask[..., : max(length - first, 0)]
    pads = visibility.pads[row : row + 1]
    visibility = replace(visibility, seen=rows.seen[row], first=first, pads=pads, bounds=bounds, mask=mask)
    return query[row : row + 1], keys, values, layout, visibility


def ragged_naive(
    query: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    dtype: torch.dtype = torch.float32,
    *,
    rows: Rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attention_naive` gives of each row alone, where rows are of different lengths."""
    alone = [
        attention_naive(*row_of(query, keys, values, layout, visibility, rows, row), scoring, dtype)
        for row in range(len(query))
    ]
    return torch.cat([out for out, _ in alone]), torch.cat([lse for _, lse in alone])


def append_naive(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
) -> None:
    """Encodes tokens `[B, H, n, D]` and writes them behind the `layout.length` tokens held, in place.

    Contiguous planes have room for them. In a paged layout, `spans` is as it was and `table` has the columns that the
    new tokens need: the last column with something held is filled up first, then the following pages from slot 0 on.
    """
    for new, encoded in ((new_keys, keys), (new_values, values)):
        for tokens, plane in zip(encoded.codec.encode(new), encoded.planes, strict=True):
            if layout.table is None:
                end = layout.start + layout.length
                plane[:, :, end : end + tokens.shape[2]] = tokens
                continue
            page_size = plane.shape[2]
            column, slot = (len(layout.spans) - 1, layout.spans[-1][1]) if layout.spans else (-1, page_size)
            for n in range(tokens.shape[2]):
                if slot == page_size:
                    column, slot = column + 1, 0
                for row, page in enumerate(layout.table[:, column].tolist()):
                    plane[page, :, slot] = tokens[row, :, n]
                slot += 1
