"""What forwards do where they are given no cache, read from their source."""

from __future__ import annotations

import ast
import functools
import inspect
from typing import Any

from transformers import PreTrainedModel

from hfkv.models.sources import source_tree

_CACHE = "past_key_values"


def cacheless_reason(model: PreTrainedModel) -> str | None:
    """Why an empty cache is not what `model` makes itself where it is given none; None where it is.

    RecurrentGemma, for one, clears the states in its modules only where it makes the cache.
    """
    classes = {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    for model_class in sorted(classes, key=lambda each: each.__name__):
        if not _only_makes_a_cache(model_class):
            return f"{model_class.__name__} does more than make a cache where it is given none"
    return None


@functools.cache
def _only_makes_a_cache(model_class: Any) -> bool:
    tree = source_tree(inspect.unwrap(model_class.forward))
    if tree is None:
        return True  # no source to be had: the class was built without a file, and is taken as usual
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _asks_for_none(node.test)]
    return all(_makes_a_cache(node.body) for node in branches)


def _asks_for_none(test: ast.expr) -> bool:
    """Whether a condition holds for no cache, and not for an empty one too."""
    asked = any(
        isinstance(node, ast.Compare)
        and isinstance(node.left, ast.Name)
        and node.left.id == _CACHE
        and isinstance(node.ops[0], ast.Is)
        for node in ast.walk(test)
    )
    return asked and not any(
        isinstance(node, ast.Attribute) and node.attr == "get_seq_length" for node in ast.walk(test)
    )


def _makes_a_cache(body: list[ast.stmt]) -> bool:
    return all(_is_about_a_cache(statement) for statement in body)


def _is_about_a_cache(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If):
        return _makes_a_cache([*statement.body, *statement.orelse])
    if isinstance(statement, ast.Assign):
        targets = [node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)]
        return all(name == _CACHE or "cache" in name for name in targets)
    if isinstance(statement, ast.Expr):
        return "logger" in ast.unparse(statement)
    return isinstance(statement, ast.Pass | ast.Raise)
