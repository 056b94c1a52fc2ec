"""A stand-in for a CUDA graph where there is no GPU: the operations of a run, repeated on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Tape(TorchDispatchMode):
    """Notes every operation with its tensors and carries them out again, without the Python code around them.

    As of a graph, the outputs stay where they are, and reading a value back while it is captured raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("a value was read back while a graph was captured")
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def capture(self, run: Callable[[], Any]) -> Any:
        """What `run` returns. Unlike a graph it is carried out now, which a replay of the same step repeats."""
        with self:
            return run()

    def replay(self) -> None:
        """Carries out what was noted, into the same tensors."""
        for func, args, kwargs, noted in self.operations:
            result = func(*args, **kwargs)
            if func.is_view:
                continue
            for old, new in zip(tree_flatten(noted)[0], tree_flatten(result)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
