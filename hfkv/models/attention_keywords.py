"""What the source code of an attention class says: found once a class, and never while a graph is traced."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

from hfkv.models.sources import modelling_files, source_tree

# Models that must keep their own attention although their code would take another name for it.
_SPARSE = "it applies its sparse index only under transformers' own attentions"
OWN_ATTENTION = {
    "deepseek_v4": _SPARSE,
    "minimax_m3": _SPARSE,
    "bigbird_pegasus": "its encoder computes its attention itself and would misread the mask",
    "git": "it changes its keys and values between the cache and the attention",
    "inkling2": "it passes a keyword to its attention that only its own functions know",
}
# What every attention function is given in order.
_POSITIONAL = ("module", "query", "key", "value", "attention_mask")

_codes: dict[Any, AttentionCode] = {}
_reasons: dict[tuple[Any, str], str | None] = {}


@dataclass(frozen=True)
class AttentionCode:
    """What there is to know of an attention class.

    Attributes:
        eager: the eager attention function of its modelling file, or None.
        has_sdpa: whether its model may use scaled_dot_product_attention; gpt_oss, for one, may not.
        keywords: the keywords that change a result: an attention function of transformers or of the modelling file
            reads them, or the modelling file names them where it calls one.
    """

    eager: Callable[..., Any] | None
    has_sdpa: bool
    keywords: frozenset[str]


def attention_code(attention_class: Any) -> AttentionCode:
    """Looks a class up, and reads its source the first time."""
    found = _codes.get(attention_class)
    if found is None:
        found = _codes[attention_class] = _read(_modelling(attention_class))
    return found


def own_attention_reason(config: Any) -> str | None:
    """Why models of this config must keep their own attention, or None where they may take ours."""
    key = (type(config), config.model_type)
    if key not in _reasons:
        _reasons[key] = _own_attention_reason(*key)
    return _reasons[key]


def learn(model: Any) -> None:
    """Looks up what a forward of `model` will ask for, so that one that is traced for a compiler finds it there."""
    for module in model.modules():
        if "attention" in type(module).__name__.lower():
            attention_code(type(module))
        if hasattr(getattr(module, "config", None), "model_type"):
            own_attention_reason(module.config)


def _own_attention_reason(config_class: Any, model_type: str) -> str | None:
    for kind, reason in OWN_ATTENTION.items():
        if model_type == kind or model_type.startswith(f"{kind}_"):
            return reason
    if not _calls_attention_functions(config_class):
        return "its code does not go through transformers' attention functions"
    return None


def _calls_attention_functions(config_class: Any) -> bool:
    """Whether the models of a config go through transformers' attention functions (and so reach ours)."""
    models = [model for file in modelling_files(config_class) for model in _models_of(file)]
    return all(model._can_set_attn_implementation() for model in models if model.config_class is config_class)


def _modelling(attention_class: Any) -> ModuleType:
    """The modelling file of an attention class: where its eager attention function is."""
    for base in attention_class.__mro__:
        modelling = sys.modules.get(base.__module__)
        if modelling is not None and hasattr(modelling, "eager_attention_forward"):
            return modelling
    return sys.modules[attention_class.__module__]


@functools.cache
def _read(modelling: ModuleType) -> AttentionCode:
    eager = getattr(modelling, "eager_attention_forward", None)
    models = _models_of(modelling)
    own = set() if eager is None else _names_read(eager)
    return AttentionCode(
        eager=eager,
        has_sdpa=not models or any(model._supports_sdpa for model in models),
        keywords=frozenset(own | _named_in_calls(modelling) | _read_by_transformers()),
    )


def _models_of(modelling: ModuleType) -> list[Any]:
    found: list[Any] = [value for value in vars(modelling).values() if inspect.isclass(value)]
    return [
        value
        for value in found
        if issubclass(value, transformers.PreTrainedModel) and value is not transformers.PreTrainedModel
    ]


@functools.cache
def _read_by_transformers() -> frozenset[str]:
    """The keywords that transformers' own attention functions read, those of optional packages included."""
    names: set[str] = set()
    for function in transformers.AttentionInterface().values():
        if getattr(function, "__module__", "").startswith("transformers."):
            names |= _names_read(function)
    for path in Path(transformers.integrations.__path__[0]).glob("*attention*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and [word.arg for word in node.args.args[:2]] == ["module", "query"]:
                names |= _names_in(node)
    return frozenset(names)


def _names_read(function: Any, seen: frozenset[Any] = frozenset()) -> set[str]:
    """The keywords that a function takes by name, looks up, or hands on to another that does."""
    function = inspect.unwrap(function)
    tree = source_tree(function)
    definition = None if tree is None else next((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)), None)
    if definition is None or function in seen:
        return set()
    names, others = _names_in(definition), _others(definition)
    for node in ast.walk(definition):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and _is_handed(others, node):
            inner = function.__globals__.get(node.func.id)
            if inspect.isfunction(inner):
                names |= _names_read(inner, seen | {function})
    return names


def _names_in(definition: ast.FunctionDef) -> set[str]:
    names = {argument.arg for argument in (*definition.args.args, *definition.args.kwonlyargs)} - {*_POSITIONAL}
    others = _others(definition)
    return names.union(*(_looked_up(node, others) for node in ast.walk(definition)))


def _others(definition: ast.FunctionDef) -> str | None:
    """The name that a function gives the keywords it does not name."""
    return None if definition.args.kwarg is None else definition.args.kwarg.arg


def _looked_up(node: ast.AST, others: str | None) -> set[str]:
    """The names that ``kwargs.get("name")``, ``kwargs["name"]`` and ``"name" in kwargs`` ask for."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
        owner, keys = node.func.value, node.args[:1]
    elif isinstance(node, ast.Subscript):
        owner, keys = node.value, [node.slice]
    elif isinstance(node, ast.Compare) and len(node.comparators) == 1:
        owner, keys = node.comparators[0], [node.left]
    else:
        return set()
    if not isinstance(owner, ast.Name) or owner.id != others:
        return set()
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _is_handed(others: str | None, call: ast.Call) -> bool:
    return any(
        word.arg is None and isinstance(word.value, ast.Name) and word.value.id == others for word in call.keywords
    )


def _named_in_calls(modelling: ModuleType) -> set[str]:
    """The keywords that a modelling file names where it calls the attention function."""
    tree = source_tree(modelling)
    if tree is None:
        return set()
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    named = (call for call in calls if isinstance(call.func, ast.Name) and "attention_interface" in call.func.id)
    return {word.arg for call in named for word in call.keywords if word.arg is not None} - {*_POSITIONAL}
