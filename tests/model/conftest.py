"""What tests of whole models share."""

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
