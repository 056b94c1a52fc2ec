"""`Contender`: who takes part, hfkv's or a peer's, and why it cannot where it cannot; those of the suites of caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedConfig, QuantizedCache, StaticCache

from hfkv.bench.setting import BenchError
from hfkv.cache.kv_cache import KVCache
from hfkv.experts.config import MoEConfig
from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window

GRAPHS = "+graphs"  # behind a config: its decode steps replayed from CUDA graphs
NO_CACHE, DYNAMIC, STATIC, OFFLOADED = "no-cache", "DynamicCache", "StaticCache+compile", "DynamicCache+offload"
# By peer, what makes an empty cache for so many tokens.
_MAKERS: dict[str, Callable[[PreTrainedConfig, int], Any] | None] = {
    NO_CACHE: None,
    DYNAMIC: lambda config, tokens: DynamicCache(config=config),
    STATIC: StaticCache,
    "QuantizedCache:fp8": lambda config, tokens: QuantizedCache("fp8", config),
    "QuantizedCache:quanto": lambda config, tokens: QuantizedCache("quanto", config),
    "QuantizedCache:hqq": lambda config, tokens: QuantizedCache("hqq", config),
    OFFLOADED: lambda config, tokens: DynamicCache(config=config, offloading=True),
}
_PACKAGES = {"QuantizedCache:quanto": "optimum-quanto", "QuantizedCache:hqq": "hqq"}
PEERS = tuple(_MAKERS)


@dataclass(frozen=True)
class Contender:
    """A cache, or a way to run experts, that takes part.

    Attributes:
        kv, moe: the config of hfkv's cache, or of hfkv's experts; both None for a peer.
        new_cache: makes an empty cache from a config or a model, for so many tokens; None without a cache.
        is_compiled: whether its decode steps go through torch.compile.
        graphs: whether its decode steps are replayed from a CUDA graph.
        implementation: a peer's, of transformers' experts interface; else None.
        bare: for experts with adapters on them, the name of the same without; else None.
        reason: why it cannot take part, or None.
    """

    name: str
    kv: KVConfig | None = None
    moe: MoEConfig | None = None
    new_cache: Callable[[Any, int], Any] | None = None
    is_compiled: bool = False
    graphs: bool = False
    implementation: str | None = None
    bare: str | None = None
    reason: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.kv is not None or self.moe is not None

    @property
    def shares(self) -> bool:
        """Whether its model keeps prefixes between calls."""
        return self.kv is not None and self.kv.reuse is not None


def named(names: Sequence[str], known: Sequence[str]) -> set[str]:
    """The peers of these names, in upper or lower case; a `BenchError` where one is not known."""
    spelt = {name.lower(): name for name in known}
    unknown = [name for name in names if name.lower() not in spelt]
    if unknown:
        raise BenchError(f"the peer {unknown[0]!r} is unknown; allowed: all, {', '.join(known)}")
    return {spelt[name.lower()] for name in names}


def ours(text: str) -> Contender:
    """hfkv's cache of a config; with `GRAPHS` behind it, its decode steps from CUDA graphs.

    A text that is no config, or one whose results hfkv bench has no check for, raises a `BenchError`.
    """
    try:
        kv = KVConfig.parse(text.removesuffix(GRAPHS))
    except (TypeError, ValueError) as error:
        raise BenchError(f"kv {error}") from error
    window = kv.window
    if isinstance(window, Window) and (window.needs_rotary or window.global_layers or window.global_heads):
        raise BenchError(
            f"--kv {text!r}: hfkv bench has no check for sink_positions:cache, summaries, global layers or global "
            "heads; leave them out (hfkv eval measures what they cost)"
        )
    own = replace(kv, reuse=None)
    return Contender(text, kv, new_cache=lambda model, tokens: KVCache(model, own), graphs=text.endswith(GRAPHS))


def ours_on(texts: Sequence[str], config: PreTrainedConfig) -> list[Contender]:
    """hfkv's caches of some configs, for models of a config; a `BenchError` where one cannot be had."""
    found = [ours(text) for text in texts]
    for contender in found:
        assert contender.new_cache is not None
        try:
            contender.new_cache(config, 1)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise BenchError(f"kv {contender.name!r} on {config.model_type!r}: {error}") from error
    return found


def peers(names: Sequence[str] | None, config: PreTrainedConfig, device: torch.device) -> list[Contender]:
    """The peers of these names (None: all), for a model's config, DynamicCache first and always.

    Those that cannot run come with the reason.
    """
    wanted = set(PEERS) if names is None else {DYNAMIC, *named(names, PEERS)}
    ordered = sorted((name for name in PEERS if name in wanted), key=lambda name: name != DYNAMIC)
    return [
        Contender(name, None, None, _new_cache(name), name == STATIC, reason=_reason(name, config, device, names))
        for name in ordered
    ]


def _new_cache(name: str) -> Callable[[Any, int], Any] | None:
    make = _MAKERS[name]
    return make and (lambda model, tokens: make(getattr(model, "config", model), tokens))


def _reason(name: str, config: PreTrainedConfig, device: torch.device, names: Sequence[str] | None) -> str | None:
    if name == STATIC and device.type == "cpu" and names is None:
        return "on a CPU transformers does not compile by itself; name it among the peers to have it so"
    if name == STATIC:
        return _compile_reason(device)
    if name == OFFLOADED:
        return "needs an accelerator: it moves layers to the host and back" if device.type != "cuda" else None
    try:
        make = _MAKERS[name]
        if make is not None:
            make(config, 1)
    except ImportError:
        return f"needs {_PACKAGES[name]}, which is not installed: pip install {_PACKAGES[name]}"
    except ValueError as error:  # layers it does not do, or a transformers that does not know the backend
        return f"transformers {transformers.__version__} refuses it: {' '.join(str(error).split())}"
    return None


def _compile_reason(device: torch.device) -> str | None:
    """Why torch.compile does not work here (no C++ compiler, no Triton), or None; found out by compiling."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler's absence looks like
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0] or type(error).__name__}"
    return None
