"""What is recorded of routers, on our layers and on transformers' own."""

import logging

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hfkv.sparse_moe.layer import SparseMoE
from hfkv.sparse_moe.stats import LayerRouting, routing_stats


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            pad_token_id=0,
        )
    ).eval()


def collapse(layer):
    """Every token to experts 0 and 1: their logits are the sum of the hidden state's positive and negative parts."""
    with torch.no_grad():
        layer.gate.weight.zero_()
    return layer


def test_numbers_of_a_known_load():
    even = LayerRouting("a", (0.25,) * 4, 100, 2, 0)
    assert (even.entropy, even.imbalance, even.dead, even.spread) == (pytest.approx(1), 1, (), pytest.approx(1))
    assert not even.collapsed
    two = LayerRouting("a", (0.5, 0.5, 0.0, 0.0), 100, 2, 0)
    assert (two.entropy, two.imbalance, two.dead, two.spread) == (pytest.approx(0.5), 2, (2, 3), pytest.approx(0))
    assert two.collapsed
    assert not LayerRouting("a", (0.5, 0.5, 0.0, 0.0), 7, 2, 0).collapsed  # 14 choices tell nothing
    assert not LayerRouting("a", (0.25,) * 4, 100, 4, 0).collapsed  # all experts, always


def test_a_stock_model_is_recorded_and_left_as_it_was():
    model = mixtral()
    ids = torch.randint(1, 99, (2, 11))
    expected = model(ids).logits
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    chosen = []
    taps = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
        for layer in model.model.layers
    ]
    with routing_stats(model) as stats:
        assert model(ids).logits.equal(expected)
    for tap in taps:
        tap.remove()
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    model(ids)
    assert [layer.name for layer in stats.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for layer, index in zip(stats.layers, chosen, strict=True):
        counts = torch.bincount(index.flatten(), minlength=4) / index.numel()
        assert layer.load == pytest.approx(counts.tolist())
        assert (layer.num_tokens, layer.top_k, layer.num_dropped) == (22, 2, 0)


def test_padding_is_left_out_with_and_without_a_cache():
    model = mixtral()
    ids = torch.randint(1, 99, (2, 11))
    mask = torch.ones_like(ids)
    ids[0, :4] = mask[0, :4] = 0
    with routing_stats(model) as stats:
        model(ids, attention_mask=mask)
    assert [layer.num_tokens for layer in stats.layers] == [18, 18]
    stats.reset()
    assert stats.layers == []
    with stats:
        model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert [layer.num_tokens for layer in stats.layers] == [18 + 2 * 3] * 2


def test_dropped_slots_and_masks_of_a_layer_are_counted():
    torch.manual_seed(0)
    layer = collapse(SparseMoE(16, 8, 4, capacity_factor=1.0))
    x = torch.randn(40, 16)
    with routing_stats(layer) as stats:
        layer(x)
    # Two experts get all 80 slots and take 20 each.
    assert stats.layers[0].num_dropped == 40
    stats.reset()
    with stats:
        layer(x, token_mask=torch.arange(40) < 20)
    assert (stats.layers[0].num_tokens, stats.layers[0].num_dropped) == (20, 20)


def test_a_collapsed_router_is_named(caplog):
    torch.manual_seed(0)
    model = torch.nn.Sequential(SparseMoE(16, 8, 8), collapse(SparseMoE(16, 8, 8)))
    with caplog.at_level(logging.WARNING, "hfkv"), routing_stats(model) as stats:
        model(torch.randn(200, 16))
    assert [layer.collapsed for layer in stats.layers] == [False, True]
    assert len(stats.layers[1].dead) == 6
    assert "collapsed routers in 1 of 2 layers: 1:" in caplog.text
    printed = " ".join(str(stats).split())
    assert "COLLAPSED" in printed
    assert "collapsed routers in 1 of 2 layers" in printed


def test_healthy_routers_are_not_warned_of(caplog):
    torch.manual_seed(0)
    layer = SparseMoE(16, 8, 8)
    with caplog.at_level(logging.WARNING, "hfkv"), routing_stats(layer) as stats:
        layer(torch.randn(200, 16))
    assert caplog.text == ""
    assert "no collapsed router in 1 layers" in stats.verdict


def test_soft_routing_is_judged_by_its_weights():
    torch.manual_seed(0)
    layer = SparseMoE(16, 8, 4, routing="soft")
    x = torch.randn(100, 16)
    with routing_stats(layer) as stats:
        layer(x)
    expected = layer.last_forward.routed.weights.mean(0)
    assert stats.layers[0].load == pytest.approx(expected.tolist(), rel=1e-4)
    x[:, 0] = 1.0
    with torch.no_grad():
        layer.gate.weight[0, 0] = 50.0
    stats.reset()
    with stats:
        layer(x)
    assert stats.layers[0].collapsed


def test_many_experts_are_summed_up_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = torch.nn.Sequential(SparseMoE(16, 8, 32), SparseMoE(16, 8, 4))
    with routing_stats(model) as stats:
        model(torch.randn(200, 16))
    assert "…" in str(stats)
    picture = stats.plot(tmp_path / "new" / "loads.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_recorded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to record"):
        routing_stats(torch.nn.Linear(2, 2))
    layer = SparseMoE(16, 8, 4)
    stats = routing_stats(layer)
    assert stats.verdict == "no expert has run yet"
    with pytest.raises(RuntimeError, match="nothing to draw"):
        stats.plot(tmp_path / "loads.png")
    with stats, pytest.raises(RuntimeError, match="already"):
        stats.__enter__()
    assert not layer.experts._forward_pre_hooks
