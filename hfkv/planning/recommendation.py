"""`Recommendation`: the least lossy weights and cache that fit, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hfkv.codecs import CODECS, Codecs
from hfkv.planning.footprint import Footprint
from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window


def least_lossy_codecs() -> list[str]:
    """The codecs by what they add to a model's loss, without the coarse ones; last those not measured."""
    return sorted((name for name, codec in CODECS.items() if not codec.is_coarse), key=_loss)


def _loss(codec: str) -> float:
    percent = Codecs.named(codec).loss_percent
    return math.inf if percent is None else percent


@dataclass(frozen=True)
class Recommendation:
    """The weights and the cache to choose.

    Attributes:
        weights: the name of the weights' precision.
        kv: a cache, in words.
        costs: what this costs, in words.
    """

    weights: str
    kv: str
    costs: str


def recommend(
    footprints: Mapping[str, Footprint], weights: Sequence[str], holds: Callable[[str, Footprint], bool]
) -> Recommendation | None:
    """Picks the first that fits: caches with every token on the device, then offloaded ones, then windows.

    In each of these, weights of higher precision come first, and with the same weights the codec that loses least.

    Args:
        footprints: caches by name.
        weights: names of precisions, the least lossy first.
        holds: whether weights of a name and a cache fit together.
    """
    for kind in range(3):
        alike = [(name, footprint) for name, footprint in footprints.items() if _kind(footprint) == kind]
        alike.sort(key=lambda item: _loss(_coarsest(item[1].kv)))
        for precision in weights:
            for name, footprint in alike:
                if holds(precision, footprint):
                    return Recommendation(precision, name, _costs(precision, footprint))
    return None


def _kind(footprint: Footprint) -> int:
    """The kind of a cache: 0 has every token on the device, 1 some elsewhere, 2 has let some go."""
    if _windows(footprint.kv):
        return 2
    return 1 if footprint.is_offloaded else 0


def _configs(kv: KVConfig) -> tuple[KVConfig, ...]:
    return (kv, *kv.layers.values())


def _windows(kv: KVConfig) -> list[Window]:
    return [config.window for config in _configs(kv) if isinstance(config.window, Window)]


def _coarsest(kv: KVConfig) -> str:
    return max((config.codec for config in _configs(kv)), key=_loss)


def _costs(precision: str, footprint: Footprint) -> str:
    codec = _coarsest(footprint.kv)
    recent = next((config.recent for config in _configs(footprint.kv) if config.recent is not None), None)
    costs = {
        "int8": "linear layers in 8 bits",
        "int4": "linear layers in 4 bits",
    }
    found = [costs[precision]] if precision in costs else []
    percent = Codecs.named(codec).loss_percent
    if recent is not None:
        found.append(f"less is lost than with {codec} alone: {recent.size} recent tokens have {recent.codec}")
    elif percent is None:
        found.append(f"what {codec} adds to the loss was not measured")
    elif percent:
        found.append(f"{percent:g} % more loss on the bundled model (docs/understand/concepts.md)")
    if footprint.is_offloaded:
        found.append("every step waits for keys and values to come over the bus")
    if _windows(footprint.kv):
        found.append("tokens that have left the window are forgotten: what only they say is not found again")
    return "; ".join(found) or "nothing is lost"
