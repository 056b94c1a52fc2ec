"""`Contender`: who takes part, hfkv's or a peer's, and why it cannot where it cannot; those of the suites of caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedConfig, QuantizedCache, StaticCache

from hfkv.bench.errors import BenchError
from hfkv.cache.kv_cache import KVCache
from hfkv.experts.config import MoEConfig
from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window

GRAPHS = "+graphs"  # behind a config: its decode steps replayed from CUDA graphs
NO_CACHE, DYNAMIC, STATIC, OFFLOADED = "no-cache", "DynamicCache", "StaticCache+compile", "DynamicCache+offload"
_QUANTIZED = {f"QuantizedCache:{backend}": backend for backend in ("fp8", "quanto", "hqq")}
_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
PEERS = (NO_CACHE, DYNAMIC, STATIC, *_QUANTIZED, OFFLOADED)


@dataclass(frozen=True)
class Contender:
    """A cache, or a way to run experts, that takes part.

    Attributes:
        name: the name that is shown.
        kv: the config of hfkv's cache; None for a peer and for experts.
        moe: the config of hfkv's experts; None for a peer and for caches.
        new_cache: makes an empty cache from a config or a model, for so many tokens; None without a cache.
        is_compiled: whether its decode steps go through torch.compile.
        graphs: whether its decode steps are replayed from a CUDA graph.
        implementation: a peer's, of transformers' experts interface; else None.
        bare: of experts with adapters on them, the name of the same without; else None.
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


def named(names: Sequence[str], known: Sequence[str]) -> set[str]:
    """The peers of these names, in upper or lower case.

    Raises:
        BenchError: a name is not among those known.
    """
    spelt = {name.lower(): name for name in known}
    unknown = [name for name in names if name.lower() not in spelt]
    if unknown:
        raise BenchError(f"the peer {unknown[0]!r} is unknown; allowed: all, {', '.join(known)}")
    return {spelt[name.lower()] for name in names}


def ours(text: str) -> Contender:
    """hfkv's cache of a config; with `GRAPHS` behind it, its decode steps from CUDA graphs.

    Raises:
        BenchError: the text is no config, or one whose results hfkv bench has no check for.
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
    """hfkv's caches of some configs, for models of a config.

    Raises:
        BenchError: one cannot be had, or not for such a model.
    """
    found = [ours(text) for text in texts]
    for contender in found:
        assert contender.new_cache is not None
        try:
            contender.new_cache(config, 1)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise BenchError(f"kv {contender.name!r} on {config.model_type!r}: {error}") from error
    return found


def peers(names: Sequence[str] | None, config: PreTrainedConfig, device: torch.device) -> list[Contender]:
    """The peers of these names, DynamicCache first and always, those that cannot run with the reason.

    Args:
        names: names in `PEERS`, in upper or lower case; None for all of them.
        config: the config of the model the caches are for.
        device: where.

    Raises:
        BenchError: a name is unknown.
    """
    wanted = set(PEERS) if names is None else {DYNAMIC, *named(names, PEERS)}
    ordered = [DYNAMIC, *(name for name in PEERS if name in wanted and name != DYNAMIC)]
    return [_peer(name, config, device, is_named=names is not None) for name in ordered]


def _peer(name: str, config: PreTrainedConfig, device: torch.device, is_named: bool) -> Contender:
    def cache(make: Callable[[PreTrainedConfig, int], Any], reason: str | None = None) -> Contender:
        return Contender(
            name,
            new_cache=lambda model, tokens: make(getattr(model, "config", model), tokens),
            is_compiled=name == STATIC,
            reason=reason,
        )

    if name == NO_CACHE:
        return Contender(name)
    if name == DYNAMIC:
        return cache(lambda config, tokens: DynamicCache(config=config))
    if name == STATIC:
        reason: str | None = "on a CPU transformers does not compile by itself; name it among the peers to have it so"
        return cache(StaticCache, _compile_reason(device) if device.type != "cpu" or is_named else reason)
    if name == OFFLOADED:
        reason = "needs an accelerator: it moves layers to the host and back" if device.type != "cuda" else None
        return cache(lambda config, tokens: DynamicCache(config=config, offloading=True), reason)
    backend = _QUANTIZED[name]
    return cache(lambda config, tokens: QuantizedCache(backend, config), _quantized_reason(backend, config))


def _quantized_reason(backend: str, config: PreTrainedConfig) -> str | None:
    try:
        QuantizedCache(backend, config)
    except ImportError:
        package = _PACKAGES[backend]
        return f"needs {package}, which is not installed: pip install {package}"
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
