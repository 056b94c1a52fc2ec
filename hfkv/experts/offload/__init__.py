"""Experts that live in host memory or in a file, a few of them where they are computed."""

from hfkv.experts.offload.eviction import Eviction
from hfkv.experts.offload.trace import ExpertTrace, compare, replay

__all__ = ["Eviction", "ExpertTrace", "compare", "replay"]
