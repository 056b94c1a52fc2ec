"""`patch` and `unpatch`: the one line, and its complete undo."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hfkv.attention import NAME
from hfkv.autocast import in_own_precision
from hfkv.cache import KVCache
from hfkv.config import KVConfig
from hfkv.experts.config import MoEConfig
from hfkv.experts.report import MoEReport
from hfkv.patches.attention import set_attention
from hfkv.patches.cacheless import cacheless_reason
from hfkv.patches.generate import check_generate, set_generate_hooks
from hfkv.patches.graphs import Graphs, set_graphs
from hfkv.patches.hints import hint
from hfkv.patches.mla import set_latent_attention
from hfkv.patches.moe import set_experts
from hfkv.patches.prompt import set_prompt_hook
from hfkv.patches.recording import set_recording
from hfkv.patches.reuse import drop_pool, pool_of
from hfkv.patches.rotary import set_exact_rotary
from hfkv.patches.undo import Undo
from hfkv.prefixes import PrefixPool, ReuseStats
from hfkv.probe import base_model, frequencies, probe_rotary
from hfkv.rotary import Rotary
from hfkv.sharing import sharing_refusal

logger = logging.getLogger("hfkv")

# Every model inside a patched one: a second patch over a part of it could not be undone in any order.
_inside: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


class Patch:
    """A patched model: ``model.hfkv``. Leaving it as a context manager, or `undo`, takes the patch off.

    Attributes:
        model: the patched `PreTrainedModel` (the base model, where a `PeftModel` was given).
        kv: the policies every new cache gets.
        own_attention: why the model keeps its own attention, or None where it has the ``"hfkv"`` one.
        attention: the implementation that the decoder has, unless `own_attention`: ``"hfkv"``, or what
            `set_attn_implementation` has set since.
        rotary: see there; for caches of one's own: ``KVCache(model, kv, patch.rotary)``.
        num_layers: layers of every cache.
        own_layers: cache layers that stay transformers' own, as ``{index: class name}``.
        exact_rotary: whether rotary angles are computed in float64.
        num_latent_layers: attention layers that cache latents (MLA) and attend to them as they are.
        moe: what became of the experts, or None where nothing was asked for them.
        reads_once: by what the model and its adapters are, which outputs come besides logits where one row of a prompt
            is read for all its beams and samples; None where that cannot be.
        graphs: what captures decode steps, or None where that was not asked for.
    """

    def __init__(self, model: PreTrainedModel, kv: KVConfig) -> None:
        self.model = model
        self.kv = kv
        self.own_attention: str | None = None
        self.attention = NAME
        self.own_layers: dict[int, str] = {}
        self.num_layers = 0
        self.num_latent_layers = 0
        self.exact_rotary = False
        self.moe: MoEReport | None = None
        self.graphs: Graphs | None = None
        self._rotary: dict[int, Rotary | None] | None = None
        self._frequencies: tuple[float, ...] = ()
        self.reads_once: dict[Hashable, frozenset[str] | None] = {}
        self._undo = Undo()
        self._logged: set[str] = set()

    def undo(self) -> None:
        """Puts the model back as it was. Calling it twice is harmless."""
        try:
            self._undo.restore()
        finally:
            _inside.difference_update(_models(self.model))
            drop_pool(self)

    @property
    def own_kv(self) -> KVConfig:
        """The policies of a single cache: `kv` without reuse, which is between caches."""
        return replace(self.kv, reuse=None)

    @functools.cached_property
    def cacheless_reason(self) -> str | None:
        """Why forwards that are given no cache get none of hfkv's, or None where they do."""
        return cacheless_reason(self.model)

    def new_cache(self) -> KVCache:
        """An empty cache like those that `generate` gets."""
        return KVCache(self.model, self.own_kv, self.rotary)

    @property
    def pool(self) -> PrefixPool:
        """The prompt prefixes that calls share."""
        return pool_of(self)

    def reuse_stats(self) -> ReuseStats:
        """What calls have shared so far: hits, tokens that were not computed again, bytes kept.

        Raises:
            RuntimeError: the patch was made without reuse.
        """
        return self.pool.stats()

    def clear_reuse(self) -> None:
        """Forgets every prompt prefix; running calls keep what they have.

        Raises:
            RuntimeError: the patch was made without reuse.
        """
        self.pool.clear()

    def log_once(self, message: str) -> None:
        """A warning, the first time."""
        if message not in self._logged:
            self._logged.add(message)
            logger.warning(message)

    @property
    def rotary(self) -> dict[int, Rotary | None] | None:
        """How the model rotates its keys, by layer, where a window needs to know; None where none does.

        Raises:
            ValueError: the model rotates them in no way that is understood.
        """
        if not self.kv.needs_rotary:
            return None
        # A cast since has rounded the frequencies: then they are found out again.
        now = frequencies(self.model)
        if self._rotary is None or self._frequencies != now:
            self._rotary, self._frequencies = probe_rotary(self.model), now
        return self._rotary

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        attention = "hfkv attention" if self.own_attention is None else f"its own attention ({self.own_attention})"
        graphs = (
            "" if self.graphs is None else ", graphs" if self.graphs.off is None else f", no graphs: {self.graphs.off}"
        )
        experts = "" if self.moe is None else f", {self.moe.summary()}"
        return f"Patch({type(self.model).__name__}, kv={str(self.kv)!r}, {attention}{experts}{graphs})"


@in_own_precision
def patch(
    model: Any,
    kv: KVConfig | str | None = None,
    *,
    moe: MoEConfig | str | None = None,
    exact_rotary: bool = False,
    graphs: bool = False,
) -> Patch:
    """Gives every `generate` call of `model` a fresh hfkv cache, and the model the attention that reads it.

    Without `kv` nothing is lost: no token changes. Pipelines, PEFT adapters, streamers, beams and assistants
    go on as before. A cache passed as ``past_key_values`` is used as it is.

    Args:
        model: a transformers model that can generate, or a `PeftModel` around one.
        kv: a `KVConfig`, its string form such as ``"int8+window:4096"``, or None.
        moe: a `MoEConfig` or its string form: ``"auto"`` gives the experts of a sparse model their fast form, with the
            numbers they have (on a CPU the weights are packed, for inference and for adapters around them);
            ``"int8"`` and ``"int4"`` write them in fewer bytes; ``"offload"`` keeps only the last used ones on the
            device. The router is the model's own. None leaves the experts alone. See ``handle.moe``.
        exact_rotary: compute rotary angles in float64, exact at any position. Changes the last bits of results.
        graphs: capture the decode step in a CUDA graph and replay it. Where that cannot be, the reason is logged and
            the step runs as ever.

    Returns:
        The handle: ``handle.undo()``, or use it in a ``with`` statement.

    Raises:
        TypeError: not such a model, or not a `kv`.
        ValueError: the model has no layered KV cache, `kv` does not fit its layers, the model has no experts that `moe`
            could be for, or it has no rotary embedding that could be made exact.
        RuntimeError: the model is patched already.
        NotImplementedError: a private method of transformers that this overrides has changed.
    """
    for name, given in (("exact_rotary", exact_rotary), ("graphs", graphs)):
        if not isinstance(given, bool):
            raise TypeError(f"hfkv.patch takes True or False for {name}, got {given!r}")
    base = _base_model(model)
    if "hfkv" in vars(base):
        raise RuntimeError(
            f"{type(base).__name__} is already patched ({base.hfkv!r}); take that off first: hfkv.unpatch(model)"
        )
    overlapping = [part for part in _models(base) if part in _inside or "hfkv" in vars(part)]
    if overlapping:
        raise RuntimeError(
            f"{type(base).__name__} is part of a patched model, or a part of it ({type(overlapping[0]).__name__}) is "
            "patched already; take that patch off first"
        )
    handle = Patch(base, KVConfig.of(kv))
    experts = None if moe is None else MoEConfig.of(moe)
    if graphs and experts is not None and experts.offload:
        raise ValueError(
            f"moe={str(experts)!r} with graphs=True: offloaded experts are brought by the host in every step, which a "
            "CUDA graph cannot hold; leave one of them out"
        )
    check_generate(base)
    probe = handle.new_cache()
    if handle.kv.reuse is not None:
        reason = sharing_refusal(base.config, probe)
        if reason is not None:
            raise ValueError(f"reuse: {reason}; leave reuse out")
    ours = probe.kv_layers
    handle.num_layers = len(probe.layers)
    handle.own_layers = {i: type(layer).__name__ for i, layer in enumerate(probe.layers) if layer not in ours}
    try:
        handle.own_attention = set_attention(base, handle._undo)
        if handle.own_attention is not None:
            _accept_own_attention(handle)
        else:
            handle.num_latent_layers = set_latent_attention(base, handle._undo)
        set_generate_hooks(base, handle._undo)
        if exact_rotary:
            set_exact_rotary(base, handle._undo)
            handle.exact_rotary = True
        if graphs:
            handle.graphs = set_graphs(base, handle._undo)
        set_recording(base, handle._undo)
        if model is not base:
            set_prompt_hook(model, handle._undo)
        if experts is not None:
            # The last: what is written in fewer bytes cannot be taken back.
            handle.moe = set_experts(base, experts, handle._undo)
        handle._undo.settle()
        handle._undo.set(base, "hfkv", handle)
        _inside.update(_models(base))
    except BaseException:
        handle.undo()
        raise
    if handle.own_layers:
        kinds = sorted(set(handle.own_layers.values()))
        logger.warning("%s: layers of kind %s keep transformers' own cache", type(base).__name__, ", ".join(kinds))
    return handle


def unpatch(model: Any) -> None:
    """Takes the patch off a model.

    Raises:
        RuntimeError: the model is not patched.
    """
    base = _base_model(model)
    if "hfkv" not in vars(base):
        raise RuntimeError(f"{type(base).__name__} is not patched")
    base.hfkv.undo()


def _accept_own_attention(handle: Patch) -> None:
    name = type(handle.model).__name__
    if handle.kv.window is not None or any(kv.window is not None for kv in handle.kv.layers.values()):
        raise ValueError(
            f"{name} keeps its own attention ({handle.own_attention}), which knows nothing of a window; leave the "
            "window out"
        )
    logger.warning("%s keeps its own attention: %s; it reads decoded caches", name, handle.own_attention)


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _base_model(model: Any) -> PreTrainedModel:
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"hfkv.patch takes a transformers model or a PeftModel, got {type(model).__name__}; {hint(model)}"
        )
    return base
