"""The only code that changes a model: `patch` and `unpatch`."""

from hfkv.patches.patch import Patch, patch, unpatch

__all__ = ["Patch", "patch", "unpatch"]
