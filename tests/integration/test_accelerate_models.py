"""Placed models of other kinds: adapters, encoder-decoders, experts, caches in files; and more than one device."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForSeq2SeqLM

import hfkv
from hfkv import KVCache, KVConfig
from tests.integration.test_accelerate import KVS, MIXED, NEW_TOKENS, check_same, dispatched, is_offloaded, run
from tests.tiny import llama, llama_config, prompt
from tests.unit.test_cache import STORES, WINDOWS
from tests.zoo.named import NAMED


# PEFT 0.21 itself reads the attribute that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kv", KVS[2:4])
@pytest.mark.parametrize("way", ["patched first", "placed first"])
def test_an_adapter_over_a_placed_model(tmp_path, way, kv):
    peft = pytest.importorskip("peft")

    def adapted(model):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"])
        adapter = peft.get_peft_model(model, config, low_cpu_mem_usage=False)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, weight in adapter.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.3)
        return adapter.eval()

    inputs = prompt(2, 23, padding=5)
    plain = llama()
    with hfkv.patch(plain, kv):
        without = run(plain, inputs)
    twin = adapted(llama())
    with hfkv.patch(twin, kv):
        expected = run(twin, inputs)
    assert not torch.equal(expected[0], without[0])
    # PEFT leaves the weights of a new adapter on the meta device where those of the layer are there.
    model = dispatched({"": "cpu"})(llama(), tmp_path)
    if way == "patched first":
        patch = hfkv.patch(model, kv)
        adapter = adapted(model)
    else:
        adapter = adapted(model)
        patch = hfkv.patch(adapter, kv)
    for _ in range(2):
        check_same(run(adapter, inputs), expected)
    with adapter.disable_adapter():
        check_same(run(adapter, inputs), without)
    check_same(run(adapter, inputs), expected)
    patch.undo()
    assert torch.equal(run(adapter, inputs)[0], run(twin, inputs)[0])


SEQ2SEQ = {
    "shared": "cpu",
    "encoder.embed_tokens": "cpu",
    "encoder.block": "disk",
    "encoder.final_layer_norm": "disk",
    "encoder.dropout": "cpu",
    "decoder.embed_tokens": "cpu",
    "decoder.block.0": "disk",
    "decoder.block.1": "cpu",
    "decoder.final_layer_norm": "disk",
    "decoder.dropout": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("kv", [None, "paged+page_size:4", "int4+offload"], ids=str)
@pytest.mark.parametrize("way", ["from_pretrained", "cpu_offload"])
def test_a_placed_encoder_decoder(tmp_path, way, kv):
    sample = NAMED["t5"]()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    stock = sample.model.generate(**sample.inputs, **options).sequences
    with hfkv.patch(sample.model, kv):
        expected = sample.model.generate(**sample.inputs, **options).sequences
        beams = sample.model.generate(**sample.inputs, num_beams=3, **options).sequences
    if way == "cpu_offload":
        model = cpu_offload(sample.model, execution_device=torch.device("cpu"))
    else:
        sample.model.save_pretrained(tmp_path / "model")
        model = AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path / "model", device_map=SEQ2SEQ, offload_folder=tmp_path / "offload", dtype=torch.float32
        ).eval()
    assert is_offloaded(model)
    with hfkv.patch(model, kv):
        output = model.generate(**sample.inputs, **options)
        assert type(output.past_key_values.self_attention_cache) is KVCache
        assert torch.equal(output.sequences, expected)
        assert torch.equal(model.generate(**sample.inputs, num_beams=3, **options).sequences, beams)
    assert torch.equal(model.generate(**sample.inputs, **options).sequences, stock)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "gemma3", "gpt_oss"])
def test_other_architectures_offloaded(name):
    if name not in NAMED:
        pytest.skip("this transformers has no such model")
    sample = NAMED[name]()
    with hfkv.patch(sample.model, "int8"):
        expected = run(sample.model, sample.inputs)
    model = cpu_offload(sample.model, execution_device=torch.device("cpu"))
    with hfkv.patch(model, "int8"):
        given = run(model, sample.inputs)
    assert torch.equal(given[0], expected[0])
    torch.testing.assert_close(given[1], expected[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("words", ["window:8+sinks:2+sink_positions:cache", "int8+window:16+sinks:2+summary:mean"])
def test_a_window_finds_out_how_an_offloaded_model_rotates(tmp_path, words):
    inputs = prompt(2, 40, padding=5)
    model = llama()
    with hfkv.patch(model, words):
        expected = run(model, inputs)
    for device_map in (MIXED, {"model": "disk", "lm_head": "disk"}):
        placed = dispatched(device_map)(llama(), tmp_path / str(len(device_map)))
        with hfkv.patch(placed, words):
            check_same(run(placed, inputs), expected)


def test_a_cache_goes_to_a_file_and_back_on_an_offloaded_model(tmp_path):
    inputs = prompt(2, 23, padding=5)
    model = llama()
    with hfkv.patch(model, "int8"):
        cache = model.hfkv.new_cache()
        tokens = run(model, inputs, past_key_values=cache)[0]
        cache.save(tmp_path / "chat.safetensors")
        longer = {
            "input_ids": torch.cat((tokens, tokens[:, :4]), dim=1),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, NEW_TOKENS + 4), value=1),
        }
        expected = run(model, longer, past_key_values=cache)
    placed = dispatched(MIXED)(llama(), tmp_path)
    with hfkv.patch(placed, "int8"):
        loaded = KVCache.load(tmp_path / "chat.safetensors", placed)
        assert torch.equal(loaded.holds_tokens, tokens[:, :-1])
        check_same(run(placed, longer, past_key_values=loaded), expected)
        loaded.save(tmp_path / "again.safetensors")
    # Offloaded weights are looked at where they rest: another model is refused.
    other = llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other = dispatched({"model": "disk", "lm_head": "disk"})(other, tmp_path / "other")
    with pytest.raises(ValueError, match="other weights"):
        KVCache.load(tmp_path / "chat.safetensors", other)


@pytest.mark.parametrize("codec", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("store", STORES)
def test_every_layer_keeps_its_planes_where_its_keys_are(store, window, codec):
    """The meta device stands for a second one: it cannot compute, but it has devices to mix up."""
    cache = KVCache(llama_config(num_hidden_layers=4), f"{codec}{window}+{store}")
    devices = [torch.device(name) for name in ("cpu", "meta", "cpu", "meta")]
    for count in (5, 1, 9):
        for index, device in enumerate(devices):
            states = torch.randn(2, 2, count, 16).to(device)
            keys, values = cache.update(states, states, index)
            assert keys.device == values.device == device
    memory = cache.memory()
    assert {(row.layer, row.device) for row in memory.rows} == set(enumerate(devices))
    assert memory.by_device().keys() == {"cpu", "meta"}
    assert cache.get_seq_length() == 15
    for change in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.reorder_cache(torch.tensor([1, 0, 3, 2])),
        lambda: cache.batch_select_indices(torch.tensor([0, 3])),
        lambda: cache.crop(-2),
    ):
        change()
        assert {(row.layer, row.device) for row in cache.memory().rows} == set(enumerate(devices))
    twin = cache.fork(2)
    assert {(row.layer, row.device) for row in twin.memory().rows} == set(enumerate(devices))
    with pytest.raises(ValueError, match=r"on cpu and was given .* on\s+meta"):
        cache.update(torch.zeros(2, 2, 1, 16, device="meta"), torch.zeros(2, 2, 1, 16, device="meta"), 0)


@pytest.mark.parametrize("way", ["patched first", "placed first"])
def test_undoing_exact_rotary_angles_on_a_placed_model(way):
    """They differ from the stock ones far from the start only: there the last bits tell which forward ran."""
    device = torch.device("cpu")
    positions = torch.tensor([[100_003.0]])
    x = torch.zeros(1, 1, 1)
    model = llama()
    stock = model.model.rotary_emb(x, positions)[0]
    if way == "patched first":
        patch = hfkv.patch(model, exact_rotary=True)
        model = cpu_offload(model, execution_device=device)
    else:
        model = cpu_offload(model, execution_device=device)
        patch = hfkv.patch(model, exact_rotary=True)
    assert hasattr(model.model.rotary_emb, "_hf_hook")
    assert not torch.equal(model.model.rotary_emb(x, positions)[0], stock)
    patch.undo()
    assert torch.equal(model.model.rotary_emb(x, positions)[0], stock)


@pytest.mark.parametrize("kv", ["int8", "window:8+sinks:2+sink_positions:cache", "int8+window:16+sinks:2+summary:mean"])
def test_a_mask_that_was_moved_between_layers_says_the_same(kv):
    """As accelerate's hooks move it to the device of the next layer: here to where it was."""
    inputs, model, kinds = prompt(2, 40, padding=5), llama(), set()
    with hfkv.patch(model, kv):
        expected = run(model, inputs)

    def move(module, args, kwargs):
        mask = kwargs["attention_mask"]
        kinds.add(type(mask).__name__)
        return args, {**kwargs, "attention_mask": None if mask is None else torch.ops.aten._to_copy(mask)}

    model.model.layers[1].register_forward_pre_hook(move, with_kwargs=True)
    with hfkv.patch(model, kv):
        check_same(run(model, inputs), expected)
    assert "CausalMask" in kinds


TWO_DEVICES = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
TWO_DEVICES |= {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
TWO_GPUS = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1}
TWO_GPUS |= {"model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("kv", [*KVS, "window:8+sinks:2+sink_positions:cache", "int8+offload"], ids=str)
@pytest.mark.parametrize("place", ["weights in host memory", "two gpus", "a gpu and a cpu"])
def test_every_cache_follows_its_layer(tmp_path, place, kv):
    """One GPU with some weights in host memory (it computes all layers), two GPUs, and a GPU beside a CPU."""
    if place == "two gpus" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = {name: tensor.to("cuda:0") for name, tensor in prompt(2, 23, padding=5).items()}
    alone = llama().to("cuda:0")
    with hfkv.patch(alone, kv):
        expected = run(alone, inputs)
    model = llama()
    if place == "a gpu and a cpu":
        # accelerate computes on the first GPU what a map leaves on a CPU: this has hooks of its own.
        model, computes = _spread(model), ["cuda:0", "cpu"]
    elif place == "two gpus":
        model, computes = dispatch_model(model, TWO_GPUS), ["cuda:0", "cuda:1"]
    else:
        model, computes = dispatch_model(model, TWO_DEVICES, offload_dir=tmp_path), ["cuda:0", "cuda:0"]
    stock = run(model, inputs)[0]
    with hfkv.patch(model, kv) as patch:
        for _ in range(2):
            given = run(model, inputs)
            # A rounding that differs on a CPU may move a code by one: only what is lossless gives the same tokens.
            error = (given[1][0].cpu() - expected[1][0].cpu()).norm() / expected[1][0].cpu().norm()
            assert error < (0.05 if place == "a gpu and a cpu" else 1e-4)
            if KVConfig.of(kv).is_lossless or place != "a gpu and a cpu":
                assert torch.equal(given[0].cpu(), expected[0].cpu())
        assert [str(layer.device) for layer in given[2].layers] == computes
        if not KVConfig.of(kv).offload:
            assert {(row.layer, str(row.device)) for row in given[2].memory().rows} == set(enumerate(computes))
        if "reuse" in str(kv):
            assert patch.reuse_stats().hits >= 2
        beams = {"num_beams": 3, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        assert model.generate(**inputs, **beams).shape == stock.shape
    assert torch.equal(run(model, inputs)[0], stock)


def _spread(model):
    """The second layer computes on the CPU, everything else on the first GPU."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model.to("cuda:0")
    model.model.layers[1].to("cpu")
    for module, device in ((model.model.layers[1], "cpu"), (model.model.norm, "cuda:0")):
        hook = AlignDevicesHook(device, io_same_device=False, skip_keys="past_key_values")
        add_hook_to_module(module, hook)
    return model
