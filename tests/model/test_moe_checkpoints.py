"""Models with experts in few bytes, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

import hfkv
from hfkv.experts.families import experts_of
from hfkv.experts.int8 import Int8Weights
from hfkv.experts.stack import ExpertStack
from tests.moe_models import logits, model_of, relative
from tests.tiny import llama


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_planes_of_a_file_may_begin_anywhere(form: str, tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path / "plain")
    # Not model.bfloat16(), which rounds the rotary frequencies too.
    model = MixtralForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    with hfkv.patch(model, moe=form):
        model.save_pretrained(tmp_path)
        expected = logits(model)
    loaded = type(model).from_pretrained(tmp_path)
    logits(loaded)
    hfkv.patch(loaded, moe="auto")  # in bfloat16 another attention rounds otherwise
    assert relative(logits(loaded), expected) <= 1e-5
    codes = torch.zeros(2 * 64 * 64 + 64, dtype=torch.int8)
    for offset in (1, 8, 24):
        planes = {"int8": codes[offset : offset + 2 * 64 * 64].view(2, 64, 64), "scales": torch.ones(2, 64)}
        weights = Int8Weights.of_planes(planes, torch.bfloat16)
        assert not weights.linear(torch.randn(9, 64).bfloat16(), 1).any()


@pytest.mark.parametrize("missing", ["gate_up_proj.scales", "down_proj.int8"])
@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_an_incomplete_checkpoint_is_refused(missing: str, device_map: str | None, tmp_path: Path) -> None:
    model = model_of("mixtral")
    with hfkv.patch(model, moe="int8"):
        expected = logits(model)
        model.save_pretrained(tmp_path)
    whole = type(model).from_pretrained(tmp_path, device_map=device_map)
    assert relative(logits(whole), expected) <= 1e-5
    file = tmp_path / "model.safetensors"
    planes = load_file(file)
    name = next(name for name in planes if name.endswith(f"hfkv_{missing}"))
    save_file({key: value for key, value in planes.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not whole in this checkpoint.*no " + missing.split(".")[1]):
        type(model).from_pretrained(tmp_path, device_map=device_map)


def test_what_is_given_is_saved(tmp_path: Path) -> None:
    for form in ("auto", "int8"):
        model = model_of("mixtral")
        hfkv.patch(model, moe=form)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["model.embed_tokens.weight"] = torch.zeros_like(state["model.embed_tokens.weight"])
        model.save_pretrained(tmp_path / form, True, state)
        loaded = type(model).from_pretrained(tmp_path / form)
        assert not loaded.model.embed_tokens.weight.any()
        assert (type(experts_of(loaded)["model.layers.0.mlp.experts"].down_proj) is ExpertStack) == (form == "int8")


def test_few_bytes_are_loaded_into_few_bytes_as_they_are() -> None:
    model, twin = model_of("mixtral"), model_of("mixtral")
    for one in (model, twin):
        hfkv.patch(one, moe="int4")
    for parameter in twin.parameters():
        if not isinstance(parameter, ExpertStack):
            parameter.data.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))


def test_upcycled_models_are_saved_plain_and_can_be_offloaded(tmp_path: Path) -> None:
    from hfkv.patches.upcycle import load_upcycled

    model = hfkv.upcycle(llama(), 4)
    expected = logits(model)
    with hfkv.patch(model, moe="int8"):
        model.save_pretrained(tmp_path / "saved")
        assert relative(logits(load_upcycled(tmp_path / "saved")), logits(model)) <= 1e-5
    other = hfkv.upcycle(llama(), 4)
    other.load_state_dict(model.state_dict())
    expected = logits(other)
    with hfkv.patch(other, moe=hfkv.MoEConfig(offload=True, path=str(tmp_path / "experts"))):
        assert relative(logits(other), expected) <= 1e-5
