"""The losses of routers against numbers worked out by hand, and how they are collected."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hfkv.sparse_moe.last_forward import KEPT_LOGITS
from hfkv.sparse_moe.layer import SparseMoE
from hfkv.sparse_moe.losses import load_balancing_loss, router_z_loss
from hfkv.sparse_moe.model_losses import moe_losses
from hfkv.sparse_moe.stats import routing_stats


def test_by_hand():
    # Four tokens, three experts, one each: expert 0 takes three of them.
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.25, 0.25], [0.7, 0.2, 0.1], [0.2, 0.5, 0.3]])
    chosen = torch.tensor([[0], [0], [0], [1]])
    # f = 3/4, 1/4, 0; P = 0.5, 0.3125, 0.1875: 3 × (0.375 + 0.078125)
    assert load_balancing_loss(probabilities, chosen, 3, 1).item() == pytest.approx(1.359375)
    # Without the last token: f = 1, 0, 0; P0 = 0.6
    kept = torch.tensor([1, 1, 1, 0])
    assert load_balancing_loss(probabilities, chosen, 3, 1, kept).item() == pytest.approx(1.8)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_gives_top_k_and_collapse_the_number_of_experts(top_k):
    chosen = torch.stack([(torch.arange(8) + slot) % 8 for slot in range(top_k)], 1)
    assert load_balancing_loss(torch.full((8, 8), 1 / 8), chosen, 8, top_k).item() == pytest.approx(top_k)
    sure = torch.zeros(8, 8)
    sure[:, :top_k] = 1 / top_k
    collapsed = torch.arange(top_k).expand(8, top_k)
    assert load_balancing_loss(sure, collapsed, 8, top_k).item() == pytest.approx(8)


def test_one_layer_agrees_with_transformers_and_two_do_not():
    torch.manual_seed(0)
    logits = torch.randn(2, 32, 8) * 2

    def ours(layer_logits):
        probabilities = layer_logits.softmax(-1)
        return load_balancing_loss(probabilities, probabilities.topk(2).indices, 8, 2).item()

    one = load_balancing_loss_func((logits[0],), 8, 2).item()
    assert ours(logits[0]) == pytest.approx(one, rel=1e-5)
    # Layers whose dead experts differ look balanced when their loads are added up first.
    first = torch.zeros(32, 8)
    first[:, :4] = 9.0
    first = first + torch.randn(32, 8)
    second = first.roll(4, dims=1)
    assert load_balancing_loss_func((first, second), 8, 2).item() == pytest.approx(2, abs=0.1)
    assert (ours(first) + ours(second)) / 2 > 3.9


def test_soft_routing_is_charged_for_its_importance():
    assert load_balancing_loss(torch.full((5, 4), 0.25), None, 4, 4).item() == pytest.approx(1)
    importance = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    variation = importance.std(correction=0) / importance.mean()
    assert load_balancing_loss(importance, None, 4, 4).item() == pytest.approx(1 + variation.item() ** 2)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    log2 = math.log(2)
    assert router_z_loss(logits).item() == pytest.approx((log2**2 + (1 + log2) ** 2) / 2)
    assert router_z_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(log2**2)
    assert router_z_loss(logits[:0]).item() == 0.0


def test_gradients_flow_through_the_probabilities_alone():
    logits = torch.randn(16, 4, requires_grad=True)
    probabilities = logits.softmax(-1)
    chosen = torch.zeros(16, 1, dtype=torch.long)
    load_balancing_loss(probabilities, chosen, 4, 1).backward()
    # f = 1, 0, 0, 0: the loss is 4 × the mean probability of expert 0.
    other = logits.detach().clone().requires_grad_()
    (4 * other.softmax(-1)[:, 0].mean()).backward()
    torch.testing.assert_close(logits.grad, other.grad)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[T, E\] with E = 4, got \(3, 5\)"):
        load_balancing_loss(torch.rand(3, 5), None, 4, 2)
    with pytest.raises(ValueError, match=r"chosen must be \[3, 2\]"):
        load_balancing_loss(torch.rand(3, 4), torch.zeros(3, 1, dtype=torch.long), 4, 2)
    with pytest.raises(ValueError, match=r"token_mask must be \[3\], got \(2,\)"):
        router_z_loss(torch.rand(3, 4), torch.ones(2))


class Two(torch.nn.Module):
    """Two layers, the second with other coefficients."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first = SparseMoE(16, 8, 4, **options)
        self.second = SparseMoE(16, 8, 4, z_coef=0.5, **options)
        self.is_checkpointed = False
        self.use_reentrant = False

    def forward(self, x):
        for layer in (self.first, self.second):
            x = x + (checkpoint(layer, x, use_reentrant=self.use_reentrant) if self.is_checkpointed else layer(x))
        return x


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_the_total_is_the_mean_over_layers_of_what_each_charges():
    model, x = Two(), torch.randn(2, 7, 16)
    model(x)
    losses = moe_losses(model)
    assert set(losses.balance) == {"first", "second"}
    expected = (
        0.01 * losses.balance["first"]
        + 0.001 * losses.z["first"]
        + 0.01 * losses.balance["second"]
        + 0.5 * losses.z["second"]
    ) / 2
    torch.testing.assert_close(losses.total.detach(), expected)
    assert losses.total.requires_grad
    assert not losses.balance["first"].requires_grad


def test_only_the_last_forward_counts():
    model, x = Two(), torch.randn(2, 7, 16)
    model(x)
    alone = moe_losses(model).total.item()
    model(torch.randn(2, 7, 16))
    model(x)
    assert moe_losses(model).total.item() == alone


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_gradient_checkpointing_changes_no_gradient_and_counts_once(balance):
    model, x = Two(balance=balance), torch.randn(2, 7, 16)
    other = copy.deepcopy(model)
    other.is_checkpointed = True
    for _ in range(3):
        for each in (model, other):
            each.zero_grad()
            with routing_stats(each) as stats:
                loss = each(x).square().sum() + moe_losses(each).total
                before = each.first.last_forward
                loss.backward()
            assert each.first.last_forward is before
            assert stats.layers[0].num_tokens == 14
        for one, two in zip(gradients(model), gradients(other), strict=True):
            torch.testing.assert_close(one, two)
    for (name, one), two in zip(model.named_buffers(), other.buffers(), strict=True):
        assert one.equal(two), name


def test_reentrant_checkpointing_is_refused_where_losses_are_asked_for():
    model = Two()
    model.is_checkpointed = model.use_reentrant = True
    model(torch.randn(2, 7, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        moe_losses(model)


def test_without_gradients_the_losses_have_none():
    model, x = Two(), torch.randn(2, 7, 16)
    model(x)
    expected = moe_losses(model).total.item()
    with torch.no_grad():
        model(x)
        assert moe_losses(model).total.item() == expected
        assert not moe_losses(model).total.requires_grad
    model.eval()
    with torch.inference_mode():
        model(x)
    assert moe_losses(model).total.item() == expected


def test_padding_is_left_out():
    model, x = Two(), torch.randn(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    model(x)
    losses = moe_losses(model, mask)
    first = model.first(x[mask.bool()])
    torch.testing.assert_close(losses.balance["first"], moe_losses(model.first).balance[""])
    model.first(x, token_mask=mask)
    torch.testing.assert_close(losses.balance["first"], moe_losses(model.first).balance[""])
    assert first.shape == (11, 16)
    with pytest.raises(ValueError, match="each of the 14 tokens"):
        moe_losses(model.first, mask[:, 1:])


def test_a_large_forward_that_trains_nothing_keeps_scalars_only():
    layer = SparseMoE(16, 8, 512).eval()
    x = torch.randn(KEPT_LOGITS // 512 + 1, 16)
    with torch.no_grad():
        layer(x)
        assert layer.last_forward.routed is None
        settled = moe_losses(layer).total
        with pytest.raises(RuntimeError, match="no mask can be applied"):
            moe_losses(layer, torch.ones(len(x)))
    layer(x)
    torch.testing.assert_close(moe_losses(layer).total.detach(), settled)


def test_a_model_without_layers_and_one_that_has_not_run_are_refused():
    with pytest.raises(ValueError, match="output_router_logits"):
        moe_losses(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="'first' has not run yet"):
        moe_losses(Two())
