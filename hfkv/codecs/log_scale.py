"""Scales of eight bits: logarithmic, a byte a row."""

from __future__ import annotations

import functools

import torch

# Scales grow by about 2 ** (1 / 8): bfloat16 numbers, so that products with codes are rounded once.
_MANTISSAS = (1.0, 1.09375, 1.1875, 1.296875, 1.4140625, 1.5390625, 1.6796875, 1.8359375)
_STEPS = len(_MANTISSAS)
# The octaves below 1: scales go from 2 ** -20.9 to 2 ** 10.75. Times the codes' deviation, 44 and more, these are root
# mean squares from 3e-5 on, and up to float16's largest number.
_BELOW = 21
# The first byte says that all numbers of a row are zeros, the last that they are none.
ZEROS, NO_NUMBERS = 0, 255
# The squares of scales, four steps an octave, are as far from one as from the next at 2 ** (1 / 8), 2 ** (3 / 8) and so
# on: here as the bits of float32 behind the exponent.
_BETWEEN = (0xB95C2, 0x25FED7, 0x45672A, 0x6AC0C7)
_MANTISSA_BITS, _MANTISSA, _MAGNITUDE = 23, (1 << 23) - 1, 0x7FFFFFFF
# How much dearer an error along a row is than one across it.
_ALONG = 16


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums rows `[..., D]`, float32, to `[..., 1]`: the second half is added to the first one, and so on.

    The order of a sum of torch's depends on how many rows there are, and a token's code must not.
    """
    missing = (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def nearest_scale(squares: torch.Tensor) -> torch.Tensor:
    """The bytes of the scales next to the roots of `squares`, float32 of any shape.

    Returns:
        Bytes as int32 of the same shape; `ZEROS` for what is too small for the least scale, `NO_NUMBERS` for what is
        too large for the largest one, infinite or NaN.
    """
    bits = squares.view(torch.int32).bitwise_and(_MAGNITUDE)  # of NaN any sign
    rest = bits & _MANTISSA
    steps = (bits >> _MANTISSA_BITS) * (_STEPS // 2)
    for bound in _BETWEEN:
        steps = steps + (rest >= bound)
    return (steps + (_STEPS * _BELOW - _STEPS // 2 * 127)).clamp_(ZEROS, NO_NUMBERS)


def best_scale(
    squares: torch.Tensor, products: torch.Tensor, of_codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that suits the codes of a row, and what it costs.

    Args:
        squares: sums of the squares of rows, float32 `[..., 1]`.
        products: sums of the products of rows and their codes.
        of_codes: sums of the squares of the codes.

    Returns:
        Bytes of scales, int32 `[..., 1]`, and squared errors as parts of `squares`, less 1, those along the row
        `_ALONG` times more.
    """
    along = products * products / squares * _ALONG
    scale = products * (1 + _ALONG) / (of_codes + along)
    bytes_ = shifted(nearest_scale(scale * scale), 0)
    scale = to_floats(bytes_)
    share = scale * products / squares
    missing = share - 1
    return bytes_, scale * scale * of_codes / squares - share * 2 + missing * missing * _ALONG


def has_numbers(scales: torch.Tensor) -> torch.Tensor:
    """Whether the rows of bytes `[..., 1]` have codes at all."""
    return (scales > ZEROS) & (scales < NO_NUMBERS)


def shifted(scales: torch.Tensor, by: int | torch.Tensor) -> torch.Tensor:
    """The bytes of scales so many steps away, as far as there are any."""
    return (scales + by).clamp_(ZEROS + 1, NO_NUMBERS - 1)


def to_floats(scales: torch.Tensor) -> torch.Tensor:
    """The scales that bytes stand for, float32 of the same shape."""
    table = _all_scales(scales.device)
    return table.index_select(0, scales.int().flatten()).view(scales.shape)


@functools.cache
def _all_scales(device: torch.device) -> torch.Tensor:
    exponents = [(byte // _STEPS - _BELOW, byte % _STEPS) for byte in range(256)]
    scales = [_MANTISSAS[step] * 2.0**exponent for exponent, step in exponents]
    scales[ZEROS], scales[NO_NUMBERS] = 0.0, torch.nan
    with torch.inference_mode(False):
        return torch.tensor(scales, dtype=torch.float32, device=device)
