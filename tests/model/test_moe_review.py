"""What a review of the experts found to be wrong, once."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralForCausalLM

import hfkv
from hfkv.experts.families import experts_of, weight_names
from hfkv.experts.int4 import Int4Weights
from hfkv.experts.int8 import Int8Weights
from hfkv.experts.stack import ExpertStack
from tests.model.test_patch_moe import IDS, logits, model_of, relative
from tests.tiny import llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_packed_experts_in_another_dtype_still_refuse_to_be_trained(dtype: torch.dtype) -> None:
    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    model.to(dtype).train()
    loss = model(IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="for inference, and get no gradients"):
        loss.backward()


def test_files_of_other_weights_are_refused_whatever_differs(tmp_path: Path) -> None:
    moe = hfkv.MoEConfig(offload=True, path=str(tmp_path))
    hfkv.patch(model_of("mixtral"), moe=moe).undo()
    other = model_of("mixtral")
    experts = next(iter(experts_of(other).values()))
    experts.down_proj.data[3, 0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        hfkv.patch(other, moe=moe)


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


def test_a_patched_model_can_be_let_go_of() -> None:
    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_no_expert_but_the_named_one_is_written() -> None:
    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    stack = next(iter(experts_of(model).values())).down_proj
    for index in (4, -5):
        with pytest.raises(IndexError, match="there are 4 experts"):
            stack.data[index] = torch.zeros_like(stack[0])
        with pytest.raises(IndexError):
            torch.select(stack, 0, index)


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


def test_undo_of_offload_leaves_what_is_trained(tmp_path: Path) -> None:
    model = model_of("mixtral")
    with hfkv.patch(model, moe=hfkv.MoEConfig(offload=True, path=str(tmp_path / "experts"))):
        expected = logits(model)
        with pytest.raises(RuntimeError, match="get no gradients"):
            model(IDS, labels=IDS).loss.backward()
        model.save_pretrained(tmp_path / "saved")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert relative(logits(type(model).from_pretrained(tmp_path / "saved")), expected) <= 1e-5


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_int4_is_read_back_without_a_product() -> None:
    weights = Int4Weights((1, 256, 128), torch.bfloat16, torch.device("cpu"))
    weights.write(0, torch.randn(256, 128))
    with Operations() as operations:
        weights.decode(0)
    # It took seconds for a large matrix, by a product with the identity in float32.
    assert operations.names
    assert not [name for name in operations.names if "mm" in name]


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


def test_few_bytes_are_loaded_into_few_bytes_as_they_are() -> None:
    model, twin = model_of("mixtral"), model_of("mixtral")
    for one in (model, twin):
        hfkv.patch(one, moe="int4")
    for parameter in twin.parameters():
        if not isinstance(parameter, ExpertStack):
            parameter.data.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))


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


def test_accelerate_after_the_patch_is_refused_with_the_remedy() -> None:
    from accelerate import cpu_offload

    model = model_of("mixtral")
    hfkv.patch(model, moe="auto")
    assert all(isinstance(getattr(e, n), ExpertStack) for e in experts_of(model).values() for n in weight_names(e))
    with pytest.raises(TypeError, match=r"do that first, then hfkv\.patch"):
        cpu_offload(model)
