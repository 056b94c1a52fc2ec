"""What a call gave, as a tree of tensors or an error, and where two of them differ."""

from __future__ import annotations

from typing import Any

import torch

TOLERANCE = 1e-4  # of the largest number of a tensor
# What a call that stock code cannot run raises: compared by its kind.
ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def difference(stock: Any, ours: Any, where: str = "") -> str | None:
    """Says where two outcomes differ, or gives None.

    Args:
        stock, ours: tensors, errors, or dicts, lists and tuples of such.
        where: the path to them, for the message.
    """
    if isinstance(stock, Exception) or isinstance(ours, Exception):
        return None if type(stock) is type(ours) else f"{where}: stock {short(stock)}, hfkv {short(ours)}"
    if type(stock) is not type(ours):
        return f"{where}: {type(stock).__name__} against {type(ours).__name__}"
    if isinstance(stock, torch.Tensor):
        return _tensor_difference(stock, ours, where)
    if isinstance(stock, dict):
        if stock.keys() != ours.keys():
            return f"{where}: {sorted(stock)} against {sorted(ours)}"
        pairs = [(f"{where}.{name}", stock[name], ours[name]) for name in stock]
    elif isinstance(stock, list | tuple):
        if len(stock) != len(ours):
            return f"{where}: {len(stock)} against {len(ours)} parts"
        pairs = [(f"{where}[{i}]", *parts) for i, parts in enumerate(zip(stock, ours, strict=True))]
    else:
        return None if stock == ours else f"{where}: {stock!r} against {ours!r}"
    found = (difference(its, own, path) for path, its, own in pairs)
    return next((text for text in found if text is not None), None)


def without_padding(output: dict[str, Any], mask: torch.Tensor | None) -> dict[str, Any]:
    """An output of `generate` with zeros in the states of the prompt's padding, which nobody reads.

    Args:
        output: of a decoder-only model.
        mask: `[B, T]` of the prompt, or None.
    """
    if mask is None:
        return output
    changed = dict(output)
    for name in ("hidden_states", "attentions"):
        first, *rest = output.get(name) or ((),)
        if first:
            changed[name] = (tuple(_at_text(name, part, mask) for part in first), *rest)
    return changed


def _at_text(name: str, part: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    queries = part.shape[-2]
    rows = part.shape[-3] if name == "hidden_states" else part.shape[0]
    if rows % len(mask) or queries > mask.shape[1]:
        return part
    text = mask[:, mask.shape[1] - queries :].repeat_interleave(rows // len(mask), dim=0) != 0
    return part.masked_fill(~(text[..., None] if name == "hidden_states" else text[:, None, :, None]), 0.0)


def short(outcome: Any) -> str:
    """An error in one line, or that there is a result."""
    if isinstance(outcome, Exception):
        return " ".join(f"{type(outcome).__name__}: {outcome}".split())[:300]
    return "gives a result"


def _tensor_difference(stock: torch.Tensor, ours: torch.Tensor, where: str) -> str | None:
    if stock.shape != ours.shape:
        return f"{where}: shape {tuple(stock.shape)} against {tuple(ours.shape)}"
    if stock.dtype != ours.dtype:
        return f"{where}: {stock.dtype} against {ours.dtype}"
    if not stock.is_floating_point():
        return None if torch.equal(stock, ours) else f"{where}: {stock.tolist()} against {ours.tolist()}"
    finite = stock.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return f"{where}: other numbers are finite"
    if not finite.any():
        return None
    scale = stock[finite].abs().max().clamp(min=1).item()
    error = (stock[finite] - ours[finite]).abs().max().item() / scale
    return None if error <= TOLERANCE else f"{where}: off by {error:.2g} of the largest"
