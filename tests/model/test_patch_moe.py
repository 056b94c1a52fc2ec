"""``patch(model, moe=...)`` on whole models: the same text, less memory, and everything back."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import hfkv
from hfkv.experts.checkpoint import ExpertsConfig
from hfkv.experts.families import experts_of, others_of, weight_names
from hfkv.experts.stack import ExpertStack
from tests.moe_models import IDS, MASK, logits, model_of, relative
from tests.tiny import llama

FORMS = ("auto", "int8", "int4")


def text(model: Any) -> list[list[int]]:
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False).tolist()


@pytest.mark.smoke
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "nemotron_h"])
def test_auto_says_the_same_and_undo_leaves_no_trace(model_type: str) -> None:
    model = model_of(model_type)
    expected, expected_text, stock = logits(model), text(model), copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    configs = [module.config for module in experts_of(model).values()]
    handle = hfkv.patch(model, moe="auto")
    assert handle.moe is not None
    assert {swap.form for swap in handle.moe.swapped} == {"packed"}
    assert handle.moe.bytes_after == handle.moe.bytes_before > 0
    assert relative(logits(model), expected) <= 1e-5
    assert text(model) == expected_text
    handle.undo()
    assert torch.equal(logits(model), logits(stock))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), stock.parameters(), strict=True))
    assert all(module.config is config for module, config in zip(experts_of(model).values(), configs, strict=True))
    assert vars(model).keys() == vars(stock).keys()
    assert model.config._experts_implementation == stock.config._experts_implementation


def test_another_model_with_the_same_config_keeps_its_experts() -> None:
    model = model_of("mixtral")
    other = type(model)(model.config)
    with hfkv.patch(model, moe="auto"):
        assert model.config._experts_implementation == "hfkv"
        assert other.config._experts_implementation != "hfkv"
        assert next(iter(experts_of(other).values())).config._experts_implementation != "hfkv"


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_few_bytes_are_really_few(form: str, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("mixtral")
    expected = logits(model)
    weights = [getattr(e, name) for e in experts_of(model).values() for name in weight_names(e)]
    sizes = [weight.untyped_storage().nbytes() for weight in weights]
    handle = hfkv.patch(model, moe=form)
    assert handle.moe is not None
    gc.collect()
    # What held the numbers before holds none, whoever still has it in hand.
    assert [weight.untyped_storage().nbytes() for weight in weights] == [0] * len(weights)
    assert handle.moe.bytes_before == sum(sizes)
    held = {id(p): p.weights.nbytes() for p in model.parameters() if isinstance(p, ExpertStack)}
    assert handle.moe.bytes_after == sum(held.values()) < 0.35 * sum(sizes)
    lossy = logits(model)
    assert not torch.equal(lossy, expected)
    # What the model says is what stock experts say with the decoded numbers.
    stock = model_of("mixtral")
    for ours, theirs in zip(experts_of(model).values(), experts_of(stock).values(), strict=True):
        for name in weight_names(ours):
            getattr(theirs, name).data = getattr(ours, name).plain()
    assert relative(lossy, logits(stock)) <= 1e-5
    handle.undo()
    assert f"weights that were {form}" in caplog.text
    assert relative(logits(model), lossy) <= 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded(form: str, tmp_path: Path) -> None:
    model = model_of("qwen2_moe")
    with hfkv.patch(model, moe=form) as handle:
        expected = logits(model)
        model.save_pretrained(tmp_path)
        size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        loaded = type(model).from_pretrained(tmp_path)
        assert relative(logits(loaded), expected) <= 1e-5
        of_experts = next(iter(experts_of(loaded).values())).down_proj
        if form == "auto":
            assert not isinstance(of_experts, ExpertStack)
        else:
            assert isinstance(of_experts, ExpertStack)
            assert of_experts.weights.form == form
            assert of_experts.weights.nbytes() * 3 < of_experts.numel() * 4
            assert handle.moe is not None
            assert size < sum(p.numel() * 4 for p in model.parameters()) - 0.6 * handle.moe.bytes_before
            # Saved again as it was loaded, and patched on top.
            loaded.save_pretrained(tmp_path / "again")
            again = type(model).from_pretrained(tmp_path / "again")
            assert torch.equal(logits(again), logits(loaded))
            hfkv.patch(again, moe="auto")
            assert relative(logits(again), expected) <= 1e-5


def test_experts_of_a_saved_model_are_not_written_anew(tmp_path: Path) -> None:
    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "plain")
    with hfkv.patch(model, moe="int8"):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is int8 already"):
        hfkv.patch(loaded, moe="int4")
    with pytest.raises(ValueError, match="once a model is loaded"):
        type(model).from_pretrained(tmp_path / "plain", quantization_config=ExpertsConfig("int8"))


@pytest.mark.parametrize("form", FORMS)
def test_a_deep_copy_is_patched_and_apart(form: str) -> None:
    model = model_of("mixtral")
    hfkv.patch(model, moe=form)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    hfkv.unpatch(twin)
    assert not any(isinstance(p, ExpertStack) for p in twin.parameters())
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model), expected)


def test_a_backward_pass_into_packed_experts_raises() -> None:
    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    loss = model(IDS, labels=IDS).loss  # gradients are enabled: a forward is no reason to raise
    with pytest.raises(RuntimeError, match=r"packed, for inference.*unpatch"):
        loss.backward()
    for experts in experts_of(model).values():
        experts.requires_grad_(False)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.any()


def test_a_model_in_training_mode_is_trained() -> None:
    model = model_of("mixtral").train()
    handle = hfkv.patch(model, moe="auto")
    assert handle.moe is not None
    assert {swap.form for swap in handle.moe.swapped} == {"plain"}
    assert "training mode" in str(handle.moe)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for e in experts_of(model).values() for p in e.parameters())


def switch_transformers() -> Any:
    config = SwitchTransformersConfig(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_heads=4,
        num_layers=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
    )
    return SwitchTransformersForConditionalGeneration(config)


@pytest.mark.parametrize("model_type", ["dbrx", "jetmoe", "llama4_text", "longcat_flash", "switch_transformers"])
def test_families_outside_the_interface_are_refused_by_name(model_type: str) -> None:
    model = switch_transformers() if model_type == "switch_transformers" else model_of(model_type)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"(?s){model_type}.*does not go through transformers' experts interface"):
        hfkv.patch(model, moe="auto")
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert "hfkv" not in vars(model)
    assert others_of(model)


def test_a_dense_model_is_pointed_to_upcycling() -> None:
    with pytest.raises(ValueError, match=r"llama has no experts; hfkv.upcycle"):
        hfkv.patch(llama(), moe="auto")


def test_weights_quantised_by_others_and_put_away_ones_are_refused() -> None:
    model = model_of("mixtral")
    experts = model.model.layers[1].mlp.experts
    down = experts.down_proj
    experts.down_proj = nn.Parameter(down.detach().to("meta"))
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj is put away by accelerate"):
        hfkv.patch(model, moe="int8")
    experts.down_proj = nn.Parameter(down.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="float8_e4m3fn; moe='int8' takes"):
        hfkv.patch(model, moe="int8")
    assert not any(isinstance(p, ExpertStack) for p in model.parameters())


def test_the_report_names_what_was_done_and_why() -> None:
    model = model_of("deepseek_v3")
    handle = hfkv.patch(model, moe="int8")
    said = str(handle.moe)
    assert "DeepseekV3Experts" in said
    assert "int8" in said
    assert "as asked for" in said
    assert "experts of" in repr(handle)


def test_the_implementation_can_be_named_without_a_patch(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="hfkv")
    assert loaded.config._experts_implementation == "hfkv"
    assert relative(logits(loaded), expected) <= 1e-5
    loaded.set_experts_implementation("eager")
    assert relative(logits(loaded), expected) <= 1e-5


def test_a_cache_goes_on_after_the_patch_of_experts_and_prefixes_are_shared() -> None:
    model = model_of("mixtral")
    expected = text(model)
    handle = hfkv.patch(model, kv="int8+paged+page_size:2+reuse", moe="auto")
    first, second = text(model), text(model)
    assert first == second
    assert handle.reuse_stats().hits > 0
    assert len(first[0]) == len(expected[0])


@pytest.mark.slow
def test_compiling_it_gives_the_same() -> None:
    model = model_of("mixtral")
    expected = logits(model)
    for moe in (None, "auto"):
        patched = copy.deepcopy(model)
        if moe is None:
            patched.set_experts_implementation("hfkv")
        else:
            hfkv.patch(patched, moe=moe)
        compiled = torch.compile(patched, backend="eager", fullgraph=moe is None)
        assert relative(logits(compiled), expected) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_offloaded_experts_say_the_same(form: str, tmp_path: Path) -> None:
    resident, offloaded = model_of("mixtral"), model_of("mixtral")
    hfkv.patch(resident, moe=form)
    codec = "none" if form == "auto" else form
    with pytest.raises(ValueError, match="host memory is the device's own"):
        hfkv.patch(offloaded, moe=f"{form}+offload")
    assert not any(isinstance(p, ExpertStack) for p in offloaded.parameters())
    with pytest.raises(ValueError, match="leave one of them out"):
        hfkv.patch(offloaded, moe=f"{form}+offload", graphs=True)
    stock = logits(offloaded)
    handle = hfkv.patch(offloaded, moe=hfkv.MoEConfig(codec, offload=True, path=str(tmp_path)))
    assert handle.moe is not None
    assert {swap.form for swap in handle.moe.swapped} == {f"offloaded {'plain' if form == 'auto' else form}"}
    assert relative(logits(offloaded), logits(resident)) <= 1e-6
    assert text(offloaded) == text(resident)
    assert handle.moe.trace is not None
    assert 0 < handle.moe.trace.hit_rate() < 1
    expected = logits(offloaded)
    handle.undo()
    assert relative(logits(offloaded), stock if form == "auto" else expected) <= 1e-5


def test_experts_on_disk_by_accelerate_are_read_where_they_are(tmp_path: Path) -> None:
    away = model_of("gpt_oss")
    expected = logits(away)
    disk_offload(away, str(tmp_path))
    assert relative(logits(away), expected) <= 1e-5
    handle = hfkv.patch(away, moe="offload")
    assert relative(logits(away), expected) <= 1e-5
    handle.undo()
    assert next(iter(experts_of(away).values())).down_proj.device.type == "meta"
    assert relative(logits(away), expected) <= 1e-5
