"""hfkv: KV caches for Hugging Face transformers that are smaller, exact where they say so, and combinable.

Importing it registers the attention and the experts ``"hfkv"`` with transformers and changes nothing else. It is quick:
the public names are imported when the first of them is asked for.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hfkv import tiny_lm as tiny_lm
from hfkv.registration import register

if TYPE_CHECKING:
    from hfkv.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "__all__" or not name.startswith("__"):
        if find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        public = import_module("hfkv.public")
        globals().update({each: getattr(public, each) for each in public.__all__}, __all__=public.__all__)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


register()
