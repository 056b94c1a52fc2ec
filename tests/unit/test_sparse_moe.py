"""`SparseMoE` against a loop over tokens that is slow and plainly right: outputs and all gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from hfkv.sparse_moe.layer import SparseMoE
from hfkv.sparse_moe.model_losses import moe_losses

FORMS = [
    {},
    {"top_k": 1, "renormalise": False},
    {"top_k": 3, "renormalise": False},
    {"top_k": 6},
    {"gate": "sigmoid"},
    {"gate": "sigmoid", "renormalise": False},
    {"routing": "soft"},
    {"routing": "soft", "gate": "sigmoid"},
    {"routing": "soft", "gate": "sigmoid", "renormalise": False},
    {"gated": False, "activation": "gelu"},
    {"bias": True},
    {"gated": False, "bias": True, "activation": "relu"},
    {"balance": "bias", "gate": "sigmoid"},
    {"capacity_factor": 0.5},
    {"capacity_factor": 1.0, "top_k": 3, "gate": "sigmoid", "bias": True},
]


def layer(seed=0, hidden=16, inner=8, num_experts=6, **options):
    torch.manual_seed(seed)
    moe = SparseMoE(hidden, inner, num_experts, **options)
    with torch.no_grad():
        moe.gate.weight.normal_()
        if moe.balance == "bias":
            moe.balance_bias.uniform_(-0.3, 0.3)
    return moe


def expert(moe, number, x):
    """One expert on one token [H]."""
    weights = {name: stack[number] for name, stack in moe.experts.named_parameters()}
    if "gate_up_proj" in weights:
        inner = F.linear(x, weights["gate_up_proj"], weights.get("gate_up_proj_bias"))
        gate, up = inner[: moe.intermediate_size], inner[moe.intermediate_size :]
        inner = moe.experts.act_fn(gate) * up
    else:
        inner = moe.experts.act_fn(F.linear(x, weights["up_proj"], weights.get("up_proj_bias")))
    return F.linear(inner, weights["down_proj"], weights.get("down_proj_bias"))


def scores_of(moe, x):
    logits = moe.gate.weight @ x
    return torch.softmax(logits, 0) if moe.gate_kind == "softmax" else torch.sigmoid(logits)


def reference(moe, tokens):
    """One token after the other, [T, H]."""
    room = None
    if moe.capacity_factor is not None:
        mean = len(tokens) * moe.top_k / moe.num_experts
        room = [-(-moe.capacity_factor * mean // 1)] * moe.num_experts
    rows = []
    for x in tokens:
        scores = scores_of(moe, x)
        bias = moe.balance_bias.tolist() if moe.balance == "bias" else [0.0] * moe.num_experts
        ranked = sorted(range(moe.num_experts), key=lambda e: -(scores[e].item() + bias[e]))
        chosen = ranked[: moe.top_k]
        weights = {e: scores[e] for e in chosen}
        if moe.renormalise:
            total = sum(weights.values())
            weights = {e: weight / total for e, weight in weights.items()}
        out = torch.zeros_like(x)
        for e in chosen:
            if room is not None:
                room[e] -= 1
                if room[e] < 0:
                    continue
            out = out + weights[e] * expert(moe, e, x)
        rows.append(out)
    return torch.stack(rows) if rows else torch.zeros_like(tokens)


def output_and_gradients(moe, function, x):
    moe.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    torch.manual_seed(1)
    (y * torch.randn_like(y)).sum().backward()
    return y.detach(), x.grad, {name: parameter.grad for name, parameter in moe.named_parameters()}


@pytest.mark.pairwise
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("num_tokens", [1, 7, 100])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_against_the_loop(options, num_tokens, implementation):
    moe = layer(**options).eval()
    moe.experts_implementation = implementation
    x = torch.randn(num_tokens, 16)
    y, x_grad, grads = output_and_gradients(moe, moe, x)
    expected, expected_x, expected_grads = output_and_gradients(moe, lambda tokens: reference(moe, tokens), x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_grad, expected_x, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023
    if moe.top_k > 1:
        assert grads["gate.weight"].abs().sum() > 0


def textbook(moe, tokens):
    """The loop of many a tutorial, with its mistake: the sum over dim 0 adds up tokens, not experts."""
    scores = (tokens @ moe.gate.weight.T).softmax(-1)
    weights, chosen = scores.topk(moe.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(tokens)
    for e in range(moe.num_experts):
        mask = chosen == e
        if mask.any():
            rows = torch.stack([expert(moe, e, x) for x in tokens[mask.any(-1)]])
            out[mask.any(-1)] += (rows * weights[mask][:, None]).sum(dim=0)
    return out


def test_the_textbook_sum_over_tokens_would_be_caught():
    moe = layer().eval()
    x = torch.randn(7, 16)
    right = moe(x)
    torch.testing.assert_close(right, reference(moe, x), rtol=1e-4, atol=1e-5)
    assert (textbook(moe, x) - right).abs().max() > 0.1 * right.abs().max()
    # It hides where no expert sees two tokens.
    torch.testing.assert_close(textbook(moe, x[:1]), moe(x[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_no_tokens(options, implementation):
    moe = layer(**options)
    moe.experts_implementation = implementation
    for shape in ((0, 16), (2, 0, 16), (0, 3, 16)):
        assert moe(torch.randn(shape, requires_grad=True)).shape == shape
        assert moe_losses(moe).total.item() == 0.0


def test_batches_are_rows_and_rows_do_not_depend_on_the_batch():
    moe = layer().eval()
    x = torch.randn(3, 5, 16)
    whole = moe(x)
    torch.testing.assert_close(whole, moe(x.view(15, 16)).view(3, 5, 16))
    torch.testing.assert_close(whole[1], moe(x[1]))
    torch.testing.assert_close(whole[:, :2], moe(x[:, :2]))


def test_repeated_forwards_are_identical():
    moe = layer().eval()
    x = torch.randn(50, 16)
    assert moe(x).equal(moe(x))


def test_with_a_capacity_no_token_loses_its_place_to_a_later_one():
    moe = layer(capacity_factor=0.5).eval()
    x = torch.randn(60, 16)
    moe(x)
    kept = moe.last_forward.kept
    assert not kept.all()
    # The same capacity, other tokens behind.
    moe(torch.cat((x[:30], torch.randn(30, 16))))
    assert moe.last_forward.kept[:30].equal(kept[:30])
    moe.capacity_factor = None
    moe(x)
    assert moe.last_forward.kept is None


def test_unused_experts_get_zero_gradient_and_used_ones_do_not():
    moe = layer()
    with torch.no_grad():
        moe.gate.weight[4:] = 0
        moe.gate.weight[:4, 0] = 50.0
    x = torch.randn(40, 16)
    x[:, 0] = x[:, 0].abs() + 1
    moe(x).square().sum().backward()
    for stack in moe.experts.parameters():
        assert all(stack.grad[e].abs().sum() > 0 for e in moe.last_forward.routed.index.unique())
        assert not stack.grad[4:].any()


def test_odd_sizes_and_float64_run_eager_and_follow_casts():
    assert layer().experts_implementation == "grouped_mm"
    assert layer(hidden=10, inner=6).experts_implementation == "eager"
    moe = layer().double()
    assert moe.experts_implementation == "eager"
    x = torch.randn(9, 16, dtype=torch.float64)
    torch.testing.assert_close(moe(x), layer()(x.float()).double(), rtol=1e-4, atol=1e-5)
    assert moe.bfloat16().experts_implementation == "grouped_mm"
    moe.experts_implementation = "batched_mm"
    assert moe.double().experts_implementation == "batched_mm"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    moe = layer().eval()
    x = torch.randn(64, 16)
    half = copy.deepcopy(moe).to(dtype)
    y = half(x.to(dtype))
    assert y.dtype == dtype
    # The same rounded weights and tokens, computed in float32.
    rounded = copy.deepcopy(half).float()
    expected = rounded(x.to(dtype).float())
    assert (y.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_name_transformers_reads_switches_the_experts():
    moe = layer().eval()
    x = torch.randn(9, 16)
    expected = moe(x)
    moe.experts.config._experts_implementation = "batched_mm"
    assert moe.experts_implementation == "batched_mm"
    torch.testing.assert_close(moe(x), expected)
    moe.experts.config._experts_implementation = "nonsense"
    with pytest.raises(KeyError, match="nonsense"):
        moe(x)


def test_copies_and_files_hold_the_same_layer():
    moe = layer(balance="bias")
    x = torch.randn(9, 16)
    moe(x)
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert other.last_forward is None
        other.experts_implementation = "eager"
        assert moe.experts_implementation == "grouped_mm"
        torch.testing.assert_close(other.eval()(x), moe.eval()(x))
    fresh = SparseMoE(16, 8, 6, balance="bias")
    fresh.load_state_dict(moe.state_dict())
    assert fresh.eval()(x).equal(moe(x))


def skewed():
    """A layer whose router prefers two of eight experts, and tokens."""
    torch.manual_seed(0)
    moe = SparseMoE(16, 8, 8, balance="bias", gate="sigmoid", bias_update_rate=0.01)
    x = torch.randn(256, 16)
    x[:, 0] = 1.0
    with torch.no_grad():
        moe.gate.weight[:2, 0] += 1.0
    return moe, x


def test_the_balancing_bias_moves_load_in_training_alone():
    moe, x = skewed()

    def load():
        with torch.no_grad():
            moe.eval()(x)
            return torch.bincount(moe.last_forward.routed.index.flatten(), minlength=8) / (2 * len(x))

    before, bias = load(), moe.balance_bias.clone()
    assert before[:2].sum() > 0.8
    assert bias.equal(moe.balance_bias)
    moe.train()
    moe(x)
    assert bias.equal(moe.balance_bias)  # the first has no load before it
    moe(x)
    assert moe.balance_bias[0] == pytest.approx(-0.01)
    for _ in range(60):
        moe(x)
    assert load()[:2].sum() < 0.45
    assert load().max() < 2 * load().mean()


def test_the_balancing_bias_has_no_gradient_and_keeps_float32():
    moe, x = skewed()
    moe(x)
    moe(x).sum().backward()
    assert all("balance" not in name for name, _ in moe.named_parameters())
    assert moe_losses(moe).total.item() == pytest.approx(0.001 * moe_losses(moe).z[""].item())
    bias = moe.balance_bias.clone()
    moe.bfloat16()
    assert moe.balance_bias.dtype == torch.float32
    assert moe.balance_bias.equal(bias)


def test_masked_tokens_do_not_weigh_on_the_balancing_bias():
    moe, x = skewed()
    mask = torch.arange(256) < 100
    moe(x, token_mask=mask)
    assert moe.balance_load.sum() == 200


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"routing": "expert_choice"}, NotImplementedError, "not causal"),
        ({"top_k": 1}, ValueError, "no gradient of the task"),
        ({"activation": "sillu"}, ValueError, "got 'sillu'"),
        ({"balance": "both"}, ValueError, "got 'both'"),
        ({"balance": "bias", "balance_coef": 0.1}, ValueError, 'goes with balance="loss"'),
        ({"bias_update_rate": 0.1}, ValueError, 'goes with balance="bias"'),
        ({"z_coef": -1.0}, ValueError, "z_coef takes 0 or more"),
        ({"routing": "soft", "balance": "bias"}, ValueError, "soft routing takes all"),
        ({"routing": "soft", "capacity_factor": 1.0}, ValueError, "soft routing takes all"),
        ({"capacity_factor": 0.0}, ValueError, "above 0"),
        ({"renormalize": True}, TypeError, "renormalize"),
    ],
)
def test_what_is_not_allowed_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        SparseMoE(16, 8, 4, **options)


def test_other_shapes_are_refused():
    moe = layer()
    with pytest.raises(ValueError, match=r"\[B, T, 16\] or \[T, 16\], got \(2, 15\)"):
        moe(torch.randn(2, 15))
    with pytest.raises(ValueError, match=r"token_mask must be \(2, 3\), got \(6,\)"):
        moe(torch.randn(2, 3, 16), token_mask=torch.ones(6))
