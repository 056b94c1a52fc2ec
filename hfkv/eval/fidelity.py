"""`find_codecs`: the codec of each layer that takes the fewest bytes within a promised change of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hfkv.cache.layers.base import CacheLayer
from hfkv.eval.calibration import calibration_ids
from hfkv.eval.compare import compare
from hfkv.eval.layer_choices import (
    LOSSLESS,
    Picks,
    Price,
    between,
    config_of,
    greedy_path,
    layer_choices,
    say_picks,
    worthwhile,
)
from hfkv.eval.reader import check_model, each_warning_once
from hfkv.models.parallel import parallel_plan_of
from hfkv.models.probe import base_model
from hfkv.patches.patch import patch
from hfkv.planning.fit import Planner
from hfkv.planning.tokens import check_count, read_tokens
from hfkv.policy.config import KVConfig
from hfkv.policy.ports import port
from hfkv.policy.promise import check_share, say_percent
from hfkv.policy.units import about_bytes, read_bytes
from hfkv.policy.window import Window

# Tokens a block where nobody says how long a row is, and of the text on which each layer is measured alone: a KL
# divergence, unlike a loss, is known well after so few.
BLOCK = 1024
# Tokens a forward.
CHUNK = 256
# Caches that are read side by side with the full one, so that it is read once for so many.
TOGETHER = 8


@dataclass(frozen=True)
class FoundCodecs:
    """The codecs that keep a promise, and what was measured of them.

    Attributes:
        kv: The config.
        picks: The codec of each layer that the cache holds.
        promised: The share of the loss that was promised.
        loss_change: The share by which the loss changed against the full cache's.
        kl: Mean KL(full || this) of the next-token distributions, as a share of the full cache's loss.
        held_ratio: Bytes held, over the full cache's.
        num_tokens: Tokens that these were measured on.
        alone: KL in nats a token of each layer's choices where that layer alone has them.
    """

    kv: KVConfig
    picks: Picks
    promised: float
    loss_change: float
    kl: float
    held_ratio: float
    num_tokens: int
    alone: dict[int, dict[str, float]]

    def __str__(self) -> str:
        return (
            f"{say_picks(self.picks)}: {self.held_ratio:.3f} of the full bytes; on {self.num_tokens:,} tokens of "
            f"its text the loss is {self.loss_change:+.3%} and the KL {self.kl:.3%} of it "
            f"({say_percent(self.promised)} promised)"
        )


class _Measured(NamedTuple):
    """One cache on the text: losses and KL in nats a token, and bytes held."""

    nats: float
    kl: float
    full_nats: float
    held_bytes: int
    full_bytes: int

    @property
    def change(self) -> float:
        return self.nats / self.full_nats - 1

    @property
    def cost(self) -> float:
        """The share of the loss that the promise is about: of its change and the KL the larger, NaN if either is."""
        kl = self.kl / self.full_nats
        return kl if math.isnan(kl) or self.change <= kl else self.change


def find_codecs(
    model: Any,
    calibration: torch.Tensor | str | None = None,
    loss_change: float = 0.005,
    *,
    kv: KVConfig | str | None = None,
    memory: int | str | None = None,
    context: int | str | None = None,
    batch: int = 1,
    tokens: int = 4096,
) -> FoundCodecs:
    """Find the codec of each layer that takes the fewest bytes within a promised change of the loss.

    First every layer's choices are measured alone, on 1,024 tokens. From the lossless cache on, layers then take, one
    after the other, the choice that saves most bytes for the KL divergence it adds; of the caches on this way the last
    is looked for, by halving, that keeps the promise when it is measured as a whole, on all tokens. There are two ways,
    with keys and values of two codecs and without, of which the one wins that comes to fewer bytes. A promise is kept
    where neither the loss nor the KL divergence from the full cache's forecasts is larger by more than that share of
    the loss. (The KL is the change that a model whose forecasts are right would see, and known far more exactly.)

    Args:
        model: A causal language model, or a `PeftModel` around one, not patched; it is left as it was.
        calibration: What it reads: token ids, [T], int64, without BOS, or a text. None takes a bundled one.
        loss_change: The share that is promised.
        kv: What else the config says: window, store, offload, reuse; no codec and no overrides.
        memory: Bytes for keys and values, a number or such as ``"8GiB"``; None takes the fewest bytes. Then the first
            cache on the way that fits is taken.
        context: Tokens of a row, for `memory`, and of a block of the text; None reads blocks of 1,024.
        batch: Rows, for `memory`.
        tokens: Tokens of the text to read at most.

    Returns:
        The config, the codecs by layer and what was measured.

    Raises:
        TypeError, ValueError: An argument is not what it should be, the model cannot be read so, or no cache keeps the
            promise in `memory`: what is needed and what is reachable is named.
        RuntimeError: The model is patched already.
    """
    promise = check_share("loss_change", loss_change)
    base = _checked_base(kv)
    check_count("batch", batch)
    check_count("tokens", tokens)
    row = None if context is None else read_tokens("context", context)
    limit = None if memory is None else read_bytes("memory", memory)
    if limit is not None and row is None:
        raise ValueError("memory needs context=: the tokens of each row that it must hold, prompt and reply together")
    _check_measurable(model)
    ids = calibration_ids(model, calibration)[:tokens]
    with each_warning_once(), port("search_bar")() as on_tokens:
        search = _Search(model, ids, min(row or BLOCK, len(ids)), base, promise, on_tokens)
        if limit is None or row is None:
            return search.found(search.last_kept())
        planner = Planner.of(base_model(model), None, base_model(model).device)

        def needed_by(picks: Picks) -> int:
            return planner.footprint(config_of(base, picks, search.sliding)).on_device(row, batch)

        needed = [needed_by(picks) for picks in search.path]
        fitting = next((index for index, size in enumerate(needed) if size <= limit), len(needed) - 1)
        if needed[fitting] <= limit and search.keeps(fitting):
            return search.found(fitting)
        reached = search.last_kept()
        least, there = needed[fitting], needed_by(search.path[reached])
        raise ValueError(
            f"no codecs hold {batch} × {row:,} tokens in {about_bytes(limit)} and change the loss by "
            f"{say_percent(promise)} at most: {say_picks(search.path[fitting])} needs {about_bytes(least)} ({least:,} "
            f"bytes) and changes it by {search.measured(fitting).cost:.2%}; the promise reaches {about_bytes(there)} "
            f"({there:,} bytes). Give that memory, promise that change, shorten the context, or let a window forget "
            '(kv="window:4096")'
        )


class _Search:
    """The caches on the way from nothing lost to the fewest bytes, and which of them keep the promise."""

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        block: int,
        base: KVConfig,
        promise: float,
        on_tokens: Callable[[str, int, int], None],
    ) -> None:
        self._model, self._ids, self._block, self._base, self._promise = model, ids, block, base, promise
        # Where bytes lie and who shares them changes no number.
        self._plain = KVConfig(window=base.window)
        with patch(model, self._plain) as handle:
            layers = {i: each for i, each in enumerate(handle.new_cache().layers) if isinstance(each, CacheLayer)}
        self.sliding = {index for index, layer in layers.items() if layer.is_sliding}
        self._on_tokens, self._total = on_tokens, 0
        self._measured: dict[tuple[str, ...], _Measured] = {}  # by the choices of all layers
        self._alone, names = self._prices(list(layers))
        # Keys and values apart make for finer steps, which may lead a layer less far than larger ones would.
        ways = [greedy_path(self._alone, some) for some in (names, [name for name in names if ":" not in name])]
        self.path = [picks for way in ways for picks in way]
        self._ways = (0, len(ways[0]) - 1), (len(ways[0]), len(self.path) - 1)

    def _prices(self, layers: list[int]) -> tuple[dict[int, dict[str, Price]], list[str]]:
        """The price of each worthwhile choice of each layer, and these choices."""
        some, names = self._ids[:BLOCK], layer_choices()
        # Then come some four choices a layer, and of the way between them every other half.
        steps = 4 * len(layers)
        self._total = (2 * len(names) + 1 + steps * (TOGETHER + 1) // TOGETHER) * len(some)
        self._total += 4 * (math.ceil(math.log2(steps + 1)) + 1) * len(self._ids)
        found = self._prices_everywhere(names, layers, some)
        found |= self._prices_everywhere(between(worthwhile(found)), layers, some)
        names, nothing = worthwhile(found), found[LOSSLESS]
        lossy = [name for name in names if name != LOSSLESS]
        alone = [(layer, name) for layer in layers for name in lossy]
        picks = {f"layer {i} {name}": {**dict.fromkeys(layers, LOSSLESS), i: name} for i, name in alone}
        prices = {layer: {LOSSLESS: Price(nothing.num_bytes, 0.0)} for layer in layers}
        for (layer, name), each in zip(alone, self._measure(picks, some), strict=True):
            # A window's own loss is no choice's.
            prices[layer][name] = Price(each.held_bytes, max(each.kl - nothing.nats, 0.0))
        return prices, [LOSSLESS, *lossy]

    def _prices_everywhere(self, names: list[str], layers: list[int], ids: torch.Tensor) -> dict[str, Price]:
        """The price of each choice where all layers have it."""
        measured = self._measure({f"all layers {name}": dict.fromkeys(layers, name) for name in names}, ids)
        return {name: Price(each.held_bytes, each.kl) for name, each in zip(names, measured, strict=True)}

    def _measure(self, picks: Mapping[str, Picks], ids: torch.Tensor) -> list[_Measured]:
        """Reads some tokens under caches of these choices."""
        configs = {name: config_of(self._plain, each, self.sliding) for name, each in picks.items()}
        found: list[_Measured] = []
        for start in range(0, len(configs), TOGETHER):
            some = dict(list(configs.items())[start : start + TOGETHER])
            full, *others = compare(self._model, ids, some, self._block, CHUNK, self._report, self._ids)
            if not 0 < full.nats < math.inf:
                raise ValueError(
                    f"the full cache's loss on this text is {full.nats} nats a token, of which no share can be "
                    "promised; give another text (calibration=)"
                )
            found += [_Measured(each.nats, each.kl, full.nats, each.held_bytes, full.held_bytes) for each in others]
        return found

    def _report(self, name: str, num_tokens: int) -> None:
        self._on_tokens(name, num_tokens, self._total)

    def measured(self, index: int) -> _Measured:
        """The cache after so many steps, on the whole text; measured once."""
        picks = self.path[index]
        key = tuple(picks.values())
        if key not in self._measured:
            (self._measured[key],) = self._measure({f"step {index}": picks}, self._ids)
        return self._measured[key]

    def keeps(self, index: int) -> bool:
        """Whether the cache after so many steps keeps the promise."""
        return self.measured(index).cost <= self._promise

    def last_kept(self) -> int:
        """The index of the cache of fewest bytes that keeps the promise, of the last ones on the two ways.

        Raises:
            ValueError: it is not kept where no codec loses anything.
        """
        kept = [self._last_kept(*way) for way in self._ways]
        return min(kept, key=lambda index: self.measured(index).held_bytes)

    def _last_kept(self, first: int, last: int) -> int:
        """The index of the cache on a way that keeps the promise where the next one does not, by halving."""
        if self.keeps(last):
            return last
        if not self.keeps(first):
            raise ValueError(
                f"{str(self._base)!r} changes the loss by {self.measured(first).cost:.2%} before any codec "
                f"does, on this text, of {say_percent(self._promise)} promised; promise more, or take a larger window "
                "or none"
            )
        while last - first > 1:
            middle = (first + last) // 2
            first, last = (middle, last) if self.keeps(middle) else (first, middle)
        return first

    def found(self, index: int) -> FoundCodecs:
        """The cache after so many steps."""
        measured, picks = self.measured(index), self.path[index]
        return FoundCodecs(
            kv=config_of(self._base, picks, self.sliding),
            picks=picks,
            promised=self._promise,
            loss_change=measured.change,
            kl=measured.kl / measured.full_nats,
            held_ratio=measured.held_bytes / measured.full_bytes,
            num_tokens=len(self._ids),
            alone={layer: {name: price.nats for name, price in each.items()} for layer, each in self._alone.items()},
        )


def _checked_base(kv: KVConfig | str | None) -> KVConfig:
    base = KVConfig.of(kv)
    if base.codec != LOSSLESS or base.layers or base.loss_change is not None:
        raise ValueError(
            f"codecs are what is looked for: kv must say no codec, layers or loss_change, only what else is kept "
            f'("window:4096+paged"), got {kv!r}'
        )
    if isinstance(base.window, Window) and (base.window.global_layers or base.window.global_heads):
        raise ValueError(
            "what is found are configs of single layers, in which Window.global_layers and global_heads have no place; "
            "leave them out, or the promise"
        )
    return base


def _check_measurable(model: Any) -> None:
    check_model(model)
    base = base_model(model)
    if base.training:
        raise ValueError(
            f"{type(base).__name__} is in training mode, where dropout changes what is measured; call model.eval()"
        )
    if not parallel_plan_of(base).is_one:
        raise ValueError(
            "the model is spread over processes, which might each find other codecs; find them in one process, "
            "save the config (KVConfig.to_json) and give that to all"
        )
