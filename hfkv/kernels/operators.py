"""`Operator`: a function that launches kernels, as an operator of torch that goes past its dispatcher where it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """An operator `hfkv::name`, and the function that it runs.

    In eager decoding torch's dispatcher and the wrappers of custom operators cost the host more than a launch does, so
    the function is called itself where nobody looks at operations: not while torch compiles, exports or traces (a
    compiler sees one operator and its fake), not under modes of torch's (fake tensors among them), transforms or a
    profiler, not for subclasses of tensors, and not where gradients are recorded, which the operator refuses and whose
    check of what was written to since counts its writes. Captured CUDA graphs hold the same launches either way.

    Attributes:
        run: the function.
        packet: the operator.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        mutates_args: tuple[str, ...] = (),
    ) -> None:
        """Registers the operator.

        Args:
            name: its name behind `hfkv::`.
            run: function of annotated arguments, of which an operator can be made.
            fake: function of the same arguments that allocates what `run` returns.
            mutates_args: arguments that `run` writes to.
        """
        self.run = run
        torch.library.custom_op(f"hfkv::{name}", run, mutates_args=mutates_args).register_fake(fake)
        self.packet = getattr(torch.ops.hfkv, name)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or is_looked_at(arguments[0]):
            return self.packet(*arguments)
        return self.run(*arguments)


def is_looked_at(tensor: torch.Tensor) -> bool:
    """Says whether something besides the device may want to see an operation on `tensor`: see `Operator`."""
    return (
        type(tensor) is not torch.Tensor
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )
