"""Whole layers of experts by the kernels: what one expert after the other computes, in every form, with adapters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfkv.experts.adapters import Factors
from hfkv.experts.by_expert import run_by_expert
from hfkv.experts.checkpoint import CODECS
from hfkv.experts.grouped import run_grouped
from hfkv.experts.projection import Projection
from hfkv.experts.weights import ExpertWeights, PlainWeights

E, K, H, I = 3, 2, 40, 48  # noqa: E741 - the letters of docs/reference/shapes.md
FORMS = ("plain", "transposed", "int8", "int4")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weights_of(form: str, outputs: int, inputs: int) -> ExpertWeights:
    matrices = torch.randn(E, outputs, inputs) / inputs**0.5
    if form == "plain":
        return PlainWeights(matrices.to(DEVICE))
    if form == "transposed":
        return PlainWeights(matrices.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE))
    weights = CODECS[form]((E, outputs, inputs), torch.float32, torch.device("cpu"))
    weights.write_all(matrices)
    return weights.to(DEVICE, torch.float32)


def layer(has_gate: bool, has_norm: bool) -> Any:
    norm = nn.LayerNorm(H, elementwise_affine=False) if has_norm else None
    return SimpleNamespace(
        has_gate=has_gate,
        has_post_expert_norm=has_norm,
        _apply_gate=lambda x: F.silu(x.chunk(2, -1)[0]) * (x.chunk(2, -1)[1] + 1),
        act_fn=F.gelu,
        post_expert_norm=norm,
    )


def portable(weights: ExpertWeights) -> ExpertWeights:
    """As a GPU holds them: a CPU's own order of nibbles is not what kernels read."""
    if weights.form == "int4" and weights.device.type == "cpu":
        weights.nibbles = weights.portable_planes()["nibbles"]  # type: ignore[attr-defined]
    return weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_layers_are_those_of_experts_one_by_one(form: str, num_tokens: int) -> None:
    for has_gate, has_bias, has_norm, num_adapters in ((True, False, False, 1), (False, True, True, 0)):
        module = layer(has_gate, has_norm)
        shapes = (2 * I if has_gate else I, H), (H, I)
        projections = [
            Projection(
                weights_of(form, *shape),
                torch.randn(E, shape[0], device=DEVICE) if has_bias else None,
                tuple(
                    Factors(torch.randn(E, 4, shape[1], device=DEVICE), torch.randn(E, shape[0], 4, device=DEVICE), 0.3)
                    for _ in range(num_adapters)
                ),
                is_trained=False,
            )
            for shape in shapes
        ]
        x = torch.randn(num_tokens, H, device=DEVICE)
        index = torch.rand(num_tokens, E + 1, device=DEVICE).topk(K).indices  # E is another process's
        top = torch.rand(num_tokens, K, device=DEVICE).masked_fill(index == E, 0.0)
        with torch.no_grad():
            expected = run_by_expert(module, tuple(projections), x, index, top)  # type: ignore[arg-type]
            for projection in projections:
                portable(projection.weights)
            out = run_grouped(module, tuple(projections), x, index, top)  # type: ignore[arg-type]
        assert out.shape == x.shape
        assert torch.allclose(out, expected, atol=2e-5 * max(1.0, float(expected.abs().max()) if num_tokens else 1.0))
