"""What a layer's launches cost the host: ``python -m tests.kernels.launches``, without a GPU.

Triton's driver is a stand-in that compiles for compute capability 9.0 and launches nothing; all other Python and C++
runs as it does on a GPU: the checks, torch's dispatcher, the choice of tiles, and Triton's own look at arguments. One
token of eight kv heads, 32 query heads, D 128, by the operators and past the dispatcher, in turns; processor
time, the least mean of 40 calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from hfkv.kernels import operators
from hfkv.kernels.device_inputs import device_inputs
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.triton import append, call, operator
from hfkv.kernels.triton.arguments import product_dtypes
from hfkv.kernels.triton.decode import decode_attention
from hfkv.kernels.triton.tiling import SHARED_MEMORY, Device
from hfkv.stores.layout import Layout
from tests.kernels.held import garbage

LENGTH, ROOM, PAGE_SIZE, ROUNDS, CALLS = 1000, 2048, 64, 100, 40
CPU = torch.device("cpu")


class Driver:
    """A driver that launches nothing."""

    class utils:  # noqa: N801 - Triton's name
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

        @staticmethod
        def load_binary(*_: object) -> tuple[int, ...]:
            return 1, 1, 128, 0, 1024

    launched = 0

    @staticmethod
    def launcher_cls(source: object, metadata: object) -> Callable[..., None]:
        def launch(*_: object) -> None:
            Driver.launched += 1

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return CPU


def microseconds(functions: list[Callable[[], Any]]) -> list[float]:
    """Measures functions in turns; gives the least mean of each."""
    least = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for index, function in enumerate(functions):
            begin = time.process_time()
            for _ in range(CALLS):
                function()
            least[index] = min(least[index], (time.process_time() - begin) / CALLS * 1e6)
    return least


def layer(codec: str, page_size: int) -> dict[str, Callable[[], Any]]:
    """What one layer calls in a step: `append` and `decode_attention`."""
    pages = -(-LENGTH // page_size) if page_size else 0
    spans = tuple((0, min(page_size, LENGTH - low)) for low in range(0, LENGTH, page_size)) if page_size else ()
    layout = Layout(LENGTH, table=torch.arange(pages + 1)[None] if page_size else None, spans=spans)
    shape = (pages + 1 if page_size else 1, 8, page_size or ROOM, 128)
    keys, values = (garbage(codec, shape, torch.bfloat16, CPU) for _ in range(2))
    query, new = torch.zeros(1, 32, 1, 128).bfloat16(), torch.zeros(1, 8, 1, 128).bfloat16()
    visibility, scoring = Visibility(LENGTH, (0,)), Scoring(0.1)
    written, seen = device_inputs(layout, None, CPU), device_inputs(layout, visibility, CPU)
    return {
        "append": lambda: append.append(new, new, keys, values, layout, inputs=written),
        "decode": lambda: decode_attention(query, keys, values, layout, visibility, scoring, inputs=seen),
    }


def main() -> None:
    driver.set_active(Driver())
    device = Device(132, SHARED_MEMORY[9, 0])
    for module in (operator, call):
        module.device_of = lambda _: device  # type: ignore[attr-defined]
    operator.product_dtypes = lambda dtype, codec, _: product_dtypes(dtype, codec, torch.device("cuda"))
    is_looked_at = operators.is_looked_at

    def by_operator(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            operators.is_looked_at = lambda _: True
            function()
            operators.is_looked_at = is_looked_at

        return run

    print(f"{'us a layer':<24}{'operator':>10}{'direct':>10}{'launches':>10}")
    with torch.inference_mode():
        for codec in ("none", "int8", "int4"):
            for page_size in (0, PAGE_SIZE):
                for name, function in layer(codec, page_size).items():
                    function()
                    Driver.launched = 0
                    function()
                    launched = Driver.launched
                    slow, fast = microseconds([by_operator(function), function])
                    title = f"{name} {codec}{' paged' if page_size else ''}"
                    print(f"{title:<24}{slow:>10.1f}{fast:>10.1f}{launched:>10}", flush=True)


if __name__ == "__main__":
    main()
