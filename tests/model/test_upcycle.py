"""Upcycled models start out equal to the dense one, train, generate, save and load; what cannot be is refused."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.activations import GELUActivation

import hfkv
from hfkv.patches.upcycle import chosen_layers, load_upcycled, upcycle
from hfkv.sparse_moe.layer import SparseMoE
from hfkv.sparse_moe.model_losses import moe_losses
from hfkv.sparse_moe.stats import routing_stats
from tests.tiny import greedy, prompt

# PEFT 0.21 itself reads the attribute that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FIELDS = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def dense(kind, **changes):
    config = getattr(transformers, f"{kind}Config")(**{**FIELDS, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.tie_weights()
    return model


def logits(model, **changes):
    with torch.no_grad():
        return model(**prompt(), **changes).logits


def assert_equal_logits(model, expected):
    """Within 1e-5 of the largest logit."""
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


KINDS = [
    ("Llama", {}),
    ("Llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    ("Mistral", {"sliding_window": 4}),
    ("Qwen2", {}),
    ("Qwen3", {}),
    ("Gemma", {}),
    ("Gemma2", {}),
    ("Phi3", {}),
    ("Phi", {"num_key_value_heads": 4}),
    ("GPTNeoX", {}),
]


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=[f"{kind}{'+' if changes else ''}" for kind, changes in KINDS])
def test_logits_start_out_equal_and_every_expert_and_router_learns(kind, changes):
    model = dense(kind, **changes)
    expected = logits(model)
    assert upcycle(model, 4, 2) is model
    layers = [module for module in model.modules() if isinstance(module, SparseMoE)]
    assert len(layers) == 3
    assert not any(layer.training for layer in layers)
    assert_equal_logits(model, expected)

    model.train()
    inputs = prompt(4, 40)
    with routing_stats(model) as stats:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    (loss + moe_losses(model).total).backward()
    for layer, routing in zip(layers, stats.layers, strict=True):
        assert layer.gate.weight.grad.abs().sum() > 0
        for stack in layer.experts.parameters():
            if stack.ndim == 3:
                assert all((stack.grad[e].abs().sum() > 0) == (e not in routing.dead) for e in range(4))


@pytest.mark.parametrize(
    "options", [{"gate": "sigmoid"}, {"routing": "soft"}, {"balance": "bias"}, {"router_std": 0.5}]
)
def test_any_weights_that_sum_to_one_start_out_equal(options):
    model = dense("Llama")
    expected = logits(model)
    assert_equal_logits(upcycle(model, 4, 3, **options), expected)


def test_noise_sets_the_copies_apart_but_the_first():
    model = dense("Llama")
    expected = logits(model)
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    upcycle(model, 4, noise=0.1)
    stack = model.model.layers[0].mlp.experts.down_proj
    assert stack[0].equal(weight)
    assert (stack[1] - weight).std().item() == pytest.approx(0.1 * weight.std().item(), rel=0.1)
    assert (logits(model) - expected).abs().max() > 1e-3


def test_generation_goes_on_as_before():
    model = dense("Llama")
    expected = greedy(model, prompt())
    upcycle(model, 4)
    assert greedy(model, prompt()).equal(expected)
    with hfkv.patch(model):
        assert greedy(model, prompt()).equal(expected)


def test_dtype_mode_ties_and_frozen_weights_are_kept():
    model = dense("Llama", tie_word_embeddings=True).to(torch.bfloat16).train()
    model.model.layers[1].mlp.requires_grad_(False)
    upcycle(model, 4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.training
    assert model.model.layers[0].mlp.experts.down_proj.requires_grad
    assert not model.model.layers[1].mlp.experts.down_proj.requires_grad
    assert model.model.layers[1].mlp.gate.weight.requires_grad


def test_a_deep_copy_is_a_model_of_its_own():
    model = upcycle(dense("Llama"), 4)
    model(**prompt()).logits.sum().backward()
    other = copy.deepcopy(model)
    torch.testing.assert_close(logits(other), logits(model))
    other.model.layers[0].mlp.experts_implementation = "eager"
    assert model.model.layers[0].mlp.experts_implementation == "grouped_mm"


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_is_the_same(tmp_path, tied):
    model = dense("Qwen3", tie_word_embeddings=tied)
    upcycle(model, 4, layers="every:2", balance="bias", bias_update_rate=0.01)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    loaded = load_upcycled(tmp_path)
    assert logits(loaded).equal(logits(model))
    assert loaded.model.layers[1].mlp.bias_update_rate == 0.01
    assert type(loaded.model.layers[0].mlp).__name__ == "Qwen3MLP"
    assert loaded.config.hfkv_upcycle == model.config.hfkv_upcycle
    assert loaded.generation_config.max_new_tokens == 7
    assert load_upcycled(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def test_a_dense_folder_and_missing_weights_are_refused(tmp_path):
    model = dense("Llama")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no entry 'hfkv_upcycle'"):
        load_upcycled(tmp_path / "dense")
    upcycle(model, 4).config.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"missing .*experts"):
        load_upcycled(tmp_path / "dense")


@pytest.mark.parametrize(
    ("kind", "to", "changes"),
    [
        ("Llama", "mixtral", {"tie_word_embeddings": True}),
        ("Llama", "mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
        ("Mistral", "mixtral", {"sliding_window": 4}),
        ("Qwen3", "qwen3_moe", {}),
        ("Qwen3", "qwen3_moe", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_a_stock_model_starts_out_equal_and_is_stock(tmp_path, kind, to, changes):
    model = dense(kind, **changes)
    expected = logits(model)
    stock = upcycle(model, 4, 2, to=to, balance_coef=0.02)
    assert type(stock).__module__.startswith("transformers.")
    assert stock.config.model_type == to
    assert stock.config.router_aux_loss_coef == 0.02
    assert_equal_logits(stock, expected)
    assert logits(model).equal(expected)
    assert not {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in stock.parameters()}
    assert greedy(stock, prompt()).equal(greedy(model, prompt()))
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(stock)
    torch.testing.assert_close(logits(loaded), logits(stock))
    inputs = prompt()
    assert loaded(**inputs, labels=inputs["input_ids"], output_router_logits=True).aux_loss > 0


def test_a_stock_qwen3_moe_may_keep_dense_layers():
    model = dense("Qwen3")
    expected = logits(model)
    stock = upcycle(model, 4, to="qwen3_moe", layers=[0, -1])
    assert stock.config.mlp_only_layers == [1]
    assert_equal_logits(stock, expected)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2, 3]),
        (slice(1, None), [1, 2, 3]),
        ([-1, 0], [0, 3]),
        ("every:2", [1, 3]),
        ("every:1", [0, 1, 2, 3]),
    ],
)
def test_layers_are_chosen(layers, expected):
    assert chosen_layers(layers, 4) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 1}, ValueError, "the router gets no gradient"),
        ({"top_k": 9}, ValueError, "top_k takes 1 to num_experts"),
        ({"layers": [7]}, ValueError, r"0 to 2; got \[7\]"),
        ({"layers": "every:9"}, ValueError, "got none"),
        ({"layers": "odd"}, ValueError, "every:N"),
        ({"layers": 3}, TypeError, "every:N"),
        ({"noise": -1.0}, ValueError, "noise takes 0 or more"),
        ({"routing": "expert_choice"}, NotImplementedError, "not causal"),
        ({"to": "olmoe"}, ValueError, "'mixtral', 'qwen3_moe'; got 'olmoe'"),
        ({"to": "qwen3_moe"}, ValueError, "takes Qwen3ForCausalLM, got LlamaForCausalLM"),
        ({"to": "mixtral", "layers": [0]}, ValueError, "every layer is a mixture"),
        ({"to": "mixtral", "balance": "bias"}, ValueError, "leave out balance"),
        ({"capacity_factor": 1.0}, TypeError, "capacity_factor"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_and_the_model_left_alone(options, error, message):
    model = dense("Llama")
    expected = logits(model)
    with pytest.raises(error, match=message):
        upcycle(model, **options)
    assert logits(model).equal(expected)
    assert not hasattr(model.config, "hfkv_upcycle")


def test_models_in_another_state_are_refused():
    model = dense("Llama")
    with hfkv.patch(model), pytest.raises(RuntimeError, match=r"hfkv\.unpatch\(model\)"):
        upcycle(model)
    upcycle(model, 4, layers=[0])
    with pytest.raises(RuntimeError, match="SparseMoE layers already"):
        upcycle(model, 4, layers=[1])
    with pytest.raises(TypeError, match="takes a transformers model, got Linear"):
        upcycle(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match="meta device"):
        upcycle(empty)
    spread = dense("Llama")
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(ValueError, match="spread over 0, cpu by a device_map"):
        upcycle(spread)
    mixture = upcycle(dense("Llama"), 4, to="mixtral")
    with pytest.raises(ValueError, match="layer 0 of MixtralForCausalLM cannot be upcycled"):
        upcycle(mixture)
    with pytest.raises(ValueError, match="no biases"):
        upcycle(dense("Llama", mlp_bias=True), to="mixtral")


def test_adapters_and_quantised_maps_are_refused():
    peft = pytest.importorskip("peft")
    model = dense("Llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    for given in (adapted, model):
        with pytest.raises((TypeError, ValueError), match="merge_and_unload"):
            upcycle(given)
    model = dense("Llama")

    class Linear8bit(torch.nn.Linear):
        pass

    Linear8bit.__module__ = "bitsandbytes.nn.modules"
    model.model.layers[0].mlp.up_proj = Linear8bit(64, 48, bias=False)
    with pytest.raises(ValueError, match="bitsandbytes Linear8bit, whose weight cannot be copied"):
        upcycle(model)


def test_a_module_that_does_more_than_its_form_is_found_out():
    model = dense("Llama")
    mlp = model.model.layers[2].mlp
    mlp.act_fn = GELUActivation()
    mlp.forward = lambda x, mlp=mlp: 2 * type(mlp).forward(mlp, x)
    with pytest.raises(RuntimeError, match="layer 2: a mixture of copies of mlp"):
        upcycle(model)
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_lora_on_the_experts_trains_every_tensor():
    peft = pytest.importorskip("peft")
    model = upcycle(dense("Llama", num_hidden_layers=1), 4)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=names))
    expected = logits(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    inputs = prompt(4, 40)
    adapted.train()
    for _ in range(2):  # lora_A moves once lora_B has
        optimizer.zero_grad()
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    lora = [parameter for name, parameter in adapted.named_parameters() if "lora" in name]
    assert len(lora) == 4
    assert all(parameter.grad.abs().sum() > 0 for parameter in lora)
    assert (logits(adapted.eval()) - expected).abs().max() > 0
    with routing_stats(adapted) as stats:
        logits(adapted)
    assert [layer.num_tokens for layer in stats.layers] == [18]
    assert "experts_implementation='grouped_mm'" in repr(adapted)
