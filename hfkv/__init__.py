"""hfkv: KV caches for Hugging Face transformers that are smaller, exact where they say so, and combinable.

Importing it registers the attention and the experts ``"hfkv"`` with transformers and changes nothing else.
"""

from hfkv import tiny_lm
from hfkv.attention import register as _register
from hfkv.cache import KVCache
from hfkv.config import KVConfig
from hfkv.errors import CacheMemoryError
from hfkv.experts.checkpoint import register as _register_checkpoint
from hfkv.experts.config import MoEConfig
from hfkv.experts.implementation import register as _register_experts
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

__version__ = "0.1.0"

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

_register()
_register_experts()
_register_checkpoint()
