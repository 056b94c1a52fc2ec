"""Rotary angles in float64, exact at any position: stock multiplies frequency and position in float32."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from hfkv.codecs.autocast import in_own_precision
from hfkv.codecs.waves import rotary_angles
from hfkv.models.probe import decoder_of, moving_angles
from hfkv.patches.undo import Undo

# Where the new forward is compared with the stock one: the stock one is still good to about 1e-5 there.
_POSITIONS = (0, 1, 2, 5, 17, 101)
_TOLERANCE = 5e-5
# How a stock forward spreads its r / 2 angles over the columns of cos and sin.
_LAYOUTS = ("halves", "pairs", "once")
_REMEDY = "leave exact_rotary out"


class _Stock(NamedTuple):
    """The stock forward's use of one set of frequencies.

    Attributes:
        buffer: the module's attribute that holds them.
        layout: one of `_LAYOUTS`.
        scaling: factor on cos and sin.
        stays_float32: whether cos and sin stay float32, or take the dtype of the hidden states.
    """

    buffer: str
    layout: str
    scaling: float
    stays_float32: bool


def set_exact_rotary(model: PreTrainedModel, undo: Undo) -> None:
    """Overrides `forward` on every rotary module of the model's text decoder.

    Raises:
        ValueError: there is none, or one does anything but cos and sin of fixed frequencies times positions.
    """
    decoder = decoder_of(model)
    reason = moving_angles(decoder.config, decoder)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot take exact_rotary: {reason}; {_REMEDY}")
    modules = [module for module in decoder.modules() if _buffers(module)]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} cannot take exact_rotary: its decoder has no rotary module (one that keeps its "
            f"frequencies in a buffer named inv_freq); {_REMEDY}"
        )
    for module in modules:
        stock = {layer_type: _learn(module, buffer, layer_type) for layer_type, buffer in _buffers(module).items()}
        undo.override_forward(_forward, module, (stock,), needs_patch=False)


def _buffers(module: torch.nn.Module) -> dict[str | None, str]:
    """The module's buffers of frequencies, by layer type; None where a buffer is for any layer."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    names = [name for name in names if name.endswith("inv_freq") and not name.endswith("original_inv_freq")]
    return {name.removesuffix("inv_freq").rstrip("_") or None: name for name in names}


@in_own_precision
@torch.no_grad()
def _forward(
    module: torch.nn.Module,
    stock: dict[str | None, _Stock],
    x: torch.Tensor,
    position_ids: torch.Tensor,
    layer_type: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives cos and sin `[B, T, C]` at positions `[B, T]`, in place of the module's own forward."""
    found = stock[layer_type if layer_type in stock else None]
    angles = rotary_angles(getattr(module, found.buffer), position_ids, x.device)
    dtype = torch.float32 if found.stays_float32 else x.dtype
    cos, sin = ((wave * found.scaling).to(x.device, dtype) for wave in (angles.cos(), angles.sin()))
    return _spread(cos, found.layout), _spread(sin, found.layout)


def _spread(wave: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "halves":
        return torch.cat((wave, wave), dim=-1)
    return wave.repeat_interleave(2, dim=-1) if layout == "pairs" else wave


def _learn(module: torch.nn.Module, buffer: str, layer_type: str | None) -> _Stock:
    """Finds out what the module's own forward does, by its results at a few small positions.

    Raises:
        ValueError: it does something else.
    """
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    if parameters[:2] == ["x", "position_ids"] and set(parameters[2:]) <= {"layer_type"}:
        options = {} if layer_type is None else {"layer_type": layer_type}
        x = torch.zeros(1, 1, 1, device=getattr(module, buffer).device)
        positions = torch.tensor([_POSITIONS], device=x.device)
        expected = module.forward(x, positions, **options)
        if isinstance(expected, tuple) and len(expected) == 2 and not any(wave.is_complex() for wave in expected):
            cos_in_half, _ = module.forward(x.bfloat16(), positions, **options)
            # At position 0 every cosine is 1.
            scaling = expected[0][0, 0, 0].item()
            for layout in _LAYOUTS:
                stock = _Stock(buffer, layout, scaling, cos_in_half.dtype == torch.float32)
                given = _forward(module, {layer_type: stock}, x, positions, layer_type)
                if all(_is_close(*waves) for waves in zip(given, expected, strict=True)):
                    return stock
    raise ValueError(
        f"{type(module).__name__} cannot take exact_rotary: its forward does not give the cos and sin of its "
        f"frequencies times the positions, half-split, interleaved or once; {_REMEDY}"
    )


def _is_close(given: torch.Tensor, expected: torch.Tensor) -> bool:
    return given.shape == expected.shape and bool(((given - expected).abs() <= _TOLERANCE).all())
