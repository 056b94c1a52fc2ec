"""`CausalMask`: the causal mask of a padded batch, said in a few numbers and written out only where it is read."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hfkv.models.padding import padding_of
from hfkv.models.proxy import Proxy


class CausalMask(Proxy):
    """A bool mask `[B, 1, q, kv]`: causal, with the gaps of a 2D attention mask.

    The windowed attention reads `pads`; any torch operation sees the whole mask, made once.
    """

    attention_mask: torch.Tensor | None
    _written: torch.Tensor | None
    _pads: tuple[int, ...] | None
    _looked: bool

    @staticmethod
    def __new__(
        cls, batch: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None, device: Any
    ) -> CausalMask:
        mask = torch.Tensor._make_wrapper_subclass(
            cls, (batch, 1, q_length, kv_length), dtype=torch.bool, device=device, requires_grad=False
        )
        mask.attention_mask = attention_mask
        mask._written = mask._pads = None
        mask._looked = False
        return mask

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"CausalMask(shape={tuple(self.shape)}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            mask = args[0].attention_mask
            device = kwargs.get("device", args[0].device)
            batch, _, q_length, kv_length = args[0].shape
            return cls(batch, q_length, kv_length, None if mask is None else mask.to(device), device)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def plain(self) -> torch.Tensor:
        """The whole mask as a plain tensor."""
        if self._written is None:
            batch, _, q_length, kv_length = self.shape
            self._written = sdpa_mask(
                batch_size=batch,
                q_length=q_length,
                kv_length=kv_length,
                q_offset=kv_length - q_length,
                kv_offset=0,
                attention_mask=self.attention_mask,
                allow_is_causal_skip=False,
                device=self.device,
            ).contiguous()
        return self._written

    def pads(self) -> tuple[int, ...]:
        """Pad tokens before each row's first real one.

        Raises:
            NotImplementedError: something besides left padding is hidden.
        """
        pads = self.left_padding()
        if pads is None:
            raise NotImplementedError(NOT_LEFT_PADDED)
        return pads

    def left_padding(self) -> tuple[int, ...] | None:
        """The pad tokens before each row's first real one; None where something besides left padding is hidden."""
        if not self._looked:
            self._looked = True
            batch, kv_length = self.shape[0], self.shape[3]
            if self.attention_mask is None:
                self._pads = (0,) * batch
            else:
                self._pads = padding_of(self.attention_mask[:, :kv_length].bool(), batch)
        return self._pads


class FullMask(Proxy):
    """A bool mask `[B, 1, q, kv]` that hides nothing."""

    @staticmethod
    def __new__(cls, batch: int, q_length: int, kv_length: int, device: Any) -> FullMask:
        return torch.Tensor._make_wrapper_subclass(
            cls, (batch, 1, q_length, kv_length), dtype=torch.bool, device=device, requires_grad=False
        )

    def plain(self) -> torch.Tensor:
        """The whole mask as a plain tensor."""
        return torch.ones(self.shape, dtype=torch.bool, device=self.device)


def rule_of(mask: torch.Tensor | None, is_causal: bool) -> tuple[torch.Tensor | None, bool]:
    """Reads what a mask says besides padding, so that no module's flag is asked where there is a mask.

    Args:
        mask: `[B, 1 or Hq, q, kv]`, or None.
        is_causal: whether None is causal; else it is full.

    Returns:
        None in place of a mask that hides the future and no more, or nothing; and which of the two None is.
    """
    if isinstance(mask, FullMask):
        return None, False
    if isinstance(mask, CausalMask) and mask.attention_mask is None and mask.shape[2] == mask.shape[3]:
        return None, True
    return mask, is_causal


def hfkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The bool mask of the sdpa attention; None only for single queries that see everything.

    Where sdpa's function leaves the mask to a module's flag, this one says whether it is causal or full: not every
    module's flag is right (the decoders of nllb_moe and pegasus_x call themselves not causal). A causal mask is written
    out only where it is read.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        allow_is_causal_skip, allow_is_bidirectional_skip, use_vmap, device, **kwargs: the arguments of `sdpa_mask`.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    is_newest = isinstance(q_offset, int) and q_offset + q_length == kv_length
    is_plain = mask_function is causal_mask_function and not use_vmap and local_size is None and not kv_offset
    is_covered = attention_mask is None or attention_mask.shape[-1] >= kv_length
    if is_plain and is_newest and is_covered and not is_traced:
        is_whole = attention_mask is None or bool(attention_mask[:, :kv_length].all())
        if is_whole and allow_is_causal_skip and q_length == 1:
            return None
        return CausalMask(batch_size, q_length, kv_length, None if is_whole else attention_mask, device)
    # A causal mask of a static cache is skipped too, as one that counts from the first key; it is written out here.
    may_skip = q_length == 1 or not is_traced
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and may_skip and q_length in (1, kv_length),
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and may_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    if mask is not None or q_length == 1:
        return mask
    if allow_is_bidirectional_skip:
        return FullMask(batch_size, q_length, kv_length, device)
    return CausalMask(batch_size, q_length, kv_length, None, device)


def only_picked(
    mask: torch.Tensor | None, indices: torch.Tensor, num_tokens: int, is_causal: bool = True
) -> torch.Tensor:
    """What queries see of the tokens that an indexer has picked for them.

    Args:
        mask: bool or additive `[B, 1 or H, q, T]`; None for causal or full attention.
        indices: `[B, q, k]`, tokens among all; some of them may be hidden by the mask.
        num_tokens: T.
        is_causal: whether None is causal; else it is full.

    Returns:
        As the mask, bool where there is none.
    """
    batch, num_queries, _ = indices.shape
    picked = torch.zeros(batch, num_queries, num_tokens, dtype=torch.bool, device=indices.device)
    picked = picked.scatter_(-1, indices.long(), True)[:, None]
    if mask is None:
        if not is_causal:
            return picked
        mask = picked.new_ones(num_queries, num_tokens).tril(num_tokens - num_queries)
    if mask.dtype == torch.bool:
        return mask & picked
    return mask.masked_fill(~picked, torch.finfo(mask.dtype).min)


def packed_only(
    mask: torch.Tensor | None, is_causal: bool, cu_seq_lens: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """What queries see of the texts packed into one row: only their own.

    Args:
        mask: bool or additive `[1, 1 or H, q, T]`; None for causal or full attention.
        is_causal: whether None is causal; else it is full.
        cu_seq_lens: where each text begins, and the last one ends, int `[texts + 1]`.
        query, key: `[1, Hq, q, D]`, `[1, H, T, D]`.

    Returns:
        The mask where it is written out already: then the positions have told where texts begin.

    Raises:
        NotImplementedError: the texts are packed into several rows, or behind tokens of a cache.
    """
    length = query.shape[2]
    if mask is not None and not isinstance(mask, CausalMask):
        return mask
    if query.shape[0] != 1 or key.shape[2] != length:
        raise NotImplementedError(
            f"cu_seq_lens_q says where the texts of one packed row begin, and it was given {query.shape[0]} rows of "
            f"{length} tokens, {key.shape[2]} with those of the cache: pack them into one row, and read it with "
            "use_cache=False"
        )
    text = torch.searchsorted(cu_seq_lens.to(query.device), torch.arange(length, device=query.device), right=True)
    visible = (text[:, None] == text)[None, None]
    if mask is not None:
        return mask & visible
    return visible.tril() if is_causal else visible


def left_padding(mask: torch.Tensor | None, batch: int, num_queries: int, seen: int) -> tuple[int, ...]:
    """Pad tokens before each row's first real one.

    Args:
        mask: `[B or 1, 1 or H, q, seen]`, bool or additive; None for no padding.
        batch: number of rows.
        num_queries: q.
        seen: tokens since the start, including this forward's.

    Raises:
        ValueError: the mask is made for another number of tokens.
        NotImplementedError: it is not the causal mask of a left-padded batch.
    """
    if mask is None:
        return (0,) * batch
    if mask.shape[-1] != seen:
        raise ValueError(f"the mask covers {mask.shape[-1]} tokens, the windowed cache has seen {seen}")
    if isinstance(mask, CausalMask):
        return mask.pads() if mask.shape[0] == batch else mask.pads() * batch
    visible = _visible(mask)
    pads = _left_padding(visible[:, 0, -1], batch)
    starts = torch.tensor(pads, device=mask.device)[:, None, None, None]
    j = torch.arange(seen, device=mask.device)
    for first in range(0, num_queries, _ROWS):
        t = torch.arange(seen - num_queries, seen, device=mask.device)[first : first + _ROWS, None]
        rows = visible[:, :, first : first + _ROWS]
        # Pad tokens see nothing or, in some models' masks, everything; a text before the padding would see itself.
        of_pads = (t < starts) & (rows == rows[..., :1]).all(-1, keepdim=True)
        agrees = (rows == ((j <= t) & (j >= starts))) | of_pads
        if not bool(agrees.all()):
            raise NotImplementedError(NOT_LEFT_PADDED)
    return pads


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """What a written mask shows, bool."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"a 4D attention mask must be bool or additive (float), got {mask.dtype}")
    visible = shown_by(mask)
    if visible is None:
        raise NotImplementedError(
            "a windowed hfkv cache was given an additive mask with values between 0 and hidden (a bias of positions, "
            "say), which its window would lose; leave the window out"
        )
    return visible


def shown_by(mask: torch.Tensor) -> torch.Tensor | None:
    """What an additive mask shows, bool, or None where it says more than that."""
    hidden = mask <= _HIDDEN
    return hidden.logical_not() if bool((hidden | (mask == 0)).all()) else None


_ROWS = 512  # queries of a written mask looked at together
_HIDDEN = -1e4  # what an additive mask adds at most to hide a key
NOT_LEFT_PADDED = (
    "a windowed hfkv cache was given a mask that is not the causal one of a left-padded batch (gaps, as padding behind "
    "the virtual tokens of prefix tuning makes, right padding, packed texts, or tokens that see what follows them): "
    'its window and sinks would be counted wrongly. Pad on the left (tokenizer.padding_side = "left"), or leave the '
    "window out"
)


def _left_padding(is_real: torch.Tensor, batch: int) -> tuple[int, ...]:
    pads = padding_of(is_real, batch)
    if pads is None:
        raise NotImplementedError(NOT_LEFT_PADDED)
    return pads
