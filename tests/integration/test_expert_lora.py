"""PEFT's adapters on experts: never multiplied out, and what they compute is PEFT's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hfkv
from hfkv.experts.adapters import Factors
from hfkv.experts.families import experts_of, weight_names
from tests.moe_models import IDS, logits, model_of, relative

# PEFT 0.21 itself reads the attribute that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Layouts: outputs first, inputs first with biases, without a gate.
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h")
FORMS = ("auto", "int8")


def config_of(model: Any, rank: int = 4) -> LoraConfig:
    (experts, *_) = experts_of(model).values()
    names = [f"experts.{name}" for name in weight_names(experts)]
    return LoraConfig(r=rank, lora_alpha=8, target_modules=[], target_parameters=names)


def fill(adapted: PeftModel, adapter: str, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            torch.nn.init.normal_(parameter, std=0.1)


def adapt(model: Any) -> PeftModel:
    adapted = get_peft_model(model, config_of(model))
    fill(adapted, "default", 1)
    return adapted.eval()


def gradients(adapted: Any) -> dict[str, torch.Tensor]:
    adapted.zero_grad()
    adapted(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-7).item())


@pytest.fixture
def no_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import ParamWrapper

    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("an adapter was multiplied out")

    monkeypatch.setattr(ParamWrapper, "get_delta_weight", refuse)
    monkeypatch.setattr(torch, "baddbmm", refuse)


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_pefts_own(family: str) -> None:
    model = model_of(family)
    stock, plain = adapt(copy.deepcopy(model)), model(IDS).logits
    expected, expected_gradients = stock(IDS).logits, gradients(stock)
    assert not close(expected, plain)
    for first in ("adapter", "patch"):
        ours = copy.deepcopy(model)
        if first == "patch":
            hfkv.patch(ours, moe="auto")
        ours = adapt(ours)
        if first == "adapter":
            hfkv.patch(ours, moe="auto")
        for _ in range(2):  # adapters that come after the patch are known from their second forward on
            assert close(ours(IDS).logits, expected)
        found = gradients(ours)
        assert found.keys() == expected_gradients.keys()
        assert all(close(found[name], expected_gradients[name]) and found[name].any() for name in found)
        with ours.disable_adapter():
            assert close(ours(IDS).logits, plain)


@pytest.mark.usefixtures("no_folding")
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_multiplied_out(form: str) -> None:
    adapted = adapt(model_of("mixtral"))
    hfkv.patch(adapted, moe=form)
    gradients(adapted)
    adapted.generate(IDS, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_switching_adding_and_merging(family: str, form: str) -> None:
    model = model_of(family)
    adapted = adapt(model)
    handle = hfkv.patch(adapted, moe=form)
    # The same base weights, stock: what the patch holds, decoded.
    stock = adapt(copy.deepcopy(model_of(family)))
    for ours, theirs in zip(experts_of(handle.model).values(), experts_of(stock).values(), strict=True):
        for name in weight_names(ours):
            getattr(theirs, name).data = getattr(ours, name).plain()
    for one in (adapted, stock):
        one.add_adapter("other", config_of(model, rank=2))
        fill(one, "other", 2)
    seen = []
    for active in ("default", "other", ["default", "other"]):
        for one in (adapted, stock):
            one.base_model.set_adapter(active)
        seen.append(stock(IDS).logits)
        assert close(adapted(IDS).logits, seen[-1])
    assert not close(seen[0], seen[1])
    if form == "auto":
        adapted.base_model.set_adapter("default")
        adapted.merge_adapter()
        assert close(adapted(IDS).logits, seen[0])
        adapted.unmerge_adapter()
        assert close(adapted(IDS).logits, seen[0])
        merged = adapted.merge_and_unload()
        assert close(merged(IDS).logits, seen[0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_every_factor_moves_in_one_training_step() -> None:
    adapted = adapt(model_of("mixtral")).train()
    handle = hfkv.patch(adapted, moe="int8")
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name}
    handle.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.enable_input_require_grads()
    adapted(IDS.repeat(3, 1), labels=IDS.repeat(3, 1)).loss.backward()
    optimiser.step()
    for name, parameter in adapted.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name


def test_undo_gives_pefts_own_way_back() -> None:
    adapted = adapt(model_of("mixtral"))
    expected = adapted(IDS).logits
    wrappers = [m for m in adapted.modules() if type(m).__name__ == "ParamWrapper"]
    before = [set(vars(wrapper)) for wrapper in wrappers]
    with hfkv.patch(adapted, moe="auto"):
        assert all("_activate_lora" in vars(wrapper) for wrapper in wrappers)
    assert [set(vars(wrapper)) for wrapper in wrappers] == before
    assert torch.equal(adapted(IDS).logits, expected)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_factors_add_their_product(is_transposed: bool) -> None:
    left, right = torch.randn(3, 8, 2), torch.randn(3, 2, 8)
    factors = Factors.of_product(left, right, 0.5, is_transposed)
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    for expert in range(3):
        change = 0.5 * left[expert] @ right[expert]
        expected = y + x @ (change if is_transposed else change.t())
        assert torch.allclose(factors.add_to(y, x, expert), expected, atol=1e-5)


def lora(model: Any) -> Any:
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def test_a_factor_rescaled_behind_torchs_back_is_noticed_for_every_expert() -> None:
    adapted = lora(model_of("mixtral"))
    stock = copy.deepcopy(adapted)
    hfkv.patch(adapted, moe="auto")
    for expert in range(4):
        logits(adapted)
        for one in (adapted, stock):
            wrapper = one.base_model.model.model.layers[0].mlp.experts
            b = wrapper.lora_B["default"].weight
            b.data.view(b.shape[0], -1, 4)[:, :, expert] *= 3
        assert relative(logits(adapted), logits(stock)) <= 1e-5


def test_factors_read_in_inference_mode_serve_a_gradient_later() -> None:
    adapted = lora(model_of("mixtral"))
    hfkv.patch(adapted, moe="int8")
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    with torch.inference_mode():
        adapted(IDS)
    adapted(IDS, labels=IDS).loss.backward()


def test_a_patch_in_inference_mode_can_be_merged_into() -> None:
    adapted = lora(model_of("mixtral"))
    with torch.inference_mode():
        hfkv.patch(adapted, moe="int8")
    adapted.merge_adapter()


def test_adapters_of_a_copy_are_not_multiplied_out() -> None:
    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    adapted = lora(copy.deepcopy(model))
    for _ in range(2):
        logits(adapted)
    wrappers = [module for module in adapted.modules() if type(module).__name__ == "ParamWrapper"]
    assert wrappers
    assert all("_activate_lora" in vars(wrapper) for wrapper in wrappers)
