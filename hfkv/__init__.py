"""hfkv: KV caches for Hugging Face transformers that are smaller, exact where they say so, and combinable.

Importing it registers the attention ``"hfkv"`` with transformers and changes nothing else.
"""

from hfkv import tiny_lm
from hfkv.attention import register as _register
from hfkv.cache import KVCache
from hfkv.config import KVConfig
from hfkv.errors import CacheMemoryError
from hfkv.memory import CacheMemory
from hfkv.monitor import MemoryMonitor
from hfkv.named import OffloadedCache, PagedCache, QuantizedCache, SlidingWindowCache
from hfkv.patches import Patch, patch, unpatch
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
    "OffloadedCache",
    "PagedCache",
    "Patch",
    "QuantizedCache",
    "Reuse",
    "SlidingWindowCache",
    "Window",
    "memory_plan",
    "patch",
    "tiny_lm",
    "unpatch",
]

_register()
