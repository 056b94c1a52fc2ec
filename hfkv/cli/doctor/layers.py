"""Kernels that each layer of a model would use, and why: the second table of ``hfkv doctor``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkv.cli.doctor.key_means import note_of
from hfkv.cli.doctor.own_attention import no_kernel_reason, own_attention_of
from hfkv.cli.errors import CommandError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from hfkv.cache.kv_cache import KVCache
    from hfkv.kernels.backend import Kernel
    from hfkv.kernels.selftest.inputs import HeadShape
    from hfkv.policy.config import KVConfig

# Queries that stand for a prefill: so many that every device takes its kernel for many.
MANY_QUERIES = 1024
NO_KERNEL, OWN = "decode + sdpa", "decode + own"


@dataclass(frozen=True)
class Use:
    """What a layer's tokens are read or written by.

    Attributes:
        name: ``"decode"``, ``"prefill"``, ``"append"``; with ``", moved"`` once a window has moved, and with the codec
            behind a comma where some tokens of the layer are in another.
        kernel: the kernel's name, or the operations in its place.
        why: the reason.
    """

    name: str
    kernel: str
    why: str


@dataclass
class LayerGroup:
    """Layers that are alike.

    Attributes:
        cache: what they keep, in the words of ``kv=``.
        heads: None where the layers are not hfkv's.
        uses: what reads and writes them.
        layers: their indices.
    """

    cache: str
    heads: HeadShape | None
    uses: list[Use]
    layers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ModelReport:
    """What would become of a model.

    Attributes:
        name: the name that was given.
        model_type: type of its text decoder.
        kv: the config in its words.
        notes: what else there is to know.
        groups: its layers.
    """

    name: str
    model_type: str
    kv: str
    notes: list[str]
    groups: list[LayerGroup]

    @property
    def heads(self) -> tuple[HeadShape, ...]:
        """The different heads of the layers that are hfkv's."""
        return tuple(dict.fromkeys(group.heads for group in self.groups if group.heads is not None))


def read_config(name: str) -> PreTrainedConfig:
    """The config of a model, of which nothing else is read.

    Raises:
        CommandError: there is none.
    """
    from transformers import AutoConfig

    if not name:
        raise CommandError(
            "--model is empty; give a folder that save_pretrained wrote, or a name on the Hub (org/name)"
        )
    folder = Path(name).expanduser()
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(
            f"--model {name!r} has no config that could be read: {first_line(error)} Give a folder that "
            "save_pretrained wrote, or a name on the Hub (org/name)."
        ) from error


def describe_layers(
    name: str, config: PreTrainedConfig, kv: str, dtype: torch.dtype, device: torch.device
) -> ModelReport:
    """Says which kernels every layer would use, from the model's config alone.

    Raises:
        CommandError: `kv` does not fit the model, or the model has no layer for it.
    """
    from hfkv.policy.config import KVConfig

    try:
        wanted = KVConfig.parse(kv)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--kv {error}") from error
    decoder = config.get_text_config(decoder=True)
    try:
        cache = _cache(config, wanted)
    except ValueError as error:
        raise CommandError(f"--kv {kv!r} and --model {name!r} do not go together: {error}") from error
    notes = []
    own, bias = own_attention_of(config, decoder), no_kernel_reason(decoder)
    if any(layer.needs_own_attention for layer in cache.kv_layers) and (own or bias):
        raise CommandError(
            f"--kv {kv!r}: {decoder.model_type!r} takes no window and no recent: {own or bias}; leave the window out "
            "(its words, such as window:1024), or recent"
        )
    if own is not None:
        notes.append(f"the model keeps its own attention: {own}")
    if wanted.needs_rotary:
        notes.append(
            "how the model rotates its keys is found out by a forward pass with its weights; hfkv.patch and "
            "hfkv generate do so, and refuse a model whose rotation they do not understand"
        )
    has_mean, note = note_of(wanted, config)
    notes += [note] if note is not None else []
    num_layers = getattr(decoder, "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers > len(cache.layers):
        notes.append(f"layers {len(cache.layers)}-{num_layers - 1} have no cache: they share that of earlier layers")
    groups: list[LayerGroup] = []
    for index, layer in enumerate(cache.layers):
        group = _AskedLayer(layer, index, decoder, own, bias, dtype, device, has_mean).group()
        alike = next((g for g in groups if (g.cache, g.heads, g.uses) == (group.cache, group.heads, group.uses)), None)
        if alike is None:
            groups.append(group)
        (alike or group).layers.append(index)
    return ModelReport(name, decoder.model_type, str(wanted), notes, groups)


def _cache(config: PreTrainedConfig, kv: KVConfig) -> KVCache:
    from hfkv.cache.kv_cache import KVCache
    from hfkv.sharing.refusals import sharing_refusal

    if kv.reuse is not None:
        cache = _cache(config, replace(kv, reuse=None))
        reason = sharing_refusal(config, cache)
        if reason is not None:
            raise ValueError(f"reuse: {reason}; leave reuse out")
        return cache
    if not kv.needs_rotary:
        return KVCache(config, kv)
    # Only which layers there are matters here, not how their keys are rotated.
    return KVCache(config, kv, rotary=dict.fromkeys(range(len(KVCache(config).layers))))


@dataclass(frozen=True)
class _AskedLayer:
    layer: Any
    index: int
    config: PreTrainedConfig
    own_attention: str | None
    position_bias: str | None
    dtype: torch.dtype
    device: torch.device
    has_mean: bool

    def group(self) -> LayerGroup:
        """What the layer keeps, and what reads and writes it."""
        from hfkv.cache.layers.base import CacheLayer

        if not isinstance(self.layer, CacheLayer):
            theirs = f"transformers' own, {type(self.layer).__name__}"
            return LayerGroup(theirs, None, [Use("all", "its own", self._kind())])
        kv = self.layer.kv
        cache = str(replace(kv, window=None) if self.layer.is_sliding else kv)
        if self.layer.is_sliding:
            cache += f", model's own window: {self.layer.sliding}"
        cache = ", ".join((cache, *self.layer.extras))
        heads = heads_of(self.config, self.index, self.layer.is_sliding)
        if len({leaf.kv.codec for leaf in self.layer.leaves}) == 1:
            return LayerGroup(cache, heads, [*self._reads(heads), self._append(heads)])
        uses = []
        for leaf in self.layer.leaves:
            own = replace(self, layer=leaf)
            of_leaf = (*own._reads(heads), own._append(heads))
            uses += [replace(use, name=f"{use.name}, {leaf.kv.codec}") for use in of_leaf]
        return LayerGroup(cache, heads, uses)

    def _kind(self) -> str:
        from hfkv.models.probe import cross_attention_layers

        if self.index in cross_attention_layers(self.config):
            return "it caches the keys of a cross-attention"
        return "it is no plain attention layer: hfkv caches keys and values only"

    @property
    def _is_windowed(self) -> bool:
        return bool(self.layer.needs_own_attention)

    def _reads(self, heads: HeadShape) -> list[Use]:
        uses = []
        for name, num_queries in (("decode", 1), ("prefill", MANY_QUERIES)):
            kernel, why = self._attention(heads, num_queries)
            if heads.is_latent:
                uses.append(Use(name, kernel, why))
                moved = self._attention(heads, num_queries, is_moved=True)
                if self._is_windowed and moved != (kernel, why):
                    uses.append(Use(f"{name}, moved", *moved))
                continue
            if not self._is_windowed or self._reads_moved_windows(heads, num_queries):
                uses.append(Use(name, kernel, why))
                continue
            # What `windowed_attention` does.
            by_torch = "sdpa" if num_queries == 1 else "torch blocks"
            lie = "plain tokens on a CPU are attended to where they lie, without a kernel"
            if not self.layer.shows_tensors:
                uses.append(Use(name, by_torch, f"heads hold different tokens, and {lie}"))
                continue
            uses.append(Use(name, kernel, why))
            uses.append(Use(f"{name}, moved", by_torch, f"once the window has moved, {lie}"))
        return uses

    def _reads_moved_windows(self, heads: HeadShape, num_queries: int) -> bool:
        try:
            return self._kernel(heads, num_queries, is_moved=True).reads_moved_windows
        except Exception:  # `_attention` tells it
            return True

    def _attention(self, heads: HeadShape, num_queries: int, is_moved: bool = False) -> tuple[str, str]:
        if self.own_attention is not None:
            return OWN, "the model's own attention reads its tokens decoded"
        if self.position_bias is not None:
            return NO_KERNEL, self.position_bias
        try:
            kernel = self._kernel(heads, num_queries, is_moved)
        except Exception as error:  # of importing a broken Triton, say: told here, and counted by the self-test
            return "none", f"asking for a kernel raised {type(error).__name__}: {first_line(error)}"
        most = f"{kernel.worth_from / 1e6:.2g} million numbers of keys and values"
        few = f"; up to {most} all are decoded for one call of sdpa" if num_queries == 1 and kernel.worth_from else ""
        return kernel.name, kernel.reason + few

    def _kernel(self, heads: HeadShape, num_queries: int, is_moved: bool) -> Kernel:
        from hfkv.attention.latent.crossover import form_for
        from hfkv.kernels.dispatch import attention_kernel, expanded_kernel, latent_kernel
        from hfkv.models.latents import widths_of

        widths = widths_of(self.config, self.index)
        form = widths and form_for(num_queries, num_queries, widths, self.dtype, self.device)
        if form == "expanded" and num_queries > 1:
            expanded = expanded_kernel(self.dtype, self.device, is_pair=self.layer.leaves[0].codecs.is_pair)
            # Under a window what no kernel expands is absorbed, and so is what turns with its place.
            if not is_moved or (expanded.run is not None and not self.layer.window.needs_rotary):
                return expanded
        leaf = self.layer.leaves[0]
        innermost = leaf.keeps_values_innermost(self.dtype, self.device, heads[:2])
        asked = leaf.kv.codec, self.dtype, self.device, num_queries, heads[:2], innermost
        if widths is not None:
            return latent_kernel(*asked)
        with_mean = attention_kernel(*asked, self.has_mean and leaf.gains_by_mean)
        # A patch takes no mean off for a device whose kernels know nothing of it.
        return with_mean if with_mean.run is not None else attention_kernel(*asked)

    def _append(self, heads: HeadShape) -> Use:
        from hfkv.kernels.dispatch import append_kernel

        if self.layer.kv.offload and self.device.type != "cpu":
            return Use("append", "torch", "offloaded: encoded on the device; full pages go to host memory")
        try:
            innermost = self.layer.leaves[0].keeps_values_innermost(self.dtype, self.device, heads[:2])
            kernel = append_kernel(self.layer.kv.codec, self.dtype, self.device, heads[:2], innermost)
        except Exception as error:  # as in `_attention`
            return Use("append", "none", f"asking for a kernel raised {type(error).__name__}: {first_line(error)}")
        return Use("append", kernel.name, kernel.reason)


def heads_of(config: PreTrainedConfig, index: int, is_sliding: bool) -> HeadShape:
    """The heads of a plain attention layer, as a config says them.

    Args:
        config: config of the text decoder.
        index: index of the layer.
        is_sliding: whether it has a sliding window of the model's own: others may be wider (gemma4).
    """
    from hfkv.kernels.selftest.inputs import HeadShape
    from hfkv.models.latents import widths_of
    from hfkv.models.sources import config_of_layer

    own, widths = config_of_layer(config, index), widths_of(config, index)
    num_heads = own.num_attention_heads
    if widths is not None:
        return HeadShape(widths.latent, widths.rotary, num_heads, is_latent=True)
    num_kv_heads = getattr(own, "num_key_value_heads", None)
    groups = num_heads // num_kv_heads if isinstance(num_kv_heads, int) and num_kv_heads else 1
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // num_heads
    head_dim = (None if is_sliding else getattr(own, "global_head_dim", None)) or head_dim
    if getattr(own, "kv_lora_rank", None):
        # Latents that are expanded before they are cached: a rotated and an unrotated part of every key.
        head_dim = own.qk_nope_head_dim + own.qk_rope_head_dim
    return HeadShape(head_dim, getattr(own, "v_head_dim", None) or head_dim, groups)
