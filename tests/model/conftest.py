"""What tests of whole models share."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hfkv.cache.layers.layer import KVLayer


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens) of every update of any layer."""
    read: list[tuple[int, int]] = []
    update = KVLayer.update

    def counted(self: KVLayer, keys: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append((keys.shape[0], keys.shape[2]))
        return update(self, keys, *args, **kwargs)

    monkeypatch.setattr(KVLayer, "update", counted)
    return read


class Expansions:
    """How many tokens `expand_kv` of transformers' own has expanded, call by call."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        for kind in {type(module) for module in model.modules() if hasattr(type(module), "expand_kv")}:
            monkeypatch.setattr(kind, "expand_kv", self._counted(kind.expand_kv))

    def _counted(self, original: Any) -> Any:
        @functools.wraps(original)
        def expand_kv(module: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> Any:
            self.tokens.append(kv_nope.shape[2])
            return original(module, kv_nope, k_rot)

        return expand_kv


@pytest.fixture
def expansions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    return lambda model: Expansions(model, monkeypatch)
