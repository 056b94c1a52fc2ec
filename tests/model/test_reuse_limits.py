"""What is not shared: budgets, changed models, copies, refusals; and threads that share one pool."""

import copy
import logging
import threading
from typing import Any

import pytest
import torch

import hfkv
from tests.model.test_reuse import PAGED, cold_of
from tests.tiny import greedy, llama, llama_for, prompt
from tests.zoo import NAMED


def test_the_budget_holds_and_the_least_recently_used_go() -> None:
    model = llama()
    one_page = 2 * 2 * 2 * 16 * 8 * 4  # layers, keys and values, heads, head dim, tokens, bytes
    texts = [prompt(1, 24)["input_ids"] + i for i in range(4)]
    with hfkv.patch(model, hfkv.KVConfig(store="paged", page_size=8, reuse=hfkv.Reuse(budget=7 * one_page))) as patch:
        for ids in texts:
            model.generate(ids, max_new_tokens=1)
            stats = patch.reuse_stats()
            assert stats.nbytes <= stats.budget
        assert stats.pages == 7
        assert stats.evictions == 4 * 3 - 7
        # The newest two are there whole; of the others one page at most.
        hits = []
        for ids in reversed(texts):
            before = patch.reuse_stats().tokens_reused
            model.generate(ids, max_new_tokens=1)
            hits.append(patch.reuse_stats().tokens_reused - before)
        assert hits[:2] == [16, 16]
        assert patch.reuse_stats().nbytes <= 7 * one_page


def test_a_prompt_larger_than_the_budget_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    inputs = prompt(1, 40)
    with hfkv.patch(model, hfkv.KVConfig(store="paged", page_size=8, reuse=hfkv.Reuse(budget=5000))):
        with caplog.at_level(logging.WARNING, "hfkv"):
            assert torch.equal(greedy(model, inputs), cold_of(inputs))
        assert torch.equal(greedy(model, inputs), cold_of(inputs))
    assert "too small" in caplog.text


def changed_weights(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)


def changed_data(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight.data *= 1.5


def changed_rotary(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def trained(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ids = prompt(1, 12)["input_ids"]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("change", [changed_weights, changed_data, changed_rotary, trained])
def test_a_changed_model_finds_nothing(change: Any) -> None:
    model = llama()
    inputs = prompt(1, 40)
    with hfkv.patch(model, "none" + PAGED) as patch:
        before = greedy(model, inputs)
        change(model)
        after = greedy(model, inputs)
        assert patch.reuse_stats().hits == 0
    expected = llama()
    change(expected)
    assert torch.equal(after, greedy(expected, inputs))
    assert not torch.equal(after, before)


def test_what_may_not_be_shared_is_not_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    inputs = prompt(1, 40)
    expected = cold_of(inputs)

    def hits(**options: Any) -> int:
        before = patch.reuse_stats().lookups
        greedy(model, inputs, **options)
        return patch.reuse_stats().lookups - before

    with hfkv.patch(model, "none" + PAGED) as patch, caplog.at_level(logging.WARNING, "hfkv"):
        assert hits() == 1
        hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output)
        assert hits() == 0
        assert "hooks" in caplog.text
        hook.remove()
        model.train()
        assert hits() == 0
        assert "training" in caplog.text
        model.eval()
        assert hits(position_ids=torch.arange(40)[None] + 3) == 0
        assert "positions" in caplog.text
        with torch.autocast("cpu", torch.bfloat16):
            greedy(model, inputs)
        assert patch.reuse_stats().hits == 0
        assert torch.equal(greedy(model, inputs), expected)
        assert patch.reuse_stats().hits == 0  # the other precision's pages took the place of these
        assert torch.equal(greedy(model, inputs), expected)
        assert patch.reuse_stats().hits == 1


def test_salts_keep_apart() -> None:
    inputs = prompt(1, 40)
    model = llama()
    pools = []
    for salt in ("a", "b"):
        with hfkv.patch(model, hfkv.KVConfig(reuse=hfkv.Reuse(salt=salt))) as patch:
            greedy(model, inputs)
            pools.append(set(patch.pool._index))
    assert not pools[0] & pools[1]


def test_copies_and_undo() -> None:
    model = llama()
    inputs = prompt(1, 40)
    patch = hfkv.patch(model, "none" + PAGED)
    expected = greedy(model, inputs)
    twin = copy.deepcopy(model)
    assert twin.hfkv.reuse_stats().pages == 0
    assert torch.equal(greedy(twin, inputs), expected)
    assert twin.hfkv.reuse_stats().hits == 0
    assert patch.reuse_stats().lookups == 1
    patch.clear_reuse()
    assert patch.reuse_stats().pages == 0
    greedy(model, inputs)
    assert patch.reuse_stats().hits == 0
    hfkv.unpatch(model)
    assert "_prefill" not in vars(model)
    assert "forward" not in vars(model)
    assert "_get_candidate_generator" not in vars(model)


def test_a_cast_model_begins_anew() -> None:
    model = llama()
    inputs = prompt(1, 40)
    with hfkv.patch(model, "none" + PAGED) as patch:
        greedy(model, inputs)
        model.to(torch.float64)
        expected = greedy(model, inputs)
        assert torch.equal(greedy(model, inputs), expected)
        assert patch.reuse_stats().hits == 1
        model.to(torch.float32)
        greedy(model, inputs)
    assert patch.kv.reuse is not None


def test_models_that_cannot_share_are_refused() -> None:
    dynamic = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    for model, word in (
        (dynamic, "dynamic rotary scaling"),
        (NAMED["t5"]().model, "encoder-decoder"),
        (NAMED["qwen3_next"]().model, "state is not a token's own"),
    ):
        with pytest.raises(ValueError, match=word):
            hfkv.patch(model, "reuse")
        assert "hfkv" not in vars(model)


def test_without_reuse_there_are_no_statistics() -> None:
    model = llama()
    with hfkv.patch(model) as patch, pytest.raises(RuntimeError, match="without reuse"):
        patch.reuse_stats()
    with pytest.raises(ValueError, match="patched model"):
        hfkv.KVCache(model, "int8+reuse")


@pytest.mark.parametrize("kv", ["none" + PAGED, "int8+reuse"])
def test_eight_threads_give_the_outputs_of_one(kv: str) -> None:
    model = llama_for(kv)
    whole = prompt(1, 90)["input_ids"][0]
    prompts = [torch.cat((whole[: 8 * (i % 9) + 5], whole[i : i + 3]))[None] for i in range(50)]
    with hfkv.patch(model, kv.replace("+reuse", "")):
        expected = [model.generate(ids, max_new_tokens=6, do_sample=False) for ids in prompts]
    wrong: list[Any] = []
    # A budget that does not hold all of them: pages come and go meanwhile.
    policy = hfkv.KVConfig.parse(kv)
    reuse = hfkv.Reuse(budget=40 * 8 * 2 * 2 * 2 * 16 * 4)
    with hfkv.patch(
        model, hfkv.KVConfig(policy.codec, store=policy.store, page_size=policy.page_size, reuse=reuse)
    ) as patch:

        def work(seed: int) -> None:
            order = torch.randperm(50, generator=torch.Generator().manual_seed(seed)).tolist()
            try:
                for index in order:
                    output = model.generate(prompts[index], max_new_tokens=6, do_sample=False)
                    if not torch.equal(output, expected[index]):
                        wrong.append((seed, index))
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = patch.reuse_stats()
        assert wrong == []
        assert stats.lookups == 8 * 50
        assert stats.hits > 0
        assert patch.pool.blocks.used == stats.pages
