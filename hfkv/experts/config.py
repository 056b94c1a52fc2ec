"""`MoEConfig`: how a model's experts are kept, as a frozen value and as a string."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfkv.experts.offload.eviction import EVICTIONS, Eviction, check_eviction, eviction_name
from hfkv.policy.units import read_bytes, say_bytes

CODECS = ("none", "int8", "int4")


@dataclass(frozen=True)
class MoEConfig:
    """How the weights of a model's experts are written, and where they live.

    Args:
        codec: ``"none"`` (the model's own numbers; on a CPU in oneDNN's order, which is read faster), ``"int8"`` or
            ``"int4"``.
        offload: keep all experts in host memory, or in a file, and the last used ones in slots where they are computed.
        device_budget: with ``offload``, the most bytes of slots of all layers together: a number, or ``"8GiB"``. None
            is as many slots a layer as one token chooses.
        eviction: with ``offload``, which expert leaves a full layer's slots: ``"lru"``, ``"lfu"`` or ``"fifo"``, or a
            subclass of `Eviction` of one's own, of which every layer gets an object.
        path: with ``offload``, a folder of files that the experts are read from, mapped into memory; they are written
            where they are not there yet. None is host memory. The string form leaves it out.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
    """

    codec: str = "none"
    offload: bool = False
    device_budget: int | str | None = None
    eviction: str | Callable[[], Eviction] = "lru"
    path: str | None = None

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"MoEConfig.codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        check_eviction("MoEConfig.eviction", self.eviction)
        if not isinstance(self.offload, bool):
            raise TypeError(f"MoEConfig.offload must be True or False, got {self.offload!r}")
        if self.device_budget is not None:
            object.__setattr__(self, "device_budget", read_bytes("MoEConfig.device_budget", self.device_budget))
        if self.path is not None:
            if not isinstance(self.path, str | os.PathLike):
                raise TypeError(f"MoEConfig.path must be a folder or None, got {self.path!r}")
            object.__setattr__(self, "path", os.fspath(self.path))
        for name, default in (("device_budget", None), ("eviction", "lru"), ("path", None)):
            if not self.offload and getattr(self, name) != default:
                raise ValueError(f"MoEConfig.{name} needs offload=True: without it every expert is on the device")

    @classmethod
    def parse(cls, text: str) -> MoEConfig:
        """Reads ``"auto"``, ``"int8"``, ``"int4+offload"``, ``"offload+device_budget:8GiB+eviction:lfu"``.

        Args:
            text: words joined by ``+``, each at most once: ``auto`` or ``none`` (the model's own numbers), ``int8``,
                ``int4``, ``offload``, ``device_budget:SIZE``, ``eviction:POLICY``.

        Raises:
            ValueError: naming the word and what is allowed.
        """
        given: dict[str, Any] = {}
        for word in text.strip().split("+"):
            name, value = _read_word(word.strip(), text)
            if name in given:
                raise ValueError(f"{text!r} gives {name} twice")
            given[name] = value
        return cls(**given)

    @classmethod
    def of(cls, moe: MoEConfig | str) -> MoEConfig:
        """A config from what callers give: a `MoEConfig` or its string form."""
        if isinstance(moe, MoEConfig):
            return moe
        if isinstance(moe, str):
            return cls.parse(moe)
        raise TypeError(
            f'moe must be an hfkv.MoEConfig, a string such as "auto" or "int8+offload", or None, got {moe!r}'
        )

    def __str__(self) -> str:
        words = ["auto" if self.codec == "none" else self.codec]
        words += ["offload"] if self.offload else []
        words += [f"device_budget:{say_bytes(int(self.device_budget))}"] if self.device_budget is not None else []
        words += [f"eviction:{eviction_name(self.eviction)}"] if self.eviction != "lru" else []
        return "+".join(words)


_WORDS = ("auto", *CODECS, "offload", "device_budget:SIZE", f"eviction:{'|'.join(EVICTIONS)}")


def _read_word(word: str, text: str) -> tuple[str, Any]:
    name, colon, value = word.partition(":")
    if colon and name in ("device_budget", "eviction"):
        return name, value
    if not colon and word == "offload":
        return "offload", True
    if not colon and word in ("auto", *CODECS):
        return "codec", "none" if word == "auto" else word
    raise ValueError(f"{text!r}: unknown word {word!r}; allowed: {', '.join(_WORDS)}")
