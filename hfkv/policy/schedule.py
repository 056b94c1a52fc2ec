"""`Schedule`: the keys that a query can no longer see, however the size of its window changes; integers only."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from functools import partial

from hfkv.policy.rules import EVERYTHING, RULES
from hfkv.policy.rules.checks import checked_size


class Schedule:
    """The lower bound ``L(t) = max over t' <= t of (t' + 1 - size(t' + 1))``: below it keys are gone for good.

    Args:
        size: the most tokens a query sees; None only under a named rule.
        sizes: a rule's name, a callable from tokens seen to size, or None for `size` alone.
    """

    def __init__(self, size: int | None, sizes: str | Callable[[int], int] | None) -> None:
        rule = RULES[sizes] if isinstance(sizes, str) else None
        steps: tuple[tuple[int, int], ...] = ((EVERYTHING, EVERYTHING if size is None else size),)
        self._callable = sizes if callable(sizes) else None
        if rule is not None and rule.steps is not None:
            steps = rule.steps
        elif rule is not None:
            self._callable = partial(checked_size, rule)
            size = rule.most if size is None else min(size, rule.most)
        self._cap = EVERYTHING if size is None else size
        firsts = (1, *(last + 1 for last, _ in steps))
        self._steps = tuple(
            (first, last, min(size, self._cap)) for first, (last, size) in zip(firsts, steps, strict=False)
        )
        self._bounds = array("q")  # of a callable, as far as it has been asked
        self._asking = threading.Lock()  # one window serves all caches of a model

    def lower_bound(self, t: int) -> int:
        """L(t), at least 0; 0 for positions before the text."""
        if t < 0:
            return 0
        if self._callable is not None:
            if t >= len(self._bounds):
                with self._asking:
                    self._ask(t)
            return self._bounds[t]
        seen = t + 1
        return max(0, *(min(seen, last) - size for first, last, size in self._steps if first <= seen))

    @property
    def steps(self) -> tuple[tuple[int, int, int], ...] | None:
        """The sizes as (first number of tokens seen, last, size); None where a callable says them."""
        return None if self._callable else self._steps

    def capacity(self) -> int:
        """The most tokens between L(t) and t, both included, at any t."""
        if self._callable is not None:
            return self._cap
        return max(min(last, size) for _, last, size in self._steps)

    def _ask(self, t: int) -> None:
        assert self._callable is not None
        bound = self._bounds[-1] if self._bounds else 0
        for seen in range(len(self._bounds) + 1, t + 2):
            size = self._callable(seen)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"Window.schedule({seen}) must return an int of at least 1 (tokens), got {size!r}")
            bound = max(bound, seen - min(size, self._cap))
            self._bounds.append(bound)
