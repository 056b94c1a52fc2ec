"""The number of queries from which latents are expanded: the operations of both forms, counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import torch

from hfkv.attention.latent.projection import Widths

Form = Literal["absorbed", "expanded"]

_forced: ContextVar[Form | None] = ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(form: Form) -> Iterator[None]:
    """Computes every attention to latents in one form, to measure it."""
    if form not in ("absorbed", "expanded"):
        raise ValueError(f'a form is "absorbed" or "expanded", got {form!r}')
    token = _forced.set(form)
    try:
        yield
    finally:
        _forced.reset(token)


def form_for(
    num_queries: int,
    num_tokens: int,
    widths: Widths,
    dtype: torch.dtype,
    device: torch.device,
    is_decoded: bool = False,
) -> Form:
    """The form that takes fewer operations, counted for one head.

    Absorbed, a query and a token that it sees meet in ``r + dr`` products for the score and r for the output; the
    query itself is folded, and the output unfolded, in ``r (dn + dv)``. Expanded, they meet in ``dn + dr + dv``, and
    every token is expanded in ``r (dn + dv)``. Over many tokens both are equal at ``r (dn + dv) / (2 r - dn - dv)``
    queries: 170 for DeepSeek's widths. A CPU takes two products for a score in bfloat16, which makes it 97.

    Args:
        num_queries: q, the newest of the tokens.
        num_tokens: the tokens held.
        widths: the layer's widths.
        dtype, device: the queries' dtype and device.
        is_decoded: whether getting the matrix takes as much as expanding r tokens.
    """
    named = _forced.get()
    if named is not None:
        return named
    r, dn, dr, dv = widths
    pairs = num_queries * (num_tokens - (num_queries - 1) / 2)
    products = 2 if device.type == "cpu" and dtype == torch.bfloat16 else 1
    absorbed = pairs * (products * (r + dr) + r) + (num_queries + r * is_decoded) * r * (dn + dv)
    expanded = pairs * (dn + dr + dv) + num_tokens * r * (dn + dv)
    return "absorbed" if absorbed <= expanded else "expanded"
