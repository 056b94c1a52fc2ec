"""The ``"hfkv"`` experts against transformers' own eager ones, family by family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hfkv.experts import by_expert
from hfkv.experts.families import experts_of, weight_names
from tests.moe_models import model_of
from tests.zoo import models

# One for every way of routing, gating, bias, layout and norm that transformers has.
FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
)
TOKENS = (0, 1, 7, 1000)
# Every model type of transformers 5.23 with experts of the interface, as far as a tiny one can be built.
ALL_FAMILIES = """
    afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3
    deepseek_v32 deepseek_v4 diffusion_gemma dots1 dots3_note dots3_note_text ernie4_5_moe ernie4_5_vl_moe
    exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2 inkling2_text
    inkling_text jamba kimi_linear kolibri1 laguna lfm2_moe mellum mimo_v2_flash minimax minimax_m2
    minimax_m3_vl minimax_m3_vl_text mistral4 mistral_large4 mixtral muse_spark nemotron_h olmoe phimoe
    qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp
    qwen4_exp_text solar_open unlimited_ocr zaya
"""


def experts_modules(family: str) -> list[Any]:
    """The first experts module of every tiny model of a family."""
    found = []
    for architecture in models.architectures():
        if architecture.model_type == family:
            modules = experts_of(models.build(architecture))
            found += list(modules.values())[:1]
    assert found, f"{family} has no experts"
    return found


def inputs(experts: Any, num_tokens: int, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = getattr(experts, weight_names(experts)[0])
    hidden = torch.randn(num_tokens, weight.shape[1 if experts.is_transposed else 2])
    scores = torch.rand(num_tokens, len(weight))
    top = scores.softmax(-1).topk(min(top_k, len(weight)))
    return hidden, top.indices, top.values


def run(experts: Any, implementation: str, *given: torch.Tensor) -> torch.Tensor:
    experts.config._experts_implementation_internal = implementation
    return experts(*given)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.numel() or not b.numel():
        return float(a.count_nonzero() + b.count_nonzero())
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def with_gradients(experts: Any, implementation: str, hidden: Any, index: Any, weights: Any) -> list[torch.Tensor]:
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.requires_grad_().zero_grad()
    out = run(experts, implementation, hidden, index, weights)
    if not out.requires_grad:  # eager experts without tokens
        out = out + 0 * hidden.sum()
    # A sum would give every output the same gradient.
    (out * torch.linspace(-1, 1, max(out.numel(), 1))[: out.numel()].view_as(out)).sum().backward()
    of_weights = [parameter.grad for parameter in experts.parameters()]
    zero = [torch.zeros(()) if grad is None else grad for grad in (hidden.grad, weights.grad, *of_weights)]
    return [out.detach(), *zero]


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_eager_experts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    original = by_expert.run_by_expert
    monkeypatch.setattr("hfkv.experts.implementation.run_by_expert", lambda *given: ran.append(1) or original(*given))
    (experts, *_) = experts_modules(family)
    for num_tokens in TOKENS:
        given = inputs(experts, num_tokens)
        with torch.no_grad():
            expected, out = (run(experts, name, *given) for name in ("eager", "hfkv"))
        assert out.shape == expected.shape
        assert relative(out, expected) <= 1e-5
    assert len(ran) == len(TOKENS)


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager_experts(family: str) -> None:
    (experts, *_) = experts_modules(family)
    for num_tokens in TOKENS:
        given = inputs(experts, num_tokens)
        expected, ours = (with_gradients(experts, name, *given) for name in ("eager", "hfkv"))
        for one, other in zip(ours, expected, strict=True):
            assert relative(one, other) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_other_processes_are_skipped(family: str) -> None:
    (experts, *_) = experts_modules(family)
    local = copy.deepcopy(experts)
    for name, parameter in list(local.named_parameters(recurse=False)):
        if len(parameter) == experts.num_experts:
            setattr(local, name, torch.nn.Parameter(parameter[:2].detach().clone()))
    local.num_experts, local._is_expert_parallel = 2, True
    for num_tokens in TOKENS:
        hidden, index, weights = inputs(experts, num_tokens)
        is_elsewhere = index >= 2
        expected = run(experts, "eager", hidden, index, weights.masked_fill(is_elsewhere, 0.0))
        out = run(local, "hfkv", hidden, index.masked_fill(is_elsewhere, 2), weights.masked_fill(is_elsewhere, 0.0))
        assert relative(out, expected) <= 1e-5
    nowhere = torch.full_like(index, 2)
    assert not run(local, "hfkv", hidden, nowhere, torch.zeros_like(weights)).any()


def test_experts_without_tokens_get_zero_gradients() -> None:
    (experts, *_) = experts_modules("mixtral")
    hidden, _, weights = inputs(experts, 5)
    index = torch.tensor([[0, 2]]).expand(5, 2)
    with_gradients(experts, "hfkv", hidden, index, weights)
    for parameter in experts.parameters():
        assert parameter.grad[[1, 3]].count_nonzero() == 0
        assert parameter.grad[[0, 2]].count_nonzero() > 0


def test_a_repeated_forward_gives_the_same_bits() -> None:
    (experts, *_) = experts_modules("qwen3_moe")
    given = inputs(experts, 60)
    with torch.no_grad():
        first = run(experts, "hfkv", *given)
        assert all(torch.equal(run(experts, "hfkv", *given), first) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_stock(dtype: torch.dtype) -> None:
    (experts, *_) = experts_modules("mixtral")
    for num_tokens in (1, 64):
        given = inputs(experts, num_tokens)
        with torch.no_grad():
            exact = run(experts, "eager", *given)
            half = copy.deepcopy(experts).to(dtype)
            rounded = (given[0].to(dtype), given[1], given[2])
            ours, stock = (run(half, name, *rounded).float() for name in ("hfkv", "grouped_mm"))
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 2 * (stock - exact).norm()


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL_FAMILIES.split())
def test_every_family_of_the_interface(family: str) -> None:
    (experts, *_) = experts_modules(family)
    for num_tokens in (0, 1, 50):
        given = inputs(experts, num_tokens)
        expected, ours = (with_gradients(experts, name, *given) for name in ("eager", "hfkv"))
        for one, other in zip(ours, expected, strict=True):
            assert relative(one, other) <= 1e-5


def test_an_index_of_no_expert_is_skipped_whatever_it_is() -> None:
    model = model_of("mixtral")
    experts = next(iter(experts_of(model).values()))
    experts.config._experts_implementation_internal = "hfkv"
    for num_tokens in (1, 5):
        x, weights = torch.randn(num_tokens, 64), torch.rand(num_tokens, 2)
        index = torch.tensor([[1, -1]]).expand(num_tokens, 2)
        both = experts(x, index, weights)
        alone = experts(x, index[:, :1], weights[:, :1])
        assert torch.allclose(both, alone, atol=1e-6)
