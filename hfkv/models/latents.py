"""Latents: the configs whose layers cache them, and their widths."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

from hfkv.models.sources import config_of_layer, modelling_files

# What makes keys and values of latents in the attention of transformers; of that name everywhere.
METHOD = "expand_kv"


class Widths(NamedTuple):
    """The widths of a layer with latent attention.

    Attributes:
        latent: r, the width of what is cached for keys and values together.
        nope: dn, the width of the part of a head's key that comes from the latent.
        rotary: dr, the width of the part that carries the position, the same for all heads.
        value: dv, the width of a head's value.
    """

    latent: int
    nope: int
    rotary: int
    value: int

    @classmethod
    def of(cls, module: Any) -> Widths:
        """The widths of an attention module of transformers."""
        return cls(module.kv_lora_rank, module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim)


def expands_latents(config: Any) -> bool:
    """Whether the installed code for a config expands latents by a method of its attention."""
    config_class: Any = type(config)
    return bool(_attention_classes(config_class))


def widths_of(config: Any, index: int) -> Widths | None:
    """The widths of what a plain or indexed attention layer caches, or None where that is no latent.

    The config alone does not tell: in some versions of transformers some families with a ``kv_lora_rank`` cache keys
    and values a head, expanded already.

    Args:
        config: the text decoder's config.
        index: the layer's index.
    """
    config_class: Any = type(config)
    own = config_of_layer(config, index)
    if getattr(own, "kv_lora_rank", None) is None or not _caches_latents(config_class):
        return None
    return Widths.of(own)


@functools.cache
def _caches_latents(config_class: Any) -> bool:
    found = _attention_classes(config_class)
    return bool(found) and all(map(expands_what_was_cached, found))


@functools.cache
def _attention_classes(config_class: Any) -> tuple[Any, ...]:
    """The classes that expand latents, in the modelling file of a config."""
    values = [value for module in modelling_files(config_class) for value in vars(module).values()]
    return tuple(dict.fromkeys(value for value in values if inspect.isclass(value) and hasattr(value, METHOD)))


@functools.cache
def expands_what_was_cached(attention_class: Any) -> bool:
    """Whether a class expands what the cache returned, not what it then caches (5.17's indexed layers)."""
    for base in attention_class.__mro__:
        try:
            source = inspect.getsource(inspect.unwrap(vars(base)["forward"]))
        except (KeyError, OSError, TypeError):  # it has none, or none that is written down
            continue
        if f".{METHOD}(" in source:
            return 0 <= source.find(".update(") < source.find(f".{METHOD}(")
    return True  # what it is given by the cache is looked at anyway
