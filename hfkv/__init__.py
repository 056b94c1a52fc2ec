"""hfkv: KV caches for Hugging Face transformers that are smaller, exact where they say so, and combinable.

Importing it registers the attention and the experts ``"hfkv"`` with transformers and changes nothing else. It is quick:
a public name is imported when it is asked for. This is also where lower rooms are told which functions higher ones
have for them.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hfkv import tiny_lm as tiny_lm
from hfkv.models.registration import register
from hfkv.policy.ports import connect

if TYPE_CHECKING:
    from hfkv.cache.kv_cache import KVCache as KVCache
    from hfkv.cache.memory import CacheMemory as CacheMemory
    from hfkv.cache.presets import OffloadedCache as OffloadedCache
    from hfkv.cache.presets import PagedCache as PagedCache
    from hfkv.cache.presets import QuantizedCache as QuantizedCache
    from hfkv.cache.presets import SlidingWindowCache as SlidingWindowCache
    from hfkv.experts.config import MoEConfig as MoEConfig
    from hfkv.experts.report import MoEReport as MoEReport
    from hfkv.measure.monitor import MemoryMonitor as MemoryMonitor
    from hfkv.patches.handle import Patch as Patch
    from hfkv.patches.patch import patch as patch
    from hfkv.patches.patch import unpatch as unpatch
    from hfkv.patches.upcycle import upcycle as upcycle
    from hfkv.planning.plan import MemoryPlan as MemoryPlan
    from hfkv.planning.plan import memory_plan as memory_plan
    from hfkv.policy.config import KVConfig as KVConfig
    from hfkv.policy.errors import CacheMemoryError as CacheMemoryError
    from hfkv.policy.recent import Recent as Recent
    from hfkv.policy.reuse import Reuse as Reuse
    from hfkv.policy.window import Window as Window
    from hfkv.sparse_moe.layer import SparseMoE as SparseMoE
    from hfkv.sparse_moe.losses import load_balancing_loss as load_balancing_loss
    from hfkv.sparse_moe.model_losses import moe_losses as moe_losses
    from hfkv.sparse_moe.stats import routing_stats as routing_stats

__version__ = "0.1.0"

# Where each public name is made.
_PUBLIC = {
    "CacheMemory": "hfkv.cache.memory",
    "CacheMemoryError": "hfkv.policy.errors",
    "KVCache": "hfkv.cache.kv_cache",
    "KVConfig": "hfkv.policy.config",
    "MemoryMonitor": "hfkv.measure.monitor",
    "MemoryPlan": "hfkv.planning.plan",
    "MoEConfig": "hfkv.experts.config",
    "MoEReport": "hfkv.experts.report",
    "OffloadedCache": "hfkv.cache.presets",
    "PagedCache": "hfkv.cache.presets",
    "Patch": "hfkv.patches.handle",
    "QuantizedCache": "hfkv.cache.presets",
    "Recent": "hfkv.policy.recent",
    "Reuse": "hfkv.policy.reuse",
    "SlidingWindowCache": "hfkv.cache.presets",
    "SparseMoE": "hfkv.sparse_moe.layer",
    "Window": "hfkv.policy.window",
    "load_balancing_loss": "hfkv.sparse_moe.losses",
    "memory_plan": "hfkv.planning.plan",
    "moe_losses": "hfkv.sparse_moe.model_losses",
    "patch": "hfkv.patches.patch",
    "routing_stats": "hfkv.sparse_moe.stats",
    "unpatch": "hfkv.patches.patch",
    "upcycle": "hfkv.patches.upcycle",
}
__all__ = sorted([*_PUBLIC, "tiny_lm"])

# Each registers its names with transformers when it is imported. What they import of hfkv does not import transformers'
# model classes (a test holds it), so none of them finds another half imported, whichever module of hfkv is the first.
REGISTRARS = ("hfkv.attention.function", "hfkv.experts.implementation", "hfkv.experts.checkpoint")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        globals()[name] = getattr(import_module(_PUBLIC[name]), name)
        return globals()[name]
    if name.isidentifier() and not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


connect(
    {
        "least_lossy": "hfkv.planning.plan:least_lossy",
        "calibration_ids": "hfkv.eval.calibration:calibration_ids",
        "find_codecs": "hfkv.eval.fidelity:find_codecs",
        "config_to_text": "hfkv.sharing.files.config_text:config_to_text",
        "config_from_text": "hfkv.sharing.files.config_text:config_from_text",
        "search_bar": "hfkv.cli.search_bar:search_bar",
        "save_cache": "hfkv.sharing.files.cache_file:save_cache",
        "load_cache": "hfkv.sharing.files.cache_file:load_cache",
        "plain_text": "hfkv.cli.tables:plain_text",
        "cache_memory_table": "hfkv.cli.report_tables:cache_memory_table",
        "experts_table": "hfkv.cli.report_tables:experts_table",
        "trace_table": "hfkv.cli.report_tables:trace_table",
        "replay_table": "hfkv.cli.report_tables:replay_table",
        "routing_table": "hfkv.cli.report_tables:routing_table",
        "monitor_line": "hfkv.cli.monitor_screen:live_line",
        "monitor_table": "hfkv.cli.monitor_screen:summary",
        "plan_tables": "hfkv.cli.plan.screen:tables",
    }
)
register(REGISTRARS)
