"""The only code that changes a model: `patch` and `unpatch`."""

from hfkv.patches.handle import Patch
from hfkv.patches.patch import patch, unpatch

__all__ = ["Patch", "patch", "unpatch"]
