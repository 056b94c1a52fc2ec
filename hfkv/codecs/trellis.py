"""The trellis of two bits a number: what a number is, its own two bits say together with the six before them."""

from __future__ import annotations

import functools

import torch

# The numbers of windows of a string of pairs of bits, the newest pair lowest, for those below half of all; the others
# are these turned round, with the other sign. Trained on normal numbers of the standard deviation `DEVIATION`.
_HALF = (
    *(-11, -87, 1, 57, 93, -5, 33, -73, -68, 26, -21, 80, -50, 6, -26, 33),
    *(22, 65, -17, -57, 34, -5, -30, 30, 74, -50, 24, -11, -11, -44, 63, 21),
    *(-66, 12, 45, -27, -67, 37, 10, -24, -8, 70, -46, 16, 3, -73, 35, -30),
    *(3, -14, -68, 101, 41, -17, 15, -39, 47, -126, 5, -34, 24, -21, -41, 49),
    *(20, 57, -79, -8, 98, -32, 10, -110, -14, 12, 50, -53, 27, -19, -115, 36),
    *(-49, -8, 4, 40, 16, -54, 35, -13, -42, 83, -8, 18, -20, -88, 43, 11),
    *(-89, 6, -34, 45, -37, 73, -21, 7, 20, -76, -23, 65, 26, -41, 58, -4),
    *(59, -47, -19, 12, -48, -10, 46, 14, -57, -8, 54, 17, 13, 42, -8, -47),
)
DEVIATION = 44.0
NUMBERS = (*_HALF, *(-number for number in reversed(_HALF)))
_PAIRS = 4
_WINDOWS, _STATES = 4**_PAIRS, 4 ** (_PAIRS - 1)


def encode(doubled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the strings whose numbers have the least squared error (Viterbi).

    Costs are whole numbers, and of paths that cost the same the one through the lower window is taken: so the strings
    are the same ones everywhere. Rows have 8,192 numbers at most, and the root mean square of a row is about
    `DEVIATION`, lest sums should not fit 32 bits.

    Args:
        doubled: twice the numbers to be written, int32 `[N, D]`.

    Returns:
        The strings, uint8 `[N, 1 + ⌈D / 4⌉]`, and the numbers that they stand for, int32 `[N, D]`. The first byte has
        the bits before the first number. Then pair `q` of byte `b` is the one of number ``q ⌈D / 4⌉ + b``: the string
        goes through the quarters of a row in turn.
    """
    num_rows, width = doubled.shape
    num_bytes = -(-width // 4)
    squares, products = _costs(doubled.device)
    nothing = squares & 3
    cost = doubled.new_zeros((num_rows, _STATES, 1))
    choices = []
    for byte in range(num_bytes):
        for index in range(byte, 4 * num_bytes, num_bytes):
            of_windows = nothing
            if index < width:
                of_windows = torch.addcmul(squares, doubled[:, index, None, None], products)
            best = (cost + of_windows).view(num_rows, 4, _STATES).amin(1)
            choices.append((best & 3).to(torch.uint8))
            cost = best.bitwise_and_(-4)[..., None]
    pairs, windows = _followed(cost[..., 0], choices)
    shifts = torch.arange(0, 8, 2, dtype=torch.int32, device=doubled.device)
    strings = (pairs.view(num_rows, 1 + num_bytes, 4) << shifts).sum(-1, dtype=torch.int32).to(torch.uint8)
    in_order = windows.view(num_rows, num_bytes, 4).transpose(1, 2)
    numbers = _numbers(doubled.device).index_select(0, in_order.flatten())
    return strings, numbers.view(num_rows, 4 * num_bytes)[:, :width]


def decode(strings: torch.Tensor, width: int) -> torch.Tensor:
    """Reads strings `[..., 1 + ⌈D / 4⌉]` as numbers, int8 `[..., D]`."""
    words = strings[..., :-1].int() | strings[..., 1:].int() << 8
    first = 10 - 2 * _PAIRS  # the lowest bit of the first pair's window
    windows = torch.cat([(words >> bit) & (_WINDOWS - 1) for bit in range(first, first + 8, 2)], dim=-1)[..., :width]
    return _numbers_as_stored(strings.device).index_select(0, windows.flatten()).view(windows.shape)


def _followed(cost: torch.Tensor, choices: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of bits `[N, 4 + n]` and the windows `[N, n]`, int32, of the cheapest paths.

    Args:
        cost: what the paths to all states cost, int32 `[N, states]`.
        choices: by number, which path came to each state, uint8 `[N, states]`.
    """
    states = torch.arange(_STATES, device=cost.device)
    state = (cost.long() * _STATES + states).amin(1, keepdim=True) & (_STATES - 1)
    windows = []
    for choice in reversed(choices):
        window = choice.gather(1, state) * _STATES + state
        windows.append(window)
        state = window >> 2
    before = [state * 0, *(state >> 2 * place for place in reversed(range(_PAIRS - 1)))]
    found = torch.cat(windows[::-1], dim=1).int()
    return torch.cat((torch.cat(before, dim=1).int(), found), dim=1) & 3, found


@functools.cache
def _numbers(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(NUMBERS, dtype=torch.int32, device=device)


@functools.cache
def _numbers_as_stored(device: torch.device) -> torch.Tensor:
    """The numbers, int8, of windows whose newest pair is the highest one, as it lies in a string."""
    with torch.inference_mode(False):
        turned = _numbers(device).view([4] * _PAIRS).permute(*reversed(range(_PAIRS)))
        return turned.flatten().to(torch.int8)


@functools.cache
def _costs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What windows cost without a number, and what they cost less a unit of one: int32 `[states, 4]`.

    In units of four, so that there is room for what path a window is on, of the four that meet in a state.
    """
    with torch.inference_mode(False):
        numbers = _numbers(device).view(_STATES, 4)
        paths = (torch.arange(_WINDOWS, dtype=torch.int32, device=device) // _STATES).view(_STATES, 4)
        return 4 * numbers * numbers + paths, -4 * numbers
