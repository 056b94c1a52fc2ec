"""What a rule of a window must be: a name, the most it returns, and sizes for every number of tokens seen."""

from __future__ import annotations

import inspect
from typing import TypeGuard

from hfkv.policy.rules.base import EVERYTHING, WindowRule

_STEPS = "steps = ((last tokens seen, size), ..., (EVERYTHING, size))"


def check_rule(rule: WindowRule) -> None:
    """Refuses what is no rule, or contradicts itself; sizes that only a long text would show are checked as it comes.

    Raises:
        TypeError: it is no instance of `WindowRule`, or a field is of the wrong type.
        ValueError: a field is out of range, or its fields differ.
    """
    if inspect.isclass(rule) and issubclass(rule, WindowRule):
        raise TypeError(f"a window's rule must be an instance, got the class {rule.__name__}; write {rule.__name__}()")
    if not isinstance(rule, WindowRule):
        raise TypeError(f"a window's rule must be an instance of a subclass of WindowRule, got {rule!r}")
    where, name, most = type(rule).__name__, getattr(rule, "name", None), getattr(rule, "most", None)
    if not isinstance(name, str):
        raise TypeError(f'{where}.name must be a str, the word for the rule, got {name!r}; say name = "mine"')
    if not name.isidentifier():
        raise ValueError(f"a window's rule cannot be called {name!r}: names are plain words")
    if not _is_count(most):
        raise TypeError(
            f"{where}.most must be an int, the most tokens that size returns, got {most!r}; say most = 4096"
        )
    if most < 1:
        raise ValueError(f"{where}.most must be at least 1 (token), got {most}")
    if rule.steps is not None:
        _check_steps(rule, where)
    elif type(rule).size is WindowRule.size:
        raise TypeError(f"{where} has neither steps nor a size of its own; define size(self, seen), or {_STEPS}")
    for seen in (1, most + 1):
        checked_size(rule, seen)


def checked_size(rule: WindowRule, seen: int) -> int:
    """What the rule says when `seen` tokens have been seen.

    Raises:
        TypeError, ValueError: that is no number of tokens, or more than its `most`.
    """
    size, where = rule.size(seen), f"{type(rule).__name__}.size({seen:,})"
    if not _is_count(size):
        raise TypeError(f"{where} must return an int (tokens), got {size!r}")
    if size < 1:
        raise ValueError(f"{where} must return at least 1 (token), got {size}")
    if min(size, seen) > rule.most:
        raise ValueError(
            f"{where} must return at most {rule.most:,}, what {type(rule).__name__}.most says, got {size:,}; "
            "return less, or say a larger most"
        )
    return size


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_steps(rule: WindowRule, where: str) -> None:
    steps = rule.steps
    if not isinstance(steps, tuple) or not steps:
        raise TypeError(f"{where}.steps must be None or a tuple with a step at least, got {steps!r}; say {_STEPS}")
    first = 1
    for step in steps:
        if not isinstance(step, tuple) or len(step) != 2 or not all(map(_is_count, step)):
            raise TypeError(f"{where}.steps must hold pairs of ints, got {step!r}; say {_STEPS}")
        last, size = step
        if last < first:
            raise ValueError(f"{where}.steps must rise, got {last:,} where at least {first:,} is due; say {_STEPS}")
        if size < 1:
            raise ValueError(f"{where}.steps must give sizes of at least 1 (token), got {size} up to {last:,} seen")
        first = last + 1
    if first <= EVERYTHING:
        raise ValueError(
            f"{where}.steps must say a size for every number of tokens seen, got none above {first - 1:,}; let the "
            f"last step reach EVERYTHING (hfkv.policy.rules): {_STEPS}"
        )
    first = 1
    for last, size in steps:
        for seen in (first, last):
            if checked_size(rule, seen) != size:
                raise ValueError(f"steps and size of the rule {rule.name!r} differ when {seen:,} tokens have been seen")
        first = last + 1
