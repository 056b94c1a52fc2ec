"""`KVLayer`: the only code that knows transformers' contract for one layer of a cache."""

from __future__ import annotations

import torch

from hfkv.cache.layers.assignment import Assignable, Assignment
from hfkv.cache.layers.base import CacheLayer
from hfkv.cache.layers.contents import Contents
from hfkv.cache.layers.following import Following
from hfkv.cache.layers.rows import Rows
from hfkv.cache.layers.span import Span
from hfkv.cache.snapshot import Captured, HeldTokens, Part, PartShape
from hfkv.cache.step import Group, Step
from hfkv.cache.windows.retain import retain
from hfkv.codecs import Codecs
from hfkv.codecs.key_mean import KeyMean
from hfkv.kernels.dispatch import append_kernel
from hfkv.kernels.encoding import encode
from hfkv.models.rotary import Rotary
from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window
from hfkv.stores import Store
from hfkv.stores.layout import Layout


class KVLayer(Following, Assignable, Rows, CacheLayer):
    """One attention layer's keys and values: a codec, a window and a store, composed.

    Args:
        kv: policies of the layer; `kv.layers` is not looked at.
        sliding: size of the model's own sliding window for this layer, in tokens. The model's masks apply it; the
            layer only lets go of the tokens that they hide. It takes the place of `kv.window`.
        rotary: rotation of this layer's keys by their position, for windows that need to know it.
        mean: mean of this layer's keys, which is taken off where their codec gains by it and `kv` does not say no.
    """

    def __init__(
        self, kv: KVConfig, sliding: int | None = None, rotary: Rotary | None = None, mean: KeyMean | None = None
    ) -> None:
        super().__init__()
        self.kv = kv
        self.codecs = Codecs.named(kv.codec)
        self.rotary = rotary
        self.take_mean(mean)
        self.sliding = sliding
        self.is_sliding = sliding is not None
        self.window: Window | None = Window(sliding, sinks=0) if sliding is not None else kv.window  # type: ignore[assignment]
        self._num_slots = self.window.num_slots if self.window else 0
        self.span = Span(self.window)
        self.group = Group()
        self.reset()

    def reset(self) -> None:
        """Forgets everything: the next key may have another batch size, dtype or device."""
        self.is_initialized = False
        self.span.restart()
        self._store: Store | None = None
        self._parts: dict[Part, PartShape] = {}
        self._batch = 1
        self._reserved = 0
        self._lent: list[torch.Tensor] = []
        self._change()
        self._version = 0
        self._copies = (1, 0)
        self._assignment = Assignment()
        self.is_assigned = False
        self.captured: Captured | None = None
        self._tracked = False  # whether autograd follows some of the states: see hfkv.cache.view

    def __repr__(self) -> str:
        return f"KVLayer({self.kv}{f', sliding={self.sliding}' if self.is_sliding else ''})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes batch, heads, head dims, dtype and device from the first keys and values; makes the planes."""
        self._begin(key_states, value_states)
        if not self._num_slots:
            self._append(key_states[:, :, :0], value_states[:, :, :0])

    def _begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes what is to be known of the first keys and values; without slots, the first tokens make the planes."""
        self.device = keys.device
        self._batch = keys.shape[0]
        count = len(self.codecs.key.plane_names)
        self._parts = {
            "key": PartShape(slice(0, count), keys.shape[1], keys.shape[3], keys.dtype),
            "value": PartShape(slice(count, None), values.shape[1], values.shape[3], values.dtype),
        }
        self._store = self._new_store(self.device)
        if self._num_slots:
            slots = (states.new_zeros(*states.shape[:2], self._num_slots, states.shape[3]) for states in (keys, values))
            self._append(*slots)
        self.is_initialized = True

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> HeldTokens:
        """Appends new keys and values, whatever there is to do, and gives what `update` shows."""
        self._assignment.check_complete()
        if not self.is_initialized:
            self._begin(keys, values)
        keys, values = self._parts["key"].continued(keys), self._parts["value"].continued(values)
        self._check(keys, values)
        if self.captured is not None:
            self.captured.append(keys, values, *self._held().encoded()[:2])
            return self.held()
        self._forget_unseen()
        count = keys.shape[2]
        shown = self.get_mask_sizes(count)[0]
        self._append(keys, values)
        self.span.advance(count)
        # While recording, a sliding layer holds more than the model's masks are made for.
        return self._held(self.store.length - shown) if self.is_sliding else self.held()

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        new = key_states, value_states
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._tracked = True
            new = key_states.detach(), value_states.detach()
        is_innermost = bool(self.store.tokens_innermost)
        kernel = append_kernel(self.codecs.name, key_states.dtype, self.device, self.head_dims, is_innermost).run
        if kernel is None or self.store.is_offloaded or not self.store.planes:
            self.store.append(encode(self.codecs, *new))
            return
        with self.store.lock:
            before = self.store.extend(key_states.shape[2])
            try:
                kernel(*new, *self._held().encoded()[:2], before)
            except BaseException:
                self.store.truncate(before.length)
                raise

    def step(self) -> Layout:
        """Makes room for one token and counts it as seen, for a CUDA graph to write.

        Returns:
            The layout of the tokens before it.
        """
        self._change()
        self._forget_unseen()
        before = self.store.extend(1)
        self.span.advance(1)
        return before

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if key_states.shape[2] != value_states.shape[2]:
            raise ValueError(
                f"keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} are of different lengths"
            )
        self._parts["key"].check("key", key_states, self._batch, self.device)
        self._parts["value"].check("value", value_states, self._batch, self.device)

    @property
    def leaves(self) -> tuple[KVLayer, ...]:
        return (self,)

    def graph_refusal(self) -> str | None:
        if not self.is_initialized:
            return "has seen nothing yet"
        if self.mean is not None:
            return "takes a mean off its keys by their positions, which a graph does not know (key_mean:off)"
        if self.kv.offload:
            return "is offloaded"
        return "records its past for an assistant" if self.record_past else None

    @property
    def batch(self) -> int:
        """The number of rows held."""
        return self._batch

    @property
    def parts(self) -> dict[Part, PartShape]:
        """The planes of the store that are the keys or the values, and what they decode to."""
        return dict(self._parts)

    def held_index(self, position: int) -> int:
        """The index of a position in the store, slots included."""
        return self._num_slots + position - self.span.held_from

    @property
    def head_dims(self) -> tuple[int, int]:
        """The widths Dk and Dv."""
        return self._parts["key"].head_dim, self._parts["value"].head_dim

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys."""
        return self._parts["key"].dtype

    def _held(self, first: int = 0, step: Step | None = None) -> HeldTokens:
        store, span = self.store, self.span
        return HeldTokens(
            store=store,
            codecs=self.codecs,
            parts=self._parts,
            batch=self._batch,
            device=self.device,
            window=None if self.is_sliding else self.window,
            rotary=self.rotary,
            mean=self.mean,
            padding=span.padding,
            first=first,
            last=store.length,
            seen=span.seen,
            gone_below=span.gone_below,
            version=store.version,
            inputs=self.captured.seen if self.captured else None,
            step=step,
        )

    def held(self) -> HeldTokens:
        """The tokens held, slots only where they are filled."""
        held = self._held()
        if held.window is not None and held.slots(held.padding.of(held.batch)).are_empty:
            return self._held(self._num_slots)
        return held

    def get_seq_length(self) -> int:
        return self.span.seen

    def get_max_length(self) -> int:
        return -1 if self.sliding is None else self.sliding

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of the keys a mask is made for; hfkv's windows get masks over all positions."""
        if self.sliding is None:
            return self.span.seen + query_length, 0
        offset = max(self.span.seen - self.sliding + 1, 0)
        return self.span.seen - offset + query_length, offset

    @property
    def record_past(self) -> bool:
        """Whether the tokens of the forwards since the last `crop` can be cropped again; transformers resets it."""
        return self.span.record_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        self._change()
        self.span.record_past = record
        self._bind()

    def activate_past_recording(self) -> None:
        """Starts to record: the tokens of the forwards since the last `crop` can be cropped again."""
        self._change()
        self.span.start_recording()
        self._bind()

    def _forget_unseen(self) -> None:
        gone_below = self.span.next_gone_below(self._batch)
        if gone_below == self.span.gone_below:
            return
        if self._num_slots:
            retain(self._held(), gone_below)
        dropped = self.span.forget_below(gone_below)
        self.store.drop(self._num_slots, self._num_slots + dropped)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises the error that `crop` would. See `Span.after_crop`."""
        self.span.after_crop(int(tokens_to_remove), self._batch)  # 5.17 passes a tensor at times

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest `-tokens_to_remove` tokens; 0 only trims what a recording kept. See `Span.after_crop`."""
        seen, left = self.span.seen, self.span.after_crop(int(tokens_to_remove), self._batch)
        self._change()
        if self.is_initialized and left < seen:
            self.store.truncate(self.store.length - (seen - left))
        self.span.crop(left)
        if self.record_past:
            self._forget_unseen()

    def contents(self) -> Contents | None:
        """Everything that the layer holds, or None before the first key."""
        if self._store is None:
            return None
        pads = self.span.padding.of(self._batch)
        slots, tokens = self.store.read(slice(None), 0, self._num_slots), self.store.read(slice(None), self._num_slots)
        span, mean = self.span, None if self.mean is None else self.mean.vector
        place = span.seen, span.gone_below, pads
        return Contents(self._parts, self.device, slots, tokens, *place, span.padding.origins, mean)

    def adopt(self, contents: Contents) -> None:
        """Replaces everything by `contents`, as if its tokens had been seen here.

        Raises:
            ValueError: planes are not the ones that this layer's codec writes for such keys and values.
        """
        said = self._reserved, self._copies
        self.reset()
        self._reserved, self._copies = said
        self.lazy_initialization(contents.states("key"), contents.states("value"))
        contents.check_planes(self.store.planes, self._num_slots)
        self.store.append(contents.tokens)
        if self._num_slots and contents.slots is not None:
            self.store.write(0, contents.slots)
        self.span.adopt(contents.seen, contents.gone_below, contents.pads)
        self.span.padding.begin(contents.origins or (0,) * len(contents.pads), contents.pads)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return super().nbytes() + sum(plane.allocated for plane in self.extra_memory())

    def held_bytes(self) -> int:
        """Bytes of the tokens held."""
        return super().held_bytes() + sum(plane.held for plane in self.extra_memory())

    def offload(self) -> None:
        """Does nothing: `KVConfig.offload` decides where the bytes live."""

    def prefetch(self) -> None:
        """Does nothing: see `offload`."""
