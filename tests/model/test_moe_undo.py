"""``patch(model, moe=...)``: what it refuses, and what is left when it is undone or let go of."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

import hfkv
from hfkv.experts.families import experts_of, weight_names
from hfkv.experts.stack import ExpertStack
from tests.moe_models import IDS, logits, model_of, relative


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_packed_experts_in_another_dtype_still_refuse_to_be_trained(dtype: torch.dtype) -> None:
    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    model.to(dtype).train()
    loss = model(IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="for inference, and get no gradients"):
        loss.backward()


def test_a_patched_model_can_be_let_go_of() -> None:
    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_undo_of_offload_leaves_what_is_trained(tmp_path: Path) -> None:
    model = model_of("mixtral")
    with hfkv.patch(model, moe=hfkv.MoEConfig(offload=True, path=str(tmp_path / "experts"))):
        expected = logits(model)
        with pytest.raises(RuntimeError, match="get no gradients"):
            model(IDS, labels=IDS).loss.backward()
        model.save_pretrained(tmp_path / "saved")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert relative(logits(type(model).from_pretrained(tmp_path / "saved")), expected) <= 1e-5


@pytest.mark.parametrize("form", ["auto", "int8"])
def test_layers_that_share_one_matrix(form: str) -> None:
    model = model_of("mixtral")
    first, second = experts_of(model).values()
    second.down_proj = first.down_proj
    expected = logits(model)
    with hfkv.patch(model, moe=form):
        assert first.down_proj is second.down_proj
        assert relative(logits(model), expected) <= (1e-5 if form == "auto" else 0.2)


def test_undo_goes_on_where_something_is_gone_already() -> None:
    model = model_of("mixtral")
    before = set(vars(model))
    hfkv.patch(model, moe="int8")
    del model.config.quantization_config
    hfkv.unpatch(model)
    assert set(vars(model)) == before


def test_double_precision_takes_no_few_bytes() -> None:
    with pytest.raises(ValueError, match=r"is torch\.float64; moe='int8' takes"):
        hfkv.patch(model_of("mixtral").double(), moe="int8")


def test_what_its_owner_chose_since_stays_after_the_patch() -> None:
    model = model_of("mixtral")
    with hfkv.patch(model, moe="auto"):
        model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_accelerate_after_the_patch_is_refused_with_the_remedy() -> None:
    from accelerate import cpu_offload

    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    assert all(isinstance(getattr(e, n), ExpertStack) for e in experts_of(model).values() for n in weight_names(e))
    with pytest.raises(TypeError, match=r"do that first, then hfkv\.patch"):
        cpu_offload(model)
