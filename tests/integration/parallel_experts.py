"""What the experts of a model that is spread over processes are asked to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hfkv
from tests.integration.parallel_scenarios import NEW_TOKENS, inputs


def _text(form: str | None) -> Callable[[Any, Path], dict[str, Any]]:
    def run(model: Any, folder: Path) -> dict[str, Any]:
        if form is None:
            return _say(model)
        with hfkv.patch(model, moe=form) as handle:
            assert handle.moe is not None
            forms = sorted({swap.form for swap in handle.moe.swapped})
            return {**_say(model), "forms": forms, "ratio": handle.moe.bytes_after / handle.moe.bytes_before}

    return run


def _say(model: Any) -> dict[str, Any]:
    given = inputs(padding=3)
    tokens = model.generate(**given, do_sample=False, max_new_tokens=NEW_TOKENS)
    with torch.no_grad():
        logits = model(**given).logits[:, -1]
    return {"tokens": tokens.tolist(), "logits": logits.tolist()}


# The last runs after int8, whose undo leaves decoded numbers: it must be the last.
EXPERTS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    "experts stock": _text(None),
    "experts auto": _text("auto"),
    "experts int8": _text("int8"),
}
