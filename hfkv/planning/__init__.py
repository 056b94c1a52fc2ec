"""What fits before anything is loaded: ``hfkv plan`` without its screen."""

from hfkv.planning.plan import MemoryPlan, PlannedCache, memory_plan

__all__ = ["MemoryPlan", "PlannedCache", "memory_plan"]
