"""`Patch`: the handle of a patched model, ``model.hfkv``."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hfkv.attention.function import NAME
from hfkv.cache.kv_cache import KVCache
from hfkv.codecs.key_mean import KeyMean
from hfkv.experts.report import MoEReport
from hfkv.models.fingerprint import Fingerprint
from hfkv.models.probe import frequencies, probe_rotary
from hfkv.models.rotary import Rotary
from hfkv.patches.cacheless import cacheless_reason
from hfkv.patches.graphs import Graphs
from hfkv.patches.keys.means import key_means, slower_kernels, wants_means
from hfkv.patches.pools import drop_pool, pool_of
from hfkv.patches.undo import Undo
from hfkv.policy.config import KVConfig
from hfkv.sharing.prefix_pool import PrefixPool, ReuseStats

logger = logging.getLogger("hfkv")

# Every model inside a patched one: a second patch over a part of it could not be undone in any order.
inside: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


class Patch:
    """A patched model: ``model.hfkv``. Leaving it as a context manager, or `undo`, takes the patch off.

    Attributes:
        model: the patched `PreTrainedModel` (the base model, where a `PeftModel` was given).
        kv: the policies that every new cache gets.
        own_attention: why the model keeps its own attention, or None where it has the ``"hfkv"`` one.
        attention: the implementation that the decoder has, unless `own_attention`: ``"hfkv"``, or what
            `set_attn_implementation` has set since.
        no_means: why no mean is taken off its keys where a codec would gain by one, or None.
        rotary: how the model rotates its keys, for caches of one's own:
            ``KVCache(model, kv, patch.rotary, patch.key_means)``.
        num_layers: the number of layers of every cache.
        own_layers: cache layers that stay transformers' own, as ``{index: class name}``.
        exact_rotary: whether rotary angles are computed in float64.
        num_latent_layers: the number of attention layers that cache latents (MLA) and attend to them as they are.
        moe: what became of the experts, or None where nothing was asked for them.
        reads_once: for each state of the model and its adapters, the outputs besides logits where one row of a prompt
            is read for all its beams and samples; None where rows have to be read one by one.
        graphs: what captures decode steps; None where that was not asked for.
        blueprint: an empty cache that those of `generate` are copies of; see `hfkv.patches.fresh_cache`.
    """

    def __init__(self, model: PreTrainedModel, kv: KVConfig) -> None:
        self.model = model
        self.kv = kv
        self._calibration: Any = None
        self._is_captured = False
        self.no_means: str | None = None
        self.own_attention: str | None = None
        self.attention = NAME
        self.own_layers: dict[int, str] = {}
        self.num_layers = 0
        self.num_latent_layers = 0
        self.exact_rotary = False
        self.moe: MoEReport | None = None
        self.graphs: Graphs | None = None
        self.blueprint: Any = None
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
            inside.difference_update(models_in(self.model))
            drop_pool(self)

    @property
    def own_kv(self) -> KVConfig:
        """The policies of a single cache: `kv` without reuse, which is shared between caches."""
        return replace(self.kv, reuse=None)

    @functools.cached_property
    def cacheless_reason(self) -> str | None:
        """Why forwards that are given no cache get none of hfkv's, or None where they do."""
        return cacheless_reason(self.model)

    def new_cache(self) -> KVCache:
        """An empty cache like those that `generate` gets."""
        return KVCache(self.model, self.own_kv, self.rotary, self.key_means)

    @property
    def pool(self) -> PrefixPool:
        """The prompt prefixes that calls share."""
        return pool_of(self, self.kv)

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
        """Logs a warning the first time it comes."""
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

    @functools.cached_property
    def key_means(self) -> dict[int, KeyMean]:
        """The means that are taken off the model's keys, by layer, where a codec gains by one; none otherwise."""
        if not wants_means(self.kv):
            return {}
        if self._is_captured:
            means, self.no_means = {}, "CUDA graphs do not know the positions of new keys"
        else:
            means, self.no_means = key_means(self.model, self._calibration, self.exact_rotary)
            self.no_means = self.no_means or slower_kernels(means, self.kv, self.model.dtype)
            means = {} if self.no_means is not None else means
        if self.no_means is not None:
            self.log_once(
                f"{type(self.model).__name__}: no mean is taken off its keys, and codes lose more: {self.no_means}"
            )
        return means

    def root(self, state: Fingerprint) -> bytes:
        """The key under which pages may be shared that a model in this state fills."""
        assert self.kv.reuse is not None
        digests = ",".join(f"{index} {mean.digest()}" for index, mean in self.key_means.items())
        return state.key("\0".join((self.kv.reuse.salt, digests)) if digests else self.kv.reuse.salt)

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
        layers = "".join(f", layers {indices} {kv}" for indices, kv in self.kv.layers.items())
        return f"Patch({type(self.model).__name__}, kv={str(self.kv)!r}{layers}, {attention}{experts}{graphs})"


def models_in(model: PreTrainedModel) -> list[PreTrainedModel]:
    """A model and the models inside it."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
