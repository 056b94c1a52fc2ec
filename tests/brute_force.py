"""What windows mean, written out: one forward over the whole text, no cache, every score computed."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from hfkv import KVConfig, Recent, Window
from hfkv.codecs import Codecs
from hfkv.codecs.key_mean import KeyMean


def logits(
    model: Any, ids: torch.Tensor, kv: KVConfig, pads: tuple[int, ...] = (), means: Mapping[int, KeyMean] | None = None
) -> torch.Tensor:
    """Logits `[B, T, vocab]` with `kv` done to every layer that does not slide by itself.

    Args:
        model: any decoder that goes through transformers' attention functions.
        ids: `[B, T]`, row b with `pads[b]` pad tokens on its left.
        kv: the policies.
        pads: none where it is empty.
        means: means that are taken off the keys of layers before they are encoded.
    """
    pads = pads or (0,) * len(ids)
    latent = [module for module in model.modules() if hasattr(module, "expand_kv")]
    for module in latent:  # what is encoded are the latents
        module.expand_kv = functools.partial(_expand_encoded, module, kv.codec)

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        sliding = getattr(module, "sliding_window", None)
        window = Window(sliding, sinks=0) if sliding else kv.window
        mean, recent = (means or {}).get(module.layer_idx), None
        if not latent:
            where = torch.arange(key.shape[2]) - torch.tensor(pads)[:, None]
            off = 0 if mean is None else mean.turned(*mean.waves.of(where, key.device))
            fine = None if kv.recent is None else _read(kv.recent.codec, key, value, off)
            if fine is None or not sliding:
                key, value = _read(kv.codec, key, value, off)
                recent = None if fine is None else InTwoForms(kv.recent, *fine)
            else:
                key, value = fine  # all that such a layer holds is recent
        stored = _Stored(kv.codec, mean)
        return _attend(model, module, query, key, value, window, pads, scaling, kwargs, stored, recent), None

    AttentionInterface.register("brute_force", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("brute_force")
    try:
        return model(ids, position_ids=positions(ids, pads), use_cache=False).logits
    finally:
        model.set_attn_implementation(before)
        for module in latent:
            del module.expand_kv


@dataclasses.dataclass
class _Stored:
    """How the summaries of a layer are written: by a codec, less the mean of its keys."""

    codec: str
    mean: KeyMean | None

    def of_head(self, head: int) -> _Stored:
        return _Stored(self.codec, None if self.mean is None else self.mean.of_heads([head]))

    def read(self, key: torch.Tensor, value: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A key and a value `[1, D]` of the middle of a page, as they are read."""
        off = 0 if self.mean is None else self.mean.turned(*self.mean.waves.of(torch.tensor([[at]]), key.device))[0, 0]
        keys, values = _as_stored(self.codec, (key - off)[None, None], value[None, None])
        return keys[0, 0] + off, values[0, 0]


def _expand_encoded(module: Any, codec: str, *states: torch.Tensor) -> Any:
    return type(module).expand_kv(module, *_as_stored(codec, *states))


def _as_stored(codec: str, *states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Keys and values, or latents and rotary keys, as they are read."""
    codecs = Codecs.named(codec)
    for its, x in zip((codecs.key, codecs.value), states, strict=True):
        yield its.decode(its.encode(x), x.shape[-1], x.dtype)


def _read(codec: str, key: torch.Tensor, value: torch.Tensor, off: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as they are read; `off` is taken off keys meanwhile where their codec gains by it."""
    off = off if Codecs.named(codec).key.takes_mean else 0
    key, value = _as_stored(codec, key - off, value)
    return key + off, value


@dataclass(frozen=True)
class InTwoForms:
    """Recent tokens, and the keys and values `[B, H, T, D]` of all tokens in their form."""

    recent: Recent
    key: torch.Tensor
    value: torch.Tensor

    def of(self, row: int, pad: int, kv_head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key[row, kv_head, pad:], self.value[row, kv_head, pad:]


def one_head_in_two_forms(
    q: torch.Tensor,
    coarse: tuple[torch.Tensor, torch.Tensor],
    fine: tuple[torch.Tensor, torch.Tensor],
    recent: Recent,
    scaling: float,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[T, Dv]` of one head of one row without padding: each query reads each token in its form."""
    outputs = []
    for t in range(len(q)):
        j = torch.arange(t + 1)
        is_fine = ((j > t - recent.size) | (j < recent.sinks))[:, None]
        k, v = (torch.where(is_fine, near[: t + 1], far[: t + 1]) for near, far in zip(fine, coarse, strict=True))
        scores = k @ q[t] * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sink_logit is not None:
            scores = torch.cat((scores, sink_logit.reshape(1)))
        outputs.append(scores.softmax(-1)[: t + 1] @ v)
    return torch.stack(outputs)


def positions(ids: torch.Tensor, pads: tuple[int, ...]) -> torch.Tensor:
    """Position ids `[B, T]`, 0 at each row's first real token and before."""
    return (torch.arange(ids.shape[1]) - torch.tensor(pads)[:, None]).clamp_min(0)


def lower_bounds(window: Window | None, count: int) -> list[int]:
    """L(t) for t below `count`, straight from its definition."""
    if window is None:
        return [0] * count

    def size(seen: int) -> int:
        if window.schedule is None:
            return window.size
        if callable(window.schedule):
            wanted = window.schedule(seen)
        else:
            wanted = seen if seen < 1024 else 2048 if seen < 8192 else 4096
        return wanted if window.size is None else min(wanted, window.size)

    gone = [t + 1 - size(t + 1) for t in range(count)]
    return [max(0, *gone[: t + 1]) for t in range(count)]


def _attend(
    model: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window | None,
    pads: tuple[int, ...],
    scaling: float,
    extra: dict[str, Any],
    stored: _Stored,
    recent: InTwoForms | None = None,
) -> torch.Tensor:
    """`[B, T, Hq, D]`, a row, a head and a query at a time."""
    batch, num_heads, count, _ = query.shape
    groups = num_heads // key.shape[1]
    if window is not None and module.layer_idx in window.global_layers:
        window = None
    output = torch.zeros(batch, count, num_heads, value.shape[3], dtype=value.dtype)
    for b, pad in enumerate(pads):
        q, k, v = query[b, :, pad:], key[b, :, pad:], value[b, :, pad:]
        for head in range(num_heads):
            kv_head = head // groups
            keeps_all = window is None or kv_head in window.global_heads.get(module.layer_idx, ())
            own = None if keeps_all else window
            sink_logit = extra["s_aux"][head] if extra.get("s_aux") is not None else None
            if recent is not None:
                coarse, fine = (k[kv_head], v[kv_head]), recent.of(b, pad, kv_head)
                rules = recent.recent, scaling, extra.get("softcap"), sink_logit
                output[b, pad:, head] = one_head_in_two_forms(q[head], coarse, fine, *rules)
                continue
            output[b, pad:, head] = _one_head(
                *(model, q[head], k[kv_head], v[kv_head], own, scaling, extra.get("softcap"), sink_logit),
                stored.of_head(kv_head),
            )
    return output


def _one_head(
    model: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: Window | None,
    scaling: float,
    softcap: float | None,
    sink_logit: torch.Tensor | None,
    stored: _Stored,
) -> torch.Tensor:
    """`[T, D]` of one head of one row without padding."""
    count = len(q)
    bounds = lower_bounds(window, count)
    sinks = window.sinks if window else 0
    scores = torch.full((count, count), float("-inf"), dtype=q.dtype)
    for t in range(count):
        seen = [j for j in range(t + 1) if j >= bounds[t] or j < sinks]
        scores[t, seen] = k[seen] @ q[t]
        if window and window.sink_positions == "cache":
            gap = max(bounds[t] - sinks, 0)
            first = [j for j in range(min(sinks, t + 1))]
            if first:
                scores[t, first] = k[first] @ turned(model, q[t : t + 1], [-gap])[0]
    values = v
    if window and window.summary:
        keys, means = _summaries(model, k, v, window, stored)
        summary_scores = torch.full((count, len(keys)), float("-inf"), dtype=q.dtype)
        for t in range(count):
            gone = bounds[t] // window.summary_page_size
            pages = [p for p in range(gone) if p >= gone - window.summary_pages]
            pages = [p for p in pages if (p + 1) * window.summary_page_size > sinks]
            if pages:
                summary_scores[t, pages] = keys[pages] @ q[t]
        scores, values = torch.cat((scores, summary_scores), dim=1), torch.cat((v, means))
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sink_logit is not None:
        scores = torch.cat((scores, sink_logit.expand(count, 1)), dim=1)
        return scores.softmax(-1)[:, :-1] @ values
    return scores.softmax(-1) @ values


def _summaries(
    model: Any, k: torch.Tensor, v: torch.Tensor, window: Window, stored: _Stored
) -> tuple[torch.Tensor, torch.Tensor]:
    size = window.summary_page_size
    keys, values = [torch.zeros_like(k[:0])], [torch.zeros_like(v[:0])]
    for page in range(len(k) // size):
        tokens = [j for j in range(page * size, (page + 1) * size) if j >= window.sinks] or [page * size]
        middle = page * size + size // 2
        key = turned(model, k[tokens], [middle - j for j in tokens]).mean(0, keepdim=True)
        for of_all, its in zip((keys, values), stored.read(key, v[tokens].mean(0, keepdim=True), middle), strict=True):
            of_all.append(its)
    return torch.cat(keys), torch.cat(values)


def turned(model: Any, states: torch.Tensor, by: list[int]) -> torch.Tensor:
    """`[T, D]` rotated `by` positions further, by the model's own code, with angles in float64."""
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    # Of latent attention only the last dims are rotated.
    nope = getattr(model.config, "qk_nope_head_dim", 0)
    rest, states = states.split((nope, states.shape[1] - nope), dim=1)
    states = states[None, None]
    rotary = model.model.rotary_emb
    angles = torch.tensor([by], dtype=torch.float64)[..., None] * rotary.inv_freq.double()
    if rotary(states, torch.tensor([by]))[0].shape[-1] == 2 * angles.shape[-1]:
        angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    return torch.cat((rest, apply(states, states, cos, sin)[0][0, 0]), dim=1)
