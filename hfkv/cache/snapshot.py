"""`HeldTokens`: the tokens of a layer at one moment, the snapshot behind its views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch

from hfkv.cache.step import Step
from hfkv.cache.windows.key_positions import placed_mean
from hfkv.cache.windows.slots import Slots
from hfkv.codecs import Codecs, autocast
from hfkv.codecs.key_mean import KeyMean
from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.dispatch import Kernel, attention_kernel
from hfkv.kernels.inputs import Encoded, Visibility
from hfkv.kernels.placed_mean import PlacedMean
from hfkv.models.padding import LeftPadding
from hfkv.models.rotary import Rotary
from hfkv.policy.window import Window
from hfkv.stores import Store
from hfkv.stores.layout import Layout

Part = Literal["key", "value"]


class PartShape(NamedTuple):
    """The planes of a store that are the keys or the values, and what they decode to."""

    planes: slice
    heads: int
    head_dim: int
    dtype: torch.dtype

    def continued(self, states: torch.Tensor) -> torch.Tensor:
        """Casts new `states` to the dtype held where autocast has made them narrower, as `torch.cat` would."""
        if states.dtype == self.dtype or not autocast.is_on():
            return states
        return states.to(self.dtype) if torch.promote_types(states.dtype, self.dtype) == self.dtype else states

    def check(self, part: Part, states: torch.Tensor, batch: int, device: torch.device) -> None:
        """Raises ValueError unless `states` continue what is held for `batch` rows on `device`."""
        if (states.shape[0], states.shape[1], states.shape[3]) != (batch, self.heads, self.head_dim):
            raise ValueError(
                f"this cache holds {part}s of batch {batch}, {self.heads} heads of {self.head_dim}, and was given "
                f"{part}s of shape {tuple(states.shape)}. A cache serves one batch of one model: build a new one, or "
                "call cache.reset(), or cache.batch_select_indices() to change the batch"
            )
        if states.dtype != self.dtype or states.device != device:
            raise ValueError(
                f"this cache holds {part}s of {self.dtype} on {device} and was given {states.dtype} on "
                f"{states.device}; build a new cache or call cache.reset(), or, where torch.autocast was on when it "
                "was filled, go on under the same autocast"
            )


@dataclass(frozen=True, eq=False)
class Captured:
    """Writes and reads of a layer while a CUDA graph runs its step, through tensors that are updated between steps.

    Attributes:
        kernel: function that writes new keys and values; see `append_naive`.
        before, written: layout of the tokens before the new one at the capture, and the same on the device.
        seen: tokens that the newest token's query sees, on the device.
    """

    kernel: Callable[..., None]
    before: Layout
    written: DeviceInputs
    seen: DeviceInputs

    def append(self, keys: torch.Tensor, values: torch.Tensor, *encoded: Encoded) -> None:
        """Encodes one token `[B, H, 1, D]` and writes it to the place that the device names."""
        self.kernel(keys, values, *encoded, self.before, inputs=self.written)


class Tokens(Protocol):
    """The tokens that a view stands for."""

    @property
    def parts(self) -> Mapping[Part, PartShape]: ...
    @property
    def batch(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def seen(self) -> int: ...
    @property
    def padding(self) -> LeftPadding: ...
    @property
    def is_windowed(self) -> bool: ...
    def shape(self, part: Part) -> tuple[int, int, int, int]: ...
    def layout(self, part: Part) -> tuple[tuple[int, ...], int]: ...
    def decode(self, part: Part, first: int = 0, last: int | None = None) -> torch.Tensor: ...


@dataclass(eq=False)  # every layer makes one in every forward: a frozen one would take 2 us more
class HeldTokens:
    """The tokens of one layer that its views show, by reference: nothing is copied or decoded yet."""

    store: Store
    codecs: Codecs
    parts: Mapping[Part, PartShape]
    batch: int
    device: torch.device
    window: Window | None  # ours; None where the model's masks say what is visible
    rotary: Rotary | None  # how keys are rotated by position, where the window needs to know
    padding: LeftPadding  # the layer's own: the attention tells it what the mask says
    first: int  # index among the held tokens of the first one the views show
    last: int
    seen: int  # tokens since the start, padding included
    gone_below: int  # below it no query to come sees a token, slots apart
    version: int  # of the store
    inputs: DeviceInputs | None = None  # what queries see, on the device, while a CUDA graph runs
    step: Step | None = None  # what it is that the layer shares with others of its kind in this forward
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None  # all keys and values shown, as the model has given them
    mean: KeyMean | None = None  # what was taken off the keys before they were encoded

    @property
    def held_from(self) -> int:
        """The oldest position held, slots apart."""
        return self.window.held_from(self.gone_below) if self.window else 0

    @property
    def is_windowed(self) -> bool:
        """Whether a window of ours decides what is visible."""
        return self.window is not None

    @property
    def is_slice(self) -> bool:
        """Whether `decode` returns slices of the store's own planes: free, not contiguous, and changing with them."""
        return self.codecs.is_lossless and self.store.reads_slices

    def is_slice_of(self, part: Part) -> bool:
        """Whether it does so of keys or of values."""
        return self.codecs.of(part).is_lossless and self.store.reads_slices

    @property
    def is_latent(self) -> bool:
        """Whether the keys are latents, which are summed too, and the values are rotary keys (MLA)."""
        return False

    @property
    def out_dim(self) -> int:
        """Width of the attention's output."""
        return self.parts["value"].head_dim

    def joined(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes the states that queries meet and the states that are summed from decoded keys and values."""
        return keys, values

    def kernel(self, query: torch.Tensor) -> Kernel:
        """The kernel that attends to these tokens."""
        head_dims = (self.parts["key"].head_dim, self.parts["value"].head_dim)
        is_innermost = bool(self.store.tokens_innermost)
        asked = self.codecs.name, query.dtype, query.device, query.shape[2], head_dims, is_innermost
        return attention_kernel(*asked, self.mean is not None)

    @property
    def origins(self) -> tuple[int, ...]:
        """The token of each row that stands at position 0 of the rotation of keys."""
        return self.padding.origins or (0,) * self.batch

    @property
    def placed_mean(self) -> PlacedMean | None:
        """The mean of the keys, and where the tokens held stand; None where nothing was taken off them."""
        if self.mean is None:
            return None
        slots = None if self.window is None else self.slots(self.padding.of(self.batch))
        return placed_mean(self.mean, self.seen - self.last, self.origins, slots)

    @property
    def has_odd_slots(self) -> bool:
        """Whether sinks lie in slots at other positions than kernels take their mean to be turned to."""
        if self.mean is None or self.window is None or not self.window.sinks or not self.gone_below:
            return False
        return self.padding.of(self.batch) != self.origins

    def shape(self, part: Part) -> tuple[int, int, int, int]:
        """Shape `[B, H, T, D]` of the keys or values."""
        return self.batch, self.parts[part].heads, self.last - self.first, self.parts[part].head_dim

    def layout(self, part: Part) -> tuple[tuple[int, ...], int]:
        """Strides and storage offset of the tensor that `decode` returns, contiguous where it is made anew."""
        if self.is_slice_of(part):
            decoded = self.decode(part)
            return decoded.stride(), int(decoded.storage_offset())
        _, heads, count, head_dim = self.shape(part)
        return (heads * count * head_dim, count * head_dim, head_dim, 1), 0

    def decode(self, part: Part, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Decodes the shown tokens `first .. last - 1`, all by default, to a plain `[B, H, T, D]`.

        Raises:
            RuntimeError: the store has dropped, reordered or cropped tokens since.
        """
        self._check_version()
        end = self.last if last is None else self.first + last
        planes = self.store.read(self.parts[part].planes, self.first + first, end)
        _, _, head_dim, dtype = self.parts[part]
        mean = self.placed_mean if part == "key" else None
        if mean is None:
            return self.codecs.of(part).decode(planes, head_dim, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        keys = self.codecs.key.decode(planes, head_dim, wide)
        return keys.add_(mean.turned(self.first + first, end)).to(dtype)

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes all keys and values shown, `[B, H, T, Dk]` and `[B, H, T, Dv]`.

        Where the codec of one loses something, both come in float32, each rotated where its codec rotates, and keys
        without their mean. It is for the reader in whose forward they were shown: nothing is checked.
        """
        codecs, step, store = self.codecs, self.step, self.store
        if self.fresh is not None:
            return self.fresh
        if step is None or step.placing is None:
            planes = store.read(slice(None), self.first, self.last)
        elif codecs.is_lossless and store.reads_slices:
            (keys, values), (size, strides, offset, _) = store.planes, step.keys
            return keys.as_strided(size, strides, offset), values.as_strided(*step.values[:3])
        else:
            planes = store.read_placed(step.placing, self.first, self.last)
        if codecs.is_lossless:
            return planes[0], planes[1]
        key, value = self.parts["key"], self.parts["value"]
        keys = codecs.key.decode_rows(planes[key.planes], key.head_dim)
        return keys, codecs.value.decode_rows(planes[value.planes], value.head_dim)

    def encoded(self) -> tuple[Encoded, Encoded, Layout]:
        """The planes of keys and values as they lie, and the layout of all tokens held, not only of those shown.

        Raises:
            RuntimeError: see `decode`.
        """
        self._check_version()
        planes, layout = tuple(self.store.planes), self.store.layout()
        if layout.length != self.last:  # tokens were appended since
            layout = replace(layout, length=self.last)
        return *encoded_parts(self.codecs, self.parts, planes, self.placed_mean), layout

    def runs(self, last: int, visibility: Visibility) -> Iterator[tuple[Encoded, Encoded, Layout, Visibility]]:
        """Yields a kernel's arguments for the tokens up to `last`, in as many runs as they lie in.

        Read each before asking for the next: a store that brings tokens from elsewhere has few buffers.

        Args:
            last: index behind the last token to look at, among all tokens held.
            visibility: tokens that each query sees.

        Raises:
            RuntimeError: see `decode`.
        """
        self._check_version()
        uncut = visibility.num_slots if visibility.first < visibility.num_slots else 0
        mean = self.placed_mean
        if mean is not None and visibility.first >= mean.num_slots:
            mean = replace(mean, slots=None)  # nobody looks at them
        for planes, layout, begin in self.store.runs(last, visibility.first, uncut):
            parts = encoded_parts(self.codecs, self.parts, planes, None if mean is None else mean.of(begin))
            yield *parts, layout, visibility.of(begin, begin + layout.length)

    def _check_version(self) -> None:
        if self.version != self.store.version:
            raise RuntimeError("these keys or values are stale: the cache has dropped, reordered or cropped since")

    def hides_tokens(self, pads: tuple[int, ...]) -> bool:
        """Whether the window has moved, so that the newest query of some row no longer sees all of its text.

        After rows have gone, tokens may be missing that were only padding to the rows that are left.
        """
        if self.window is None:
            return False
        return self.gone_below > 0 or any(self.window.lower_bound(self.seen - 1 - pad) for pad in set(pads))

    def slots(self, pads: tuple[int, ...]) -> Slots:
        """The slots before the newest tokens.

        Args:
            pads: number of pad tokens of each row.
        """
        assert self.window is not None
        return Slots(self.window, pads, self.gone_below)


def encoded_parts(
    codecs: Codecs,
    parts: Mapping[Part, PartShape],
    planes: tuple[torch.Tensor, ...],
    mean: PlacedMean | None = None,
) -> tuple[Encoded, Encoded]:
    """The keys and the values among the planes of a layer, as kernels take them."""
    key, value = parts["key"], parts["value"]
    keys = Encoded(codecs.key, planes[key.planes], key.head_dim, mean)
    return keys, Encoded(codecs.value, planes[value.planes], value.head_dim)
