"""`Assignable`: a layer's keys and values as tensors that are read and assigned, one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hfkv.cache.layers.centring import Centred
from hfkv.cache.layers.storage import Storage
from hfkv.cache.read_only import Snapshot
from hfkv.cache.snapshot import HeldTokens, Part


class Assignment:
    """Keeps one half until the other comes; encoder-decoders assign ``layer.keys`` and then ``layer.values``."""

    def __init__(self) -> None:
        self.waiting: dict[Part, torch.Tensor] = {}

    def take(
        self, part: Part, states: torch.Tensor, held: HeldTokens | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Takes one half; returns the keys and values to hold once both are there, or `held` has a fitting other half.

        Args:
            part: the half that is given.
            states: keys or values `[B, H, T, D]`.
            held: tokens that the layer shows so far, or None.

        Raises:
            ValueError: the halves differ in batch or tokens, or the positions of the tokens are unknown.
        """
        self.waiting[part] = states
        other: Part = "value" if part == "key" else "key"
        count = None if held is None else held.last - held.first
        if held is not None and other not in self.waiting and (states.shape[0], states.shape[2]) == (held.batch, count):
            self.waiting[other] = held.decode(other)
        if other not in self.waiting:
            return None
        keys, values = self.waiting.pop("key"), self.waiting.pop("value")
        if (keys.shape[0], keys.shape[2]) != (values.shape[0], values.shape[2]):
            raise ValueError(
                f"the keys {tuple(keys.shape)} and values {tuple(values.shape)} assigned to this layer differ in batch "
                "or tokens"
            )
        if held is not None and held.gone_below and keys.shape[2] != count:
            raise ValueError(
                f"this layer holds {count} of {held.seen} tokens seen and was assigned {keys.shape[2]}: their "
                "positions are unknown. Assign as many as it holds, or call reset() first"
            )
        return keys, values

    def check_complete(self) -> None:
        """Raises RuntimeError where only one half has been assigned."""
        if self.waiting:
            raise RuntimeError(f"{next(iter(self.waiting))}s were assigned to this layer without the other half")


class Assignable(Centred, Storage, ABC):
    """The ``keys`` and ``values`` of a layer, decoded when they are read.

    Attributes:
        is_assigned: whether the tokens held were assigned, not computed here.
    """

    _assignment: Assignment
    _num_slots: int
    is_initialized: bool
    is_assigned = False

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes what is to be known of the first keys and values."""

    @abstractmethod
    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Encodes new tokens and writes them behind those held, whose like they are."""

    @abstractmethod
    def held(self) -> HeldTokens:
        """The tokens held."""

    def _refill(self, keys: torch.Tensor, values: torch.Tensor, shown: HeldTokens | None) -> None:
        """Replaces the tokens `shown` by `keys` and `values`, with the same positions."""
        seen, gone_below = (self.span.seen, self.span.gone_below) if self.span.gone_below else (keys.shape[2], 0)
        pads, origins = self.span.padding.of(keys.shape[0]), self.span.padding.origins
        if self.mean is not None:
            keys = self._assigned_less_mean(keys, shown)
        self.reset()
        self.lazy_initialization(keys, values)
        if shown is not None and shown.first < self._num_slots:
            self.store.truncate(0)  # the slots are among them
        self._append(keys, values)
        self.span.advance(seen)
        self.span.gone_below = gone_below
        if len(pads) == keys.shape[0]:
            self.span.padding.learn(pads, 0)
            self.span.padding.origins = origins

    def _whole(self, part: Part) -> torch.Tensor | None:
        if part in self._assignment.waiting:
            return self._assignment.waiting[part]
        if not self.is_initialized:
            return None
        held = self.held()
        # What the caller keeps must not change with the cache, nor be edited in the belief that the cache changes too.
        states = held.decode(part)
        return Snapshot(
            states.clone(memory_format=torch.contiguous_format) if held.is_slice_of(part) else states.contiguous()
        )

    def _assign(self, part: Part, states: torch.Tensor | None) -> None:
        """Replaces the tokens held once both parts have been assigned (or one, of the same length and batch)."""
        if states is None:
            return
        self._change()
        held = self.held() if self.is_initialized else None
        both = self._assignment.take(part, states, held)
        if both is not None:
            self._refill(*both, held)
            self.is_assigned = True

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys held, decoded, read-only; assigning replaces them. None before the first update."""
        return self._whole("key")

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._assign("key", states)

    @property
    def values(self) -> torch.Tensor | None:
        """All values held, decoded, read-only; assigning replaces them. None before the first update."""
        return self._whole("value")

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._assign("value", states)
