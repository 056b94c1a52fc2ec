"""Every architecture that can be built tiny: beams and samples of prompts read once are those of rows read one by one.

What the patch finds out about a model is held against its source: the attributes that its modules set while they run.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from typing import Any

import pytest
import torch

import hfkv
from tests.zoo import Architecture, CannotBuild, architectures, build, generate, prompt

MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "samples": {"num_return_sequences": 2, "do_sample": True},
    "hidden_states": {"num_beams": 2, "do_sample": True, "output_hidden_states": True},
}
# Attributes that modules set while they compute, and that are alike for all rows of a prompt or set before it is read.
NOT_OF_ROWS = {
    "rope_deltas": "of the prompts before they are copied, by `generate`; each row's own where copies have been made",
    "embed_positions": "a table of positions, moved to the device of its input",
    "pos_encoding": "a table of positions, moved to the device of its input",
    "weights": "a table of positions that grows with the longest text",
}
# Methods that no forward calls.
_SETTERS = re.compile("__init__|post_init|(set|tie|resize|_init|_tie|_resize|load|save|enable|freeze|_freeze)_?.*")


@functools.cache
def attributes_set(kind: type) -> frozenset[str]:
    """The attributes of `self` that the methods of a class of transformers set, those that only build it left out."""
    found = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("transformers.models."):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for method in tree.body[0].body:  # type: ignore[attr-defined]
            if isinstance(method, ast.FunctionDef) and not _SETTERS.fullmatch(method.name):
                found |= set(_set_in(method))
    return frozenset(found)


def _set_in(method: ast.FunctionDef) -> list[str]:
    targets: list[ast.AST] = []
    for node in ast.walk(method):
        given = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets += [part for each in given for part in (each.elts if isinstance(each, ast.Tuple) else [each])]
    names = []
    for target in targets:
        while isinstance(target, ast.Subscript):
            target = target.value
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            names.append(target.attr)
    return names


def run(model: Any, inputs: dict[str, torch.Tensor], mode: str) -> Any:
    torch.manual_seed(3)
    tokens, logits = generate(model, inputs, 4, **MODES[mode])
    return tokens, logits


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures(), ids=str)
def test_copies_of_a_prompt_are_those_of_rows_read_one_by_one(architecture: Architecture) -> None:
    try:
        model = build(architecture)
        inputs = prompt(model)
        stock = {mode: run(model, inputs, mode) for mode in MODES}
    except CannotBuild as reason:
        pytest.skip(f"cannot be built tiny: {reason}")
    except Exception as error:  # whatever stock code does with random weights and odd sizes
        pytest.skip(f"stock generate fails: {type(error).__name__}")
    try:
        handle = hfkv.patch(model)
    except ValueError as reason:
        pytest.skip(f"refused: {reason}")
    for mode, (tokens, logits) in stock.items():
        ours, our_logits = run(model, inputs, mode)
        assert torch.equal(ours, tokens), f"{mode}: {ours.tolist()} against {tokens.tolist()}"
        scale = logits[logits.isfinite()].abs().max().clamp(min=1).item()
        torch.testing.assert_close(our_logits, logits, atol=1e-4 * scale, rtol=1e-3)
    told = " ".join(message for message in handle._logged if "row by row" in message)
    in_source = {kind: attributes_set(kind) for kind in map(type, model.modules())}
    where = re.search(r"state in its modules \((\w+)\.(\w+)", told)
    if where is not None:
        assert where[2] in {name for kind, names in in_source.items() if kind.__name__ == where[1] for name in names}
    elif None not in handle.reads_once.values() and handle.reads_once:
        assert frozenset().union(*in_source.values()) <= NOT_OF_ROWS.keys()
