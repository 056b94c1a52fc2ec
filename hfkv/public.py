"""The names of ``hfkv.*``, each imported from where it is made."""

from hfkv import tiny_lm
from hfkv.cache import KVCache
from hfkv.config import KVConfig
from hfkv.errors import CacheMemoryError
from hfkv.experts.config import MoEConfig
from hfkv.experts.report import MoEReport
from hfkv.memory import CacheMemory
from hfkv.moe.layer import SparseMoE
from hfkv.moe.losses import load_balancing_loss, moe_losses
from hfkv.moe.stats import routing_stats
from hfkv.monitor import MemoryMonitor
from hfkv.named import OffloadedCache, PagedCache, QuantizedCache, SlidingWindowCache
from hfkv.patches import Patch, patch, unpatch
from hfkv.patches.upcycle import upcycle
from hfkv.planning.plan import MemoryPlan, memory_plan
from hfkv.reuse import Reuse
from hfkv.window import Window

__all__ = [
    "CacheMemory",
    "CacheMemoryError",
    "KVCache",
    "KVConfig",
    "MemoryMonitor",
    "MemoryPlan",
    "MoEConfig",
    "MoEReport",
    "OffloadedCache",
    "PagedCache",
    "Patch",
    "QuantizedCache",
    "Reuse",
    "SlidingWindowCache",
    "SparseMoE",
    "Window",
    "load_balancing_loss",
    "memory_plan",
    "moe_losses",
    "patch",
    "routing_stats",
    "tiny_lm",
    "unpatch",
    "upcycle",
]
