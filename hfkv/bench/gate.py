"""The check a contender passes before its speed is told: its attention against fp32 on the same keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfkv.bench.contenders import Contender
from hfkv.bench.tokens import Tokens
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.layers.recent import RecentLayer

# An output may be so much further from fp32 attention than plain torch in the same dtype is (as flash-attention's own
# tests allow), and by this part of the largest number besides.
FACTOR, SLACK = 2.0, 1e-5


@dataclass(frozen=True)
class Errors:
    """How far a contender's results are from what they should be, as in `Row`; None where it was not looked at."""

    twin: float | None = None
    full: float | None = None
    logits: float | None = None
    wrong: str | None = None  # what is wrong


def what_is_wrong(output: torch.Tensor, error: float, allowed: float | None, standard: str) -> str | None:
    """What is wrong with an output, of numbers that must be finite and may be so far from a standard (None: any)."""
    if not bool(output.isfinite().all()):
        return "its output has numbers that are not finite"
    if allowed is not None and not error <= allowed:
        return f"its output is {error:.1e} from {standard}; {allowed:.1e} is allowed"
    return None


def attention_errors(output: torch.Tensor, tokens: Tokens, layer: Any, scale: float, is_ours: bool) -> Errors:
    """Checks the attention `[B, 1, Hq, D]` of one decode step, which added the tokens' new key and value to a layer.

    A layer of hfkv's is held against its own keys and values too.
    """
    output = output.transpose(1, 2)
    seen = tokens.count + 1
    shown, held = _read(layer, seen, output.device) if is_ours else (slice(None), [])
    keys, values = (
        torch.cat((states, new), dim=2)[:, :, shown]
        for states, new in ((tokens.keys, tokens.new_key), (tokens.values, tokens.new_value))
    )
    error_full = norm_error(output, _attention(tokens.query, keys, values, scale, torch.float32))
    if not is_ours:
        return Errors(full=error_full)
    del keys, values
    own_keys, own_values = held
    twin = _attention(tokens.query, own_keys, own_values, scale, torch.float32)
    same = _attention(tokens.query, own_keys, own_values, scale, output.dtype)
    error, allowed = largest_error(output, twin), FACTOR * largest_error(same, twin) + SLACK
    standard = "fp32 attention over its own keys and values, of the largest number"
    wrong = what_is_wrong(output, error, allowed, standard)
    return Errors(norm_error(output, twin), error_full, None, wrong)


def logit_errors(
    contender: Contender, logits: torch.Tensor, standard: torch.Tensor, num_layers: int, dtype: torch.dtype
) -> Errors:
    """Checks the logits `[B, V]` of one forward: hfkv's must be finite, and where nothing is lost differ by rounding.

    Each layer rounds to `dtype`: `generate` returns logits in fp32, whatever the model computes in.
    """
    error = norm_error(logits, standard)
    if contender.kv is None:
        return Errors(logits=error)
    allowed = 4 * torch.finfo(dtype).eps * num_layers**0.5 + SLACK if contender.kv.is_lossless else None
    return Errors(logits=error, wrong=what_is_wrong(logits, error, allowed, "DynamicCache's logits, as norms"))


def _read(layer: Any, seen: int, device: torch.device) -> tuple[Any, list[torch.Tensor]]:
    """What the newest query reads: positions, and the layer's own keys and values `[B, H, n, D]` there."""
    if not isinstance(layer, RecentLayer):
        positions, visible = _visible(layer, seen, device)
        return positions, [layer.keys[:, :, visible], layer.values[:, :, visible]]
    coarse, fine = layer.parts
    positions, near = _read(fine, seen, device)
    old = torch.arange(layer.recent.sinks, max(seen - layer.recent.size, layer.recent.sinks), device=device)
    _, far = _read(coarse, seen, device)
    both = [torch.cat((one[:, :, old], other), dim=2) for one, other in zip(far, near, strict=True)]
    return torch.cat((old, positions)), both


def _visible(layer: KVLayer, seen: int, device: torch.device) -> tuple[Any, Any]:
    """Of the tokens that the newest query sees, the positions, and which they are among those `layer.keys` shows."""
    window = layer.window
    if window is None:
        return slice(None), slice(None)
    assert layer.keys is not None
    held_from = layer.span.held_from
    newest = torch.arange(held_from, seen, device=device)
    num_slots = layer.keys.shape[2] - len(newest)
    slots = torch.arange(num_slots, device=device)
    positions = torch.cat((slots, newest))
    # A slot is filled once its token has gone from among the newest.
    is_there = torch.cat((slots < held_from, torch.ones_like(newest, dtype=torch.bool)))
    is_seen = (positions >= window.lower_bound(seen - 1)) | (positions < window.sinks)
    visible = is_there & is_seen
    return positions[visible], slice(None) if bool(visible.all()) else visible


def _attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Attention of `[B, Hq, 1, D]` computed in `dtype`, a row at a time, the softmax in fp32 as transformers' eager."""
    rows = []
    for q, k, v in zip(query.to(dtype), keys, values, strict=True):
        k, v = k.to(dtype), v.to(dtype)
        scores = (q.reshape(k.shape[0], -1, q.shape[-1]) @ k.transpose(1, 2)) * scale  # [H, G, T]
        weights = scores.softmax(-1, dtype=torch.float32).to(dtype)
        rows.append((weights @ v).reshape(q.shape[0], 1, -1))
    return torch.stack(rows)


def norm_error(output: torch.Tensor, standard: torch.Tensor) -> float:
    """The norm of the difference, as a part of the norm."""
    difference = output.float() - standard.float()
    return (difference.norm() / standard.float().norm()).item()


def largest_error(output: torch.Tensor, standard: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number; infinite where a number is not finite."""
    difference = ((output.float() - standard).abs().max() / standard.abs().max()).item()
    return difference if difference == difference else float("inf")
