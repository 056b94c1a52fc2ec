"""The rules by name: the one place where windows and words look them up."""

from __future__ import annotations

from hfkv.policy.rules.base import WindowRule

RULES: dict[str, WindowRule] = {}


def register_rule(rule: WindowRule) -> None:
    """Makes a rule known under its name, in windows (``Window(schedule="mine")``) and words (``"window:mine"``).

    Raises:
        ValueError: its name is no plain word, or another rule's; or its steps do not say what its size does.
    """
    known = RULES.get(rule.name)
    if not rule.name.isidentifier():
        raise ValueError(f"a window's rule cannot be called {rule.name!r}: names are plain words")
    if known is not None and type(known) is not type(rule):
        raise ValueError(f"there is a rule {rule.name!r} already ({type(known).__name__}); give yours another name")
    steps = rule.steps or ()
    for first, (last, size) in zip((1, *(last + 1 for last, _ in steps)), steps, strict=False):
        wrong = next((seen for seen in (first, last) if rule.size(seen) != size), None)
        if wrong is not None:
            raise ValueError(f"steps and size of the rule {rule.name!r} differ when {wrong:,} tokens have been seen")
    RULES[rule.name] = rule
