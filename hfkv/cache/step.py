"""`Step`: what the layers of a group do alike in one forward, worked out once; `Group`: the layers that share it."""

from __future__ import annotations

from typing import Any

import torch

from hfkv.stores import Changes
from hfkv.stores.base import Placing

# Stands for the step before where there was none: no layer has followed it.
_NOTHING = object()


class Step:
    """What follows, for every layer that stands where one layer stood, from the same number of new tokens.

    A layer makes it from its state: how many tokens it has seen and let go of, where they lie, and the shape of the new
    ones. Layers of the same kind in the same state do the same; they compare the state, and work nothing out.

    Attributes:
        state: the state that it starts from.
        placing: where the new tokens go in the store, and which ones go; None where the layer has to work that out by
            itself (a buffer is full, sinks are to be copied into their slots).
        seen, gone_below, recorded_to: the layer's tokens afterwards; see `Span`.
        first, last: the tokens shown afterwards, as indices among those held.
        keys, values: `hfkv.cache.view.ViewShape`s of what is shown; None as long as nobody knows.
        parts: of layers that began with this step, what their planes are; None where they had begun, or each begins by
            itself.
        is_short: whether decoding all that is shown, and one call of scaled_dot_product_attention, is the fastest way
            for one query.
        writing: the kernel that encodes and writes the new tokens (None for those that are only copied), its inputs on
            the device, and its `hfkv.kernels.backend.StepCall` or None; None where torch does all.
        rule: the mask that a forward has given, and what it means for the tokens shown; see `hfkv.attention.rule`.
        before: the step that the layer had done last, if nothing else had happened to it since. Others that have done
            the same have only to look whether `held` tokens, `pads`, shapes and `dtype` are theirs too.
    """

    __slots__ = (
        *("before", "dtype", "first", "gone_below", "held", "is_short", "key_shape", "keys", "last", "pads", "parts"),
        *("placing", "recorded_to", "rule", "seen", "state", "value_shape", "values", "writing"),
    )

    def __init__(
        self,
        state: Any,
        placing: Placing | None,
        seen: int = 0,
        gone_below: int = 0,
        first: int = 0,
        last: int = 0,
        keys: Any = None,
        values: Any = None,
        is_short: bool = False,
    ) -> None:
        self.state, self.seen, self.gone_below = state, seen, gone_below
        self.placing: Any = placing
        self.first, self.last, self.is_short = first, last, is_short
        self.keys, self.values = keys, values
        self.recorded_to: int | None = None
        self.rule: Any = None
        self.writing: Any = None
        self.parts: dict[Any, Any] | None = None
        self.before: object = _NOTHING
        self.held, self.dtype = -1, torch.float32
        self.pads: tuple[int, ...] | None = None
        self.key_shape: torch.Size | None = None
        self.value_shape: torch.Size | None = None

    def comes_after(self, step: Step) -> None:
        """Names the step before, which forgets its own: steps would hold on to all that ever were."""
        self.before, step.before = step, _NOTHING


class Group:
    """Layers of one kind, which do the same in every forward as long as they are in the same state.

    A layer that is in another state than the one before it works out a step of its own, and nothing is wrong; so
    layers that are skipped, called twice or driven one by one need no care.

    Attributes:
        step: the step that was worked out last.
        shown: the views that the last layer to follow it was given, and the tokens behind them; see
            `hfkv.cache.view.same_views`.
        turns: the means of their keys, turned to where new ones stand: a `hfkv.cache.turns.Turns` for each kind.
        changes: what the stores of the layers have done last; they hold the same block table.
    """

    __slots__ = ("changes", "shown", "step", "turns")

    def __init__(self) -> None:
        self.step: Step | None = None
        self.changes = Changes()
        self.shown: Any = None
        self.turns: dict[Any, Any] = {}

    def __reduce__(self) -> Any:
        return Group, ()  # what is worked out in a forward is not kept


class Member:
    """A layer of a group.

    Attributes:
        group: the layers of its kind in one cache.
        followed: the step that was done last; None where something else has happened since.
    """

    group: Group
    followed: Step | None

    def _leave_step(self) -> None:
        """Says that something else happens than what the group does; views that wait for the next layer go."""
        self.followed = None
        self.group.shown = None

    def _change(self) -> None:
        """Says that tokens or rows go, come back or change: no step says any more what follows.

        A layer may come to a state where it has been; but a mask that was read then may have been filled anew since.
        """
        self._leave_step()
        self.group.step = None
