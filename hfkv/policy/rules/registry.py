"""The rules by name: the one place where windows and words look them up."""

from __future__ import annotations

from hfkv.policy.naming import is_redefined
from hfkv.policy.rules.base import WindowRule
from hfkv.policy.rules.checks import check_rule

RULES: dict[str, WindowRule] = {}


def register_rule(rule: WindowRule) -> None:
    """Makes a rule known under its name, in windows (``Window(schedule="mine")``) and words (``"window:mine"``).

    A rule of the same class, or of its class defined anew (a notebook's cell run twice), takes its place.

    Raises:
        TypeError: it is no instance of `WindowRule`, or a field of it is of the wrong type.
        ValueError: its name is no plain word, or another rule's; it says no size for some numbers of tokens, or more
            than its `most`; or its steps do not say what its size does.
    """
    check_rule(rule)
    known = RULES.get(rule.name)
    if known is not None and not is_redefined(known, rule):
        raise ValueError(f"there is a rule {rule.name!r} already ({type(known).__name__}); give yours another name")
    RULES[rule.name] = rule
