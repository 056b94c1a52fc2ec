"""A model spread over processes, as one of them sees it; tests/integration/test_parallel.py has the processes."""

import copy
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.distributed import DistributedConfig
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer, PipelineStage

import hfkv
from hfkv import KVCache, KVConfig, Window
from hfkv.models.fingerprint import fingerprint_of
from hfkv.models.parallel import ParallelPlan, agreed, own_layers, parallel_plan_of
from hfkv.patches import graphs, prefill
from hfkv.sharing.files import cache_file as files
from tests.integration.parallel_scenarios import model_of
from tests.tiny import greedy, llama, llama_config, prompt


def stage_of(model, rank, size=2):
    """What process `rank` has of `model`, cut as transformers cuts it."""
    part = copy.deepcopy(model)
    part._pp_stage = SimpleNamespace(pp_rank=rank, pp_size=size)
    part._pp_stage.layer_range_for_rank = lambda *where: PipelineStage.layer_range_for_rank(part._pp_stage, *where)
    for index in range(len(part.model.layers)):
        if index not in own_layers(part, len(part.model.layers)):
            part.model.layers[index] = PipelineIdentityLayer()
    if rank < size - 1:
        part.model.norm = PipelineIdentityLayer()
    else:
        part.model.embed_tokens = PipelineIdentityLayer()
    return part


def filled_stage(kv="none", tokens=9):
    """A cache of the last of two stages, in which layer 1 alone holds two rows."""
    cache = KVCache(llama_config(), kv)
    cache.update(torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16), 1)
    return cache


@pytest.mark.parametrize("kind", ["pp-llama", "pp-sliding"])
@pytest.mark.parametrize("kv", ["none", "none+paged+page_size:2", "int8", "window:6+sinks:1"])
@torch.no_grad()
def test_stages_compute_what_the_whole_model_does(kind, kv):
    whole = model_of(kind)
    if "window" in kv:
        whole.set_attn_implementation("hfkv")
    first, last = stage_of(whole, 0), stage_of(whole, 1)
    caches = KVCache(whole, kv), KVCache(first, kv), KVCache(last, kv)
    ids, mask = prompt(length=16, padding=3).values()
    # A prompt, the rest of it, and token by token.
    for begin, end in ((0, 9), (9, 12), *((at, at + 1) for at in range(12, 16))):
        positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
        given = {"attention_mask": mask[:, :end], "position_ids": positions, "use_cache": True}
        expected = whole.model(input_ids=ids[:, begin:end], past_key_values=caches[0], **given).last_hidden_state
        between = first.model(input_ids=ids[:, begin:end], past_key_values=caches[1], **given).last_hidden_state
        found = last.model(inputs_embeds=between, past_key_values=caches[2], **given).last_hidden_state
        real = mask[:, begin:end].bool()
        assert torch.equal(found[real], expected[real])
        assert [cache.get_seq_length() for cache in caches] == [end] * 3
    held = [cache.held_bytes() for cache in caches]
    assert held[0] == held[1] + held[2] > max(held[1:])


def test_a_stage_of_transformers_own_cache_loses_count():
    """Why `KVCache` counts by the layers that are filled."""
    stock = DynamicCache(config=llama_config())
    stock.update(torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16), 1)
    assert stock.get_seq_length() == 0
    assert filled_stage().get_seq_length() == 9


@pytest.mark.parametrize("kv", ["none", "int8", "none+paged+page_size:4"])
def test_every_method_works_where_the_first_layers_stay_empty(kv):
    cache = filled_stage(kv)
    keys = cache.layers[1].keys.clone()
    assert (cache.batch_size, cache.get_mask_sizes(3, 0)) == (2, (12, 0))
    twin = cache.fork(2)
    assert torch.equal(twin.layers[1].keys, keys.repeat_interleave(2, dim=0))
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 7
    assert torch.equal(cache.layers[1].keys, keys[[1, 0], :, :7])
    cache.batch_select_indices([0])
    cache.batch_repeat_interleave(3)
    assert torch.equal(cache.layers[1].keys, keys[[1, 1, 1], :, :7])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert twin.get_seq_length() == 9


def test_a_forward_that_fails_on_a_stage_is_taken_back_in_its_own_layers():
    model = stage_of(llama(), 1)
    hidden = torch.randn(2, 9, 64)
    with hfkv.patch(model):
        cache = model.hfkv.new_cache()
        model(inputs_embeds=hidden, past_key_values=cache)
        with pytest.raises(TypeError):
            model(inputs_embeds=hidden, past_key_values=cache, logits_to_keep="all")
        assert cache.record.broken is None
        assert [leaf.get_seq_length() for leaf in cache.leaves] == [0, 9]
        model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(inputs_embeds=hidden, past_key_values=cache)
        assert cache.record.broken is None
        assert [leaf.get_seq_length() for leaf in cache.leaves] == [0, 9]


def test_the_file_of_a_stage_is_for_that_stage(tmp_path, monkeypatch):
    whole, path = llama(), tmp_path / "cache.safetensors"
    last, cache = stage_of(whole, 1), filled_stage("int8")
    cache.save(path, last)
    loaded = KVCache.load(path, last)
    assert torch.equal(loaded.layers[1].keys, cache.layers[1].keys)
    assert not loaded.layers[0].is_initialized
    with pytest.raises(ValueError, match="was filled by other weights"):
        KVCache.load(path, stage_of(whole, 0))
    # Were its fingerprint that of another part, what it holds would still not fit.
    monkeypatch.setattr(files, "fingerprint_difference", lambda *given: None)
    with pytest.raises(ValueError, match="layers held is 1 and should be 2"):
        KVCache.load(path, whole)
    with pytest.raises(ValueError, match="it holds layer 1, which another stage"):
        KVCache.load(path, stage_of(whole, 0))


def test_a_forward_of_a_whole_model_that_left_a_layer_empty_is_not_saved(tmp_path):
    with pytest.raises(RuntimeError, match="its layers hold different tokens"):
        filled_stage().save(tmp_path / "cache.safetensors", llama())


def test_an_empty_cache_of_a_stage_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="this cache is empty"):
        KVCache(llama_config()).save(tmp_path / "cache.safetensors", stage_of(llama(), 1))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ParallelPlan()),
        ({"tp_size": 4}, ParallelPlan(heads=4)),
        ({"pp_size": 2, "tp_size": 2}, ParallelPlan(heads=2, stages=2)),
        ({"tp_size": 2, "ep_size": 2}, ParallelPlan(heads=2, experts=2)),
        ({"tp_size": 2, "ep_size": 2, "tp_plan": {}}, ParallelPlan(experts=2)),
        ({"fsdp_size": 2, "dp_replicate_size": 3}, ParallelPlan(replicas=6)),
    ],
)
def test_spread_of_a_config(asked, expected):
    config = llama_config()
    if asked is not None:
        config.distributed_config = DistributedConfig(**asked)
    assert parallel_plan_of(config) == parallel_plan_of(SimpleNamespace(config=config)) == expected
    assert expected.is_one == (expected == ParallelPlan())


def test_transformers_5_17_shares_experts_or_everything_else():
    asked = SimpleNamespace(tp_size=2, tp_plan=None, enable_expert_parallel=True, fsdp_size=1, pp_size=1)
    assert parallel_plan_of(SimpleNamespace(distributed_config=asked)) == ParallelPlan(experts=2)
    asked.enable_expert_parallel = False
    assert parallel_plan_of(SimpleNamespace(distributed_config=asked)) == ParallelPlan(heads=2)


def test_a_single_process_agrees_with_itself():
    model = llama()
    assert agreed(model, [3, 0, 7]) == [3, 0, 7]
    assert own_layers(model, 5) == range(5)
    assert [own_layers(stage_of(llama(num_hidden_layers=5), rank), 5) for rank in (0, 1)] == [range(2), range(2, 5)]


def test_what_another_process_has_not_kept_is_read_again(monkeypatch):
    model, inputs = llama(), prompt(batch=1, length=21)
    with hfkv.patch(model, "paged+page_size:4+reuse") as patch:
        text = greedy(model, inputs)
        greedy(model, inputs)
        assert patch.reuse_stats().tokens_reused == 20
        monkeypatch.setattr(prefill, "agreed", lambda model, values: [min(value, 2) for value in values])
        assert torch.equal(greedy(model, inputs), text)
        assert patch.reuse_stats().tokens_reused == 20 + 8


def test_a_batch_is_read_as_the_process_needs_that_has_kept_least(monkeypatch):
    model, inputs = llama(), prompt(batch=3, length=21)
    inputs["input_ids"][:] = inputs["input_ids"][0].clone()
    with hfkv.patch(model, "paged+page_size:4+reuse") as patch:
        text = greedy(model, inputs)
        reused, pages = patch.reuse_stats().tokens_reused, patch.reuse_stats().pages
        lengths = []
        model.model.embed_tokens.register_forward_pre_hook(lambda module, args: lengths.append(tuple(args[0].shape)))
        monkeypatch.setattr(
            "hfkv.patches.reuse.fingerprint_of", lambda *given: replace(fingerprint_of(*given), has_hooks=False)
        )
        monkeypatch.setattr(prefill, "fingerprint_of", lambda *given: replace(fingerprint_of(*given), has_hooks=False))
        greedy(model, inputs)
        assert lengths[0] == (3, 1)
        lengths.clear()
        # The other one's pool is empty at first, and has what has been read alone then.
        answers = iter([[0] * 15, [0], [5, 5, 5]])
        monkeypatch.setattr(
            prefill, "agreed", lambda model, values: [1, 1, 1] if values == [True] * 3 else next(answers)
        )
        assert torch.equal(greedy(model, inputs), text)
        assert lengths[:2] == [(1, 20), (3, 1)]
        assert patch.reuse_stats().tokens_reused > reused
        assert patch.reuse_stats().pages == pages


def test_the_refusal_of_another_process_is_one_of_this_one(monkeypatch):
    model = llama()
    with hfkv.patch(model):
        monkeypatch.setattr(prefill, "agreed", lambda model, values: [0, 1, 1])
        with pytest.raises(ValueError, match="another process of this model refuses its past_key_values"):
            greedy(model, prompt(), past_key_values=model.hfkv.new_cache())


def test_hooks_of_another_process_are_as_those_of_this_one(monkeypatch):
    model, inputs, lengths = llama(), prompt(batch=1, length=21), []
    with hfkv.patch(model, "paged+page_size:4+reuse") as patch:
        model.model.embed_tokens.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
        monkeypatch.setattr(prefill, "fingerprint_of", lambda *given: replace(fingerprint_of(*given), has_hooks=False))
        monkeypatch.setattr(
            "hfkv.patches.reuse.fingerprint_of", lambda *given: replace(fingerprint_of(*given), has_hooks=False)
        )
        text = greedy(model, inputs, num_return_sequences=2, num_beams=2)
        assert (lengths[0], patch.reuse_stats().lookups) == (1, 1)
        lengths.clear()
        monkeypatch.setattr(prefill, "agreed", lambda model, values: [1, 0, 0])
        assert torch.equal(greedy(model, inputs, num_return_sequences=2, num_beams=2), text)
        assert (lengths[0], patch.reuse_stats().lookups) == (2, 1)


def test_global_heads_are_refused_where_processes_share_the_heads():
    config, kv = llama_config(), KVConfig(window=Window(8, global_heads={0: (0,)}))
    KVCache(config, kv)
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(ValueError, match="each of 2 processes only some of them; use global_layers"):
        KVCache(config, kv)


def test_moved_sinks_are_refused_on_a_pipeline():
    model = llama()
    model.config.distributed_config = DistributedConfig(pp_size=2)
    with pytest.raises(ValueError, match=r"the stages of a pipeline.*use sink_positions=\"absolute\""):
        hfkv.patch(model, KVConfig(window=Window(8, sink_positions="cache")))
    assert "hfkv" not in vars(model)


def test_a_spread_model_has_no_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICE_TYPES", {"cpu"})
    model = llama()
    assert graphs.model_reason(model) is None
    model.config.distributed_config = DistributedConfig(tp_size=2)
    assert graphs.model_reason(model) == "it is spread over several processes"


def test_nothing_is_shared_where_processes_must_run_equally_many_forwards(caplog):
    model, inputs = llama(), prompt(2, 20)
    expected = greedy(model, inputs)
    model._is_fsdp_managed_module = True
    with hfkv.patch(model, "paged+page_size:4+reuse") as patch, caplog.at_level(logging.WARNING, "hfkv"):
        assert all(torch.equal(greedy(model, inputs), expected) for _ in range(2))
        assert patch.reuse_stats().lookups == patch.reuse_stats().pages == 0
        assert "must run equally many" in caplog.text
        model._is_fsdp_managed_module = False
        greedy(model, inputs)
        greedy(model, inputs)
        assert patch.reuse_stats().hits > 0


# PEFT 0.21 itself reads the attribute that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_prefix_of_all_heads_is_refused_where_processes_share_them():
    peft = pytest.importorskip("peft")
    model = llama()
    prefix = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    with hfkv.patch(prefix):
        greedy(prefix, prompt())
        model.config.distributed_config = DistributedConfig(tp_size=2)
        with pytest.raises(NotImplementedError, match="keys and values of all kv heads"):
            greedy(prefix, prompt())


def test_keywords_that_a_pipeline_hands_on_as_one_are_understood_one_by_one():
    model = llama()
    model.set_attn_implementation("hfkv")
    ids = prompt()["input_ids"]
    expected = model.model(ids).last_hidden_state
    assert torch.equal(model.model(ids, kwargs={"return_dict": True}).last_hidden_state, expected)
    assert torch.equal(model.model(ids, kwargs={}).last_hidden_state, expected)
    with pytest.raises(NotImplementedError, match="does not implement 'block_indices'"):
        model.model(ids, kwargs={"block_indices": torch.zeros(4)})
