"""What a layer's cache may be written as, and in which order layers take what is cheaper."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import NamedTuple

from hfkv.codecs import CODECS
from hfkv.policy.codec_pair import word_of
from hfkv.policy.config import KVConfig

LOSSLESS = "none"
# A choice's name for every layer.
Picks = dict[int, str]


class Price(NamedTuple):
    """The price of a choice: the bytes that a cache takes with it, and the nats a token that it loses."""

    num_bytes: int
    nats: float


def layer_choices() -> list[str]:
    """The codecs of a layer: what loses nothing, and every lossy one."""
    return [LOSSLESS, *(name for name, codec in CODECS.items() if not codec.is_lossless)]


def between(names: Sequence[str]) -> list[str]:
    """Keys of one codec and values of the next, and the other way round, for codecs in the order of their bytes."""
    return [word_of(*sides) for pair in pairwise(names) for sides in (pair, pair[::-1])]


def config_of(base: KVConfig, picks: Picks, sliding: Collection[int] = ()) -> KVConfig:
    """The config that gives each layer its choice: the commonest is everybody's, others are overrides.

    Args:
        base: what else the config says; without a codec and overrides.
        picks: the choices.
        sliding: layers that slide over tokens of their own, which take no window.
    """
    common = Counter(picks.values()).most_common(1)[0][0]
    overrides = {}
    kinds = [(layer, (name, base.window is not None and layer in sliding)) for layer, name in sorted(picks.items())]
    # Neighbours that are alike share an override.
    for (_, (name, slides)), run in groupby(enumerate(kinds), lambda item: (item[1][0] - item[0], item[1][1])):
        if name != common:
            layers = [layer for _, (layer, _) in run]
            own = replace(base, codec=name, device_budget=None, reuse=None)
            key = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
            overrides[key] = replace(own, window=None) if slides else own
    return replace(base, codec=common, layers=overrides)


def say_picks(picks: Picks) -> str:
    """The choices in words: ``"layers 0-1 none, 2-5 int8"``."""
    parts = []
    for (_, name), run in groupby(enumerate(sorted(picks.items())), lambda item: (item[1][0] - item[0], item[1][1])):
        layers = [layer for _, (layer, _) in run]
        parts.append(f"{layers[0]}-{layers[-1]} {name}" if len(layers) > 1 else f"{layers[0]} {name}")
    return f"layer{'s' if len(picks) > 1 else ''} {', '.join(parts)}"


def worthwhile(prices: Mapping[str, Price]) -> list[str]:
    """The choices that nothing else beats in bytes and in loss, the most bytes first."""
    kept: list[str] = []
    for name in sorted(prices, key=lambda name: (prices[name].nats, prices[name].num_bytes)):
        if not kept or prices[name].num_bytes < prices[kept[-1]].num_bytes:
            kept.append(name)
    return kept


def greedy_path(prices: Mapping[int, Mapping[str, Price]], names: Sequence[str]) -> list[Picks]:
    """The choices of all layers step by step, from nothing lost to the fewest bytes.

    Each step takes one layer to the choice that saves most bytes for each nat it adds, as if losses added up.

    Args:
        prices: the price of each layer's choices, the lossless one among them.
        names: the choices, of which the first is where all layers begin.

    Returns:
        The picks before the first step and after each.
    """
    picks = dict.fromkeys(prices, names[0])
    path = [dict(picks)]
    while True:
        steps = []
        for layer, of_layer in prices.items():
            now = of_layer[picks[layer]]
            for order, name in enumerate(names):
                saved = now.num_bytes - of_layer[name].num_bytes
                if saved > 0:
                    steps.append((-_rate(saved, of_layer[name].nats - now.nats), layer, order))
        if not steps:
            return path
        _, layer, order = min(steps)
        picks[layer] = names[order]
        path.append(dict(picks))


def _rate(saved: int, nats: float) -> float:
    """Bytes saved for each nat; rounding may have a coarser choice lose no more, and NaN is the worst."""
    return 0.0 if math.isnan(nats) else saved / max(nats, 1e-12)
