"""Routing: choice, weights, capacity, and what is refused."""

import pytest
import torch

from hfkv.sparse_moe.capacity import expert_capacity, kept_slots
from hfkv.sparse_moe.routing import Router, check_routing, route

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 2.5]])


def test_the_highest_scores_are_chosen_and_weigh_what_is_left_of_the_softmax():
    routed = route(LOGITS, 2)
    assert routed.index.tolist() == [[0, 1], [2, 3]]
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(routed.weights[0], torch.stack((e / (1 + e), 1 / (1 + e))))
    torch.testing.assert_close(routed.probabilities, LOGITS.softmax(-1))


def test_without_renormalisation_the_weights_are_the_scores():
    torch.testing.assert_close(route(LOGITS, 2, renormalise=False).weights, LOGITS.softmax(-1).topk(2).values)
    sigmoid = route(LOGITS, 2, gate="sigmoid", renormalise=False)
    torch.testing.assert_close(sigmoid.weights, LOGITS.sigmoid().topk(2).values)
    torch.testing.assert_close(sigmoid.probabilities.sum(-1), torch.ones(2))


def test_soft_routing_takes_all_experts():
    routed = route(LOGITS, 2, "soft")
    assert routed.index.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(routed.weights, LOGITS.softmax(-1))
    torch.testing.assert_close(
        route(LOGITS, 2, "soft", "sigmoid").weights, LOGITS.sigmoid() / LOGITS.sigmoid().sum(-1, keepdim=True)
    )
    torch.testing.assert_close(route(LOGITS, 2, "soft", "sigmoid", renormalise=False).weights, LOGITS.sigmoid())


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_a_choice_bias_changes_the_choice_and_no_weight(gate):
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0])
    routed = route(LOGITS, 2, gate=gate, renormalise=False, choice_bias=bias)
    assert set(routed.index[0].tolist()) == {0, 3}
    scores = LOGITS.softmax(-1) if gate == "softmax" else LOGITS.sigmoid()
    torch.testing.assert_close(routed.weights, scores.gather(1, routed.index))


def test_underflown_sigmoids_give_finite_weights():
    routed = route(torch.full((1, 4), -200.0), 2, gate="sigmoid")
    assert routed.weights.isfinite().all()
    assert routed.probabilities.isfinite().all()


def test_the_router_computes_in_float32_under_autocast_and_in_half_precision():
    router = Router(8, 4, dtype=torch.bfloat16)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(5, 8, dtype=torch.bfloat16)
    expected = hidden.float() @ router.weight.float().T
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("routing", ["expert_choice", "soft_moe"])
def test_routings_that_mix_tokens_are_refused_with_the_reason(routing):
    with pytest.raises(NotImplementedError, match="not causal"):
        check_routing(routing, "softmax", 4, 2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hash", "softmax", 4, 2, True), '"hard" or "soft", got \'hash\''),
        (("hard", "tanh", 4, 2, True), '"softmax" or "sigmoid", got \'tanh\''),
        (("hard", "softmax", 1, 1, False), "num_experts takes 2 or more, got 1"),
        (("hard", "softmax", 4, 5, True), "top_k takes 1 to num_experts, which is 4; got 5"),
        (("hard", "softmax", 4, 0, True), "got 0"),
        (("hard", "softmax", 4, 1, True), "no gradient of the task reaches the router"),
    ],
)
def test_what_cannot_be_routed_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_routing(*arguments)


def test_a_number_of_experts_is_an_int():
    with pytest.raises(TypeError, match=r"top_k takes an int, got 2\.0"):
        check_routing("hard", "softmax", 4, 2.0, True)


def test_capacity_is_the_mean_load_times_the_factor_rounded_up():
    assert expert_capacity(10, 4, 2, 1.0) == 5
    assert expert_capacity(10, 4, 2, 1.25) == 7
    assert expert_capacity(1, 8, 2, 1.0) == 1


def test_slots_beyond_the_capacity_are_lost_by_the_last_tokens():
    index = torch.tensor([[0, 1], [0, 1], [0, 2], [3, 0]])
    kept = kept_slots(index, 4, 2)
    assert kept.tolist() == [[True, True], [True, True], [False, True], [True, False]]


def test_padding_takes_no_room():
    index = torch.tensor([[0, 1], [0, 1], [0, 2], [3, 0]])
    kept = kept_slots(index, 4, 2, torch.tensor([False, True, True, True]))
    assert kept.tolist() == [[True, True], [True, True], [True, True], [True, False]]


def test_capacity_against_a_loop():
    torch.manual_seed(0)
    index = torch.rand(50, 6).topk(3).indices
    mask = torch.rand(50) < 0.7
    room = [7] * 6
    expected = []
    for token, experts in enumerate(index.tolist()):
        row = []
        for expert in experts:
            row.append(not mask[token] or room[expert] > 0)
            if mask[token]:
                room[expert] -= 1
        expected.append(row)
    assert kept_slots(index, 6, 7, mask).tolist() == expected
