"""Caches, and beside them the plain tensors that they must hold."""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfkv import KVCache, Window
from hfkv.cache.layers.layer import KVLayer
from hfkv.codecs import Codecs
from hfkv.sharing.files.cache_file import load_cache, save_cache
from tests.tiny import llama_config

LAYERS, HEADS, HEAD_DIM = 2, 2, 4
MOST_CACHES, MOST_ROWS = 4, 4
STORES = (
    "contiguous",
    "paged+page_size:1",
    "paged+page_size:2",
    "paged+page_size:4",
    "auto",
    "paged+page_size:2+offload",
    "paged+page_size:4+offload+device_budget:4kB",
)


@functools.cache
def config() -> LlamaConfig:
    return llama_config(hidden_size=8, num_attention_heads=2, num_hidden_layers=LAYERS, head_dim=HEAD_DIM)


@functools.cache
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(config())


def kv_of(codec: str, store: str) -> str:
    return codec if store == "auto" else f"{codec}+{store}"


class Twin:
    """A cache, and beside it the tensors it must hold."""

    def __init__(self, cache: KVCache, batch: int) -> None:
        self.cache = cache
        self.codecs = Codecs.named(cache.kv.codec)
        assert cache.kv.window is None or isinstance(cache.kv.window, Window)
        self.window = cache.kv.window
        self.forget(batch)

    def forget(self, batch: int) -> None:
        self.states = [[torch.zeros(batch, HEADS, 0, HEAD_DIM) for _ in range(2)] for _ in range(LAYERS)]
        self.ids = torch.zeros(batch, 0, dtype=torch.long)
        self.hidden = torch.zeros(batch, 0, dtype=torch.bool)
        self.is_known = True
        self.gone_below = 0  # of a window: what no query to come sees, sinks apart
        self.filled = False

    @property
    def batch(self) -> int:
        return len(self.ids)

    @property
    def seen(self) -> int:
        return self.ids.shape[1]

    def append(self, count: int, seed: int, is_known: bool = True, padding: bool = False) -> None:
        """Random keys, values and ids, with left padding where they are the first."""
        generator = torch.Generator().manual_seed(seed)
        self.forget_unseen()
        for layer_idx, held in enumerate(self.states):
            new = [torch.randn(self.batch, HEADS, count, HEAD_DIM, generator=generator) for _ in held]
            self.cache.update(new[0], new[1], layer_idx)
            sides = zip((self.codecs.key, self.codecs.value), new, strict=True)
            decoded = [codec.decode(codec.encode(x), HEAD_DIM, x.dtype) for codec, x in sides]
            self.states[layer_idx] = [torch.cat(pair, dim=2) for pair in zip(held, decoded, strict=True)]
        ids = torch.randint(99, (self.batch, count), generator=generator)
        hidden = torch.zeros(self.batch, count, dtype=torch.bool)
        if self.seen == 0 and padding:
            hidden = torch.arange(count) < torch.randint(count, (self.batch, 1), generator=generator)
        self.ids = torch.cat((self.ids, ids), dim=1)
        self.hidden = torch.cat((self.hidden, hidden), dim=1)
        self.is_known &= is_known
        mask = (~self.hidden).long() if self.hidden.any() else None
        self.cache.record.append(ids if is_known else None, count, mask)
        self.filled = True

    def forget_unseen(self) -> None:
        self.gone_below = max(self.gone_below, self.lower_bound(self.seen))

    def lower_bound(self, t: int) -> int:
        """The lowest position that a query at `t` sees, sinks apart."""
        return 0 if self.window is None or self.window.size is None else max(t + 1 - self.window.size, 0)

    def crop(self, count: int) -> None:
        left = max(self.seen - count, 0)
        if self.gone_below > self.lower_bound(left):
            with pytest.raises(RuntimeError, match="the window has dropped tokens"):
                self.cache.crop(-count)
            return
        self.cache.crop(-count)
        self.states = [[plane[:, :, :left] for plane in planes] for planes in self.states]
        self.ids, self.hidden = self.ids[:, :left], self.hidden[:, :left]
        self.is_known |= left == 0

    def select(self, rows: Any) -> None:
        self.states = [[plane[rows] for plane in planes] for planes in self.states]
        self.ids, self.hidden = self.ids[rows], self.hidden[rows]

    def reorder(self, seed: int) -> None:
        rows: Any = torch.randint(self.batch, (self.batch,), generator=torch.Generator().manual_seed(seed))
        self.cache.reorder_cache(rows)
        if self.filled:
            self.select(rows)

    def choose(self, kind: str, seed: int) -> None:
        """`batch_select_indices` by positions, a mask or a slice."""
        generator = torch.Generator().manual_seed(seed)
        rows: Any
        if kind == "positions":
            rows = torch.randint(self.batch, (1 + seed % MOST_ROWS,), generator=generator)
        elif kind == "mask":
            rows = torch.rand(self.batch, generator=generator) < 0.7
            rows[seed % self.batch] = True
        else:
            rows = slice(seed % self.batch, None) if seed % 2 else slice(None, None, 2)
        self.cache.batch_select_indices(rows)
        if self.filled:
            self.select(rows)

    def repeat(self, repeats: int) -> None:
        repeats = repeats if repeats * self.batch <= MOST_ROWS else 1
        self.cache.batch_repeat_interleave(repeats)
        if self.filled:
            self.select(torch.arange(self.batch).repeat_interleave(repeats))

    def fork(self, repeats: int, deep: bool) -> Twin:
        """Another one that holds every row `repeats` times."""
        repeats = repeats if repeats * self.batch <= MOST_ROWS and not deep else 1
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache) if deep else self.cache.fork(repeats)
        twin.select(torch.arange(self.batch).repeat_interleave(repeats))
        return twin

    def save(self) -> None:
        """Goes on with what is loaded again."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/cache.safetensors"
            if not self.seen:
                with pytest.raises(ValueError, match="this cache is empty"):
                    save_cache(self.cache, path, model())
                return
            save_cache(self.cache, path, model())
            self.cache = load_cache(path, model())

    def reserve(self, tokens: int) -> None:
        self.cache.reserve(tokens)

    def reset(self, batch: int) -> None:
        self.cache.reset()
        self.forget(batch)

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.seen
        assert self.cache.batch_size == (self.batch if self.filled else None)
        for layer, wanted in zip(self.cache.layers, self.states, strict=True):
            for leaf, heads in heads_of(layer):
                for held, expected in zip((leaf.keys, leaf.values), wanted, strict=True):
                    self._check_plane(held, expected[:, heads], leaf.window)
        tokens = self.cache.holds_tokens
        if not self.is_known or not self.seen:
            assert tokens is None
            return
        assert tokens is not None
        assert torch.equal(tokens, self.ids)
        hidden = self.cache.record.hidden()
        assert torch.equal(torch.zeros_like(self.hidden) if hidden is None else hidden, self.hidden)
        assert self.cache.record.pads() == tuple(self.hidden.sum(1).tolist())

    def _check_plane(self, held: torch.Tensor | None, expected: torch.Tensor, window: Window | None) -> None:
        if not self.filled:
            assert held is None
            return
        assert held is not None
        if window is not None and self.gone_below:
            sinks = min(window.sinks, self.gone_below)
            assert torch.equal(held[:, :, :sinks], expected[:, :, :sinks])
            held, expected = held[:, :, window.sinks :], expected[:, :, self.gone_below :]
        assert torch.equal(held, expected)


def heads_of(layer: Any) -> list[tuple[KVLayer, list[int]]]:
    """The parts of a layer and the kv heads they hold."""
    if isinstance(layer, KVLayer):
        return [(layer, list(range(HEADS)))]
    rest = [head for head in range(HEADS) if head not in layer.global_heads]
    return list(zip(layer.parts, (list(layer.global_heads), rest), strict=True))


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns after a few operations of the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_threads(count: int, work: Callable[[int], None]) -> None:
    """`work(0 .. count - 1)` at the same time; raises what one of them did."""
    with switching_often(), ThreadPoolExecutor(count) as executor:
        for future in [executor.submit(work, index) for index in range(count)]:
            future.result(timeout=120)
