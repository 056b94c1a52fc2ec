"""Planes in memory: how they are allocated, and the order in which their numbers lie.

Every plane has the shape `[B or N, H, T, d]`. As a rule the numbers of a token lie side by side; in a plane with tokens
innermost the tokens do, as integer products of a GPU take values, and the strides say so.
"""

from __future__ import annotations

import torch

from hfkv.stores.huge_pages import advise

# Where tokens are innermost, there is room for a multiple of so many: kernels read 16 bytes of a number's run at once.
ALIGNED_TOKENS = 16


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, tokens_innermost: bool = False
) -> torch.Tensor:
    """Allocates uninitialised memory for keys and values.

    Args:
        shape: shape of the plane.
        dtype: dtype of its numbers.
        device: device of its memory.
        tokens_innermost: whether its tokens are to lie side by side, as `has_tokens_innermost` finds.

    Raises:
        MemoryError: there is not enough memory.
    """
    # A cache filled under inference_mode may go on outside it: its planes must be ordinary tensors.
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return allocate(shape, dtype, device, tokens_innermost)
    try:
        memory = torch.empty(shape, dtype=dtype, device=device)
        advise(memory)
        return shaped(memory, shape, True) if tokens_innermost else memory
    except RuntimeError as error:
        raise no_memory(torch.Size(shape).numel() * dtype.itemsize, str(device), error) from error


def shaped(memory: torch.Tensor, shape: tuple[int, ...], tokens_innermost: bool = False) -> torch.Tensor:
    """Contiguous memory as a plane of so many numbers, in the order that `allocate` says."""
    if not tokens_innermost or shape[-1] <= 1:
        return memory.view(shape)
    *others, tokens, width = shape
    return memory.view(*others, width, tokens).transpose(-1, -2)


def has_tokens_innermost(plane: torch.Tensor) -> bool:
    """Whether the tokens of a whole plane lie side by side; of one number a token, both orders are the same."""
    return plane.shape[-1] > 1 and plane.stride(-2) == 1


def by_token(states: torch.Tensor) -> torch.Tensor:
    """Tokens of a plane with the numbers of each side by side: a copy, where they lie otherwise."""
    return states if states.stride(-1) == 1 else states.contiguous()


def no_memory(num_bytes: int, where: str, error: Exception) -> MemoryError:
    """The error for bytes of keys and values that could not be allocated."""
    return MemoryError(
        f"could not allocate {num_bytes:,} bytes for keys and values in {where} ({str(error).splitlines()[0]}); use a "
        "smaller codec, a window, offload or a shorter context"
    )


def token_bytes(plane: torch.Tensor) -> int:
    """The bytes of one token of a plane `[.., H, T, d]`."""
    return plane.shape[1] * plane.shape[3] * plane.element_size()
