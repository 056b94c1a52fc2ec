"""What the code of a model says, found from its config."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import sys
import textwrap
from types import ModuleType
from typing import Any


def modelling_files(config_class: Any) -> list[ModuleType]:
    """The modelling files beside a config's file; the one that goes by its name is imported for it."""
    package = config_class.__module__.rpartition(".")[0]
    with contextlib.suppress(ImportError):  # a config alone does not bring its models
        importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    return [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.modeling")]


def config_of_layer(config: Any, index: int) -> Any:
    """The config of one layer; where layers differ, the model's own config refuses to answer for all of them."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    layers = config.per_layer_config
    return layers[index] if index < len(layers) else config


def source_tree(owner: Any) -> ast.AST | None:
    """The parsed source of a function or a file, or None where there is none to be had."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):
        return None
