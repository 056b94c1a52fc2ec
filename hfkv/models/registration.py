"""Makes the names ``"hfkv"`` known to transformers, as soon as it loads what a model is and not before."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELS = "transformers.modeling_utils"


def register(registrars: Sequence[str]) -> None:
    """Imports modules: now if transformers' models are loaded, else right after they are."""
    if MODELS in sys.modules:
        _import_all(registrars)
    elif not any(isinstance(finder, _AfterModels) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterModels(registrars))


def _import_all(names: Sequence[str]) -> None:
    for name in names:
        import_module(name)


class _AfterModels(MetaPathFinder):
    """Leaves every import to the other finders, and imports the registrars once MODELS is loaded."""

    def __init__(self, registrars: Sequence[str]) -> None:
        self._registrars = registrars

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODELS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _import_all(self._registrars)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
