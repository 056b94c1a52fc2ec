"""`Following`: the part of a layer that does what a `Step` of its group says."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from hfkv.cache.layers.assignment import Assignment
from hfkv.cache.layers.centring import Centred
from hfkv.cache.layers.span import Span
from hfkv.cache.layers.storage import Storage
from hfkv.cache.snapshot import Captured, HeldTokens, Part, PartShape, encoded_parts
from hfkv.cache.step import Member, Step
from hfkv.cache.view import ViewShape, make_views, same_views, step_views
from hfkv.cache.windows.slots import Slots
from hfkv.kernels.backend import Kernel
from hfkv.kernels.device_inputs import device_inputs
from hfkv.kernels.dispatch import append_kernel, attention_kernel
from hfkv.models.rotary import Rotary
from hfkv.stores.base import Placing


class Following(Centred, Member, Storage):
    """Appends as the layers of its group do, where nothing but writing is left to do."""

    sliding: int | None
    span: Span
    device: torch.device
    captured: Captured | None
    rotary: Rotary | None
    _parts: dict[Part, PartShape]
    _assignment: Assignment
    _batch: int
    _tracked: bool
    is_initialized: bool
    _version: int

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "followed": None}  # what is worked out in a forward is not kept

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new keys `[B, H, T, Dk]` and values `[B, H, T, Dv]`; returns views of all that is held.

        Raises:
            ValueError: their shape, dtype or device does not continue the tokens held.
        """
        if self.mean is not None:
            key_states = self._less_mean(key_states)
        store, step = self._store, self.group.step
        if store is not None and store.is_paged and store.has_shared_end:
            with store.lock:  # others take free pages, and release those that are listed here, too
                return self._follow(self._work_out(key_states, value_states), key_states, value_states)
        if (
            step is None
            # What the others of the group have done is what this one has done, and nothing else has happened to it.
            or step.before is not self.followed
            or store is None
            or store.version != self._version
            or store.length != step.held
            or self.span.padding.known != step.pads
            or key_states.shape != step.key_shape
            or value_states.shape != step.value_shape
            or key_states.dtype != step.dtype
            or value_states.dtype != step.dtype
            or key_states.device != self.device
            or torch.is_grad_enabled()
        ):
            step = self._work_out(key_states, value_states)
        return self._follow(step, key_states, value_states)

    def _follow(
        self, step: Step | None, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Does what a step says, or appends without one."""
        if step is None or step.placing is None:
            return self._by_itself(step, key_states, value_states)
        placing = step.placing
        store, codecs, span = self._store, self.codecs, self.span
        assert store is not None
        if step.writing is not None:
            self._write(step, key_states, value_states)
        elif codecs.is_lossless:
            store.put(placing, (key_states, value_states))
        else:
            store.put(placing, codecs.encode_both(key_states, value_states))
        span.seen, span.gone_below, span.recorded_to = step.seen, step.gone_below, step.recorded_to
        self.followed, self._version = step, store.version
        return self._views(step)

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> HeldTokens:
        """Appends new keys and values, whatever there is to do, and gives what `update` shows."""

    @abstractmethod
    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Encodes new tokens and writes them behind those held, whose like they are."""

    @abstractmethod
    def _held(self, first: int = 0, step: Step | None = None) -> HeldTokens:
        """The tokens held from index `first` on, as a step shows them."""

    @abstractmethod
    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Raises ValueError unless new tokens are like those held."""

    def _work_out(self, keys: torch.Tensor, values: torch.Tensor) -> Step | None:
        """The step of the group if this layer is in its state, or one of its own; None where it is in none."""
        store, span, group = self._store, self.span, self.group
        if self.captured is not None or self._assignment.waiting or self._tracked:
            return None
        pads = span.padding.known
        state = (
            *(span.seen, span.gone_below, span.record_past, span.recorded_to, pads),
            *(None if store is None else store.extent,),
            *(keys.shape, values.shape, keys.dtype, values.dtype, keys.device),
            *(keys.requires_grad or values.requires_grad, *self._like),
        )
        step = group.step
        if step is None or step.state != state:
            step = group.step = self._next_step(state, keys, values)
            # A page that others list too may be another thread's in one layer, and no more in the next.
            is_plain = step.placing is None or not step.placing.copies
            if self.followed is not None and store is not None and keys.dtype == values.dtype and is_plain:
                step.comes_after(self.followed)
                step.held, step.pads, step.dtype = store.length, pads, keys.dtype
                step.key_shape, step.value_shape = keys.shape, values.shape
        return step

    @property
    def _like(self) -> tuple[Any, ...]:
        """What new tokens have to be like."""
        store, parts = self._store, self._parts
        return () if store is None else (self._batch, self.device, parts["key"], parts["value"], store.tokens_innermost)

    def _by_itself(
        self, step: Step | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends without the group; attention is the same whichever way tokens have come."""
        self._leave_step()
        is_blank = self._store is None
        is_empty = is_blank or not self.store.length
        if step is not None and step.parts is not None:
            self._begin_as(step, keys, values)
            held = self._held()
        else:
            held = self.append(keys, values)
        if step is None or self._tracked:
            return make_views(held, self._tracked)
        if is_empty and self.codecs.is_lossless and not held.is_slice:
            held.fresh = keys, values
        if step.keys is None:
            step.parts = self._parts if is_blank and not self._num_slots else None
            step.seen, step.is_short = held.seen, self._is_short(held.last - held.first, keys.shape[2])
            step.keys, step.values = ViewShape.of(held, "key"), ViewShape.of(held, "value")
        held.step = step
        return step_views(held, step)

    def _views(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """What is shown after a step."""
        views = same_views(self.group, step, self.store, self.span.padding, self.rotary, self.mean)
        if views is None:
            views = step_views(self._held(step.first, step), step)
            self.group.shown = *views, views[0].held
        return views

    def _begin_as(self, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes the first tokens as another layer of the group has taken its own, which has looked at all there is."""
        assert step.parts is not None
        self.device, self._batch, self._parts = keys.device, keys.shape[0], step.parts
        self._store = self._new_store(self.device)
        self.is_initialized = True
        self._append(keys, values)
        self.span.advance(keys.shape[2])

    def _write(self, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Has a kernel write new tokens to the places that the device knows already."""
        store, (kernel, inputs, of_step) = self._store, step.writing
        assert store is not None
        placing = step.placing
        with store.lock:
            planes = store.planes  # another store may make shared ones larger
            is_alike = of_step is not None and of_step.takes(keys, values, planes)
            if kernel is None and not is_alike:
                return store.put(placing, self.codecs.encode_both(keys, values))
            store.put(placing, None)
            try:
                if is_alike:
                    of_step.run(keys, values, planes)
                else:
                    store.shift(placing)
                    encoded = encoded_parts(self.codecs, self._parts, tuple(planes))
                    kernel(keys, values, *encoded, placing.before, inputs=inputs)
            except BaseException:
                store.truncate(placing.before.length)
                self.span.gone_below = step.gone_below
                self._change()
                raise

    def _next_step(self, state: object, keys: torch.Tensor, values: torch.Tensor) -> Step:
        """Works out the step from the present state."""
        store, span, count = self._store, self.span, keys.shape[2]
        if store is None or keys.requires_grad or values.requires_grad or not self._continues(keys, values):
            return Step(state, None)
        batch = keys.shape[0]
        gone_below, drops = span.next_gone_below(batch), 0
        if gone_below != span.gone_below and self.window is not None:
            before = Slots(self.window, span.padding.of(batch), span.gone_below)
            if self._num_slots and not before.stays(gone_below):
                return Step(state, None)
            drops = self.window.held_from(gone_below) - span.held_from
        placing = store.placing(count, self._num_slots, self._num_slots + drops)
        if placing is None:
            return Step(state, None)
        last = store.length - drops + count
        first = 0
        if self.sliding is not None:
            first = last - min(span.seen, self.sliding - 1) - count
        elif self.window is not None and Slots(self.window, span.padding.of(batch), gone_below).are_empty:
            first = self._num_slots
        shapes = self._shape("key", keys, placing, first, last), self._shape("value", values, placing, first, last)
        is_short = self._is_short(last - first, count)
        step = Step(state, placing, span.seen + count, gone_below, first, last, *shapes, is_short)
        step.recorded_to = step.seen if span.record_past and span.recorded_to is None else span.recorded_to
        key, value = self._parts["key"], self._parts["value"]
        head_dims, is_innermost = (key.head_dim, value.head_dim), bool(store.tokens_innermost)
        kernel = append_kernel(self.codecs.name, keys.dtype, keys.device, head_dims, is_innermost)
        # Plain tokens are only copied; but where others move before, one call does both.
        if kernel.run is not None or (kernel.of_step is not None and placing.front):
            step.writing = self._writing(kernel, placing, keys, values)
        return step

    def _writing(self, kernel: Kernel, placing: Placing, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """The kernel that writes new tokens, its inputs on the device, and what the layers of a step have alike."""
        assert self._store is not None
        inputs = device_inputs(placing.before.end, None, self.device) if kernel.reads_device_lengths else None
        of_step = None
        if kernel.of_step is not None and not torch.compiler.is_compiling():
            encoded = encoded_parts(self.codecs, self._parts, tuple(self._store.planes))
            moved = placing.front, placing.gap
            of_step = kernel.of_step(keys, values, *encoded, placing.before, inputs=inputs, moved=moved)
        return kernel.run, inputs, of_step

    def _is_short(self, tokens: int, queries: int) -> bool:
        """Whether so many tokens are decoded, and no kernel called, for so many queries a row."""
        key, value = self._parts["key"], self._parts["value"]
        if key.dtype != value.dtype:
            return False
        head_dims, is_innermost = (key.head_dim, value.head_dim), bool(self._store and self._store.tokens_innermost)
        asked = self.codecs.name, key.dtype, self.device, queries, head_dims, is_innermost
        kernel = attention_kernel(*asked, self.mean is not None)
        numbers = key.heads * key.head_dim + value.heads * value.head_dim
        worth_from = kernel.worth_from
        if self._store is not None and self._store.is_paged and kernel.worth_from_in_pages is not None:
            worth_from = kernel.worth_from_in_pages
        return self._batch * numbers * tokens < worth_from

    def _continues(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether there are new tokens, like those held."""
        try:
            self._check(keys, values)
        except ValueError:
            return False
        return keys.shape[2] > 0

    def _shape(self, part: Part, new: torch.Tensor, placing: Placing, first: int, last: int) -> ViewShape:
        """The shape of what is shown of one part; `new` tokens `[B, H, T, D]` are the newest of them."""
        assert self._store is not None
        batch, heads, _, head_dim = new.shape
        size = batch, heads, last - first, head_dim
        if self.codecs.of(part).is_lossless and self._store.reads_slices:
            strides = self._store.planes[self._parts[part].planes][0].stride()
            return ViewShape(size, strides, (placing.start + first) * strides[2], new.dtype)
        return ViewShape(size, (heads * size[2] * head_dim, size[2] * head_dim, head_dim, 1), 0, new.dtype)
