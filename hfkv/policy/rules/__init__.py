"""Rules of a window by name: how many of the newest tokens a query sees."""

from hfkv.policy.rules.base import EVERYTHING, WindowRule
from hfkv.policy.rules.dynamic import Dynamic
from hfkv.policy.rules.registry import RULES, register_rule

__all__ = ["EVERYTHING", "RULES", "Dynamic", "WindowRule", "register_rule"]

register_rule(Dynamic())
