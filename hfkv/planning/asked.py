"""The caches that a plan is asked for, or the usual ones."""

from __future__ import annotations

from collections.abc import Iterable

from hfkv.planning.fit import Planner
from hfkv.planning.footprint import Footprint
from hfkv.policy.config import KVConfig

DEFAULT_KV = ("none", "int8", "fp8", "int4", "int8+window:4096", "none+offload")


def asked_footprints(
    planner: Planner, kv: KVConfig | str | Iterable[KVConfig | str] | None, notes: list[str]
) -> dict[str, Footprint]:
    """The caches by name. A cache that the model cannot have is left out, with a note, unless none is left."""
    footprints: dict[str, Footprint] = {}
    refused: list[ValueError] = []
    configs = [
        KVConfig.of(each) for each in (DEFAULT_KV if kv is None else (kv,) if isinstance(kv, KVConfig | str) else kv)
    ]
    if not configs:
        raise ValueError('kv names no cache; give one, such as "int8", or None for the usual ones')
    for config in configs:
        try:
            _check_window(planner, config)
            footprints[str(config)] = planner.footprint(config)
        except ValueError as error:
            refused.append(error)
            notes.append(f"{config} is left out: {error}")
            continue
        if config.reuse is not None:
            notes.append(f"what reuse keeps between calls, at most {config.reuse}, comes on top of {config}")
    if not footprints:
        raise refused[0]
    return footprints


def _check_window(planner: Planner, kv: KVConfig) -> None:
    """Refuses a window where the attention cannot follow it, as `hfkv doctor` does; `KVCache` refuses others."""
    config = planner.geometry.config
    biased = hasattr(config, "relative_attention_num_buckets") or getattr(config, "alibi", False)
    if kv.needs_own_attention and biased:
        raise ValueError(
            f"{config.model_type!r} takes no window and no recent: its attention is not hfkv's; leave them out"
        )
