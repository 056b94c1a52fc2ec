"""Program for `selftest`: checks that a file's `int8_matmul` is exact here. It imports torch alone, for speed."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable

import torch

NUM_ROWS = (1, 3, 12, 16, 33)  # M
MOST_TOKENS = 129  # T
HEAD_DIM = 64  # D


def first_wrong(int8_matmul: Callable[..., torch.Tensor]) -> str | None:
    """The first product that is not exact, in words; None where all are.

    It tries the products of attention over T tokens: ``[M, D] @ [D, T]`` with transposed keys, ``[M, T] @ [T, D]``.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)

    for num_tokens in range(1, MOST_TOKENS + 1):
        # Where the process dies, the last line printed says at what.
        print(f"T = {num_tokens}", flush=True)
        for num_rows in NUM_ROWS:
            for a, b in (
                (numbers(num_rows, HEAD_DIM), numbers(num_tokens, HEAD_DIM).T),
                (numbers(num_rows, num_tokens), numbers(num_tokens, HEAD_DIM)),
            ):
                out = torch.full((num_rows, b.shape[1]), -1, dtype=torch.int32)
                int8_matmul(a, b, out)
                if not torch.equal(out.long(), a.long() @ b.long()):
                    return f"{list(a.shape)} @ {list(b.shape)} is not the product of whole numbers"
    return None


if __name__ == "__main__":
    wrong = first_wrong(runpy.run_path(sys.argv[1])["int8_matmul"])
    print(wrong or "exact", flush=True)
    sys.exit(0 if wrong is None else 1)
