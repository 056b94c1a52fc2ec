"""Rules of a window by name: how many of the newest tokens a query sees."""

from hfkv.policy.rules.base import WindowRule
from hfkv.policy.rules.dynamic import Dynamic
from hfkv.policy.rules.registry import RULES, register_rule

__all__ = ["RULES", "Dynamic", "WindowRule", "register_rule"]

register_rule(Dynamic())
