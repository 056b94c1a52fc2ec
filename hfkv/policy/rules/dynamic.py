"""The rule ``"dynamic"``: all of a short text, a window over a long one."""

from __future__ import annotations

from hfkv.policy.rules.base import EVERYTHING, WindowRule


class Dynamic(WindowRule):
    """Everything below 1,024 tokens seen, 2,048 tokens below 8,192, then 4,096."""

    name = "dynamic"
    most = 4096
    steps = ((1023, EVERYTHING), (8191, 2048), (EVERYTHING, 4096))
