"""Windows that a model or a config cannot have are refused before any forward that could go wrong."""

import pytest

import hfkv
from hfkv import KVCache, KVConfig, Window
from tests.tiny import llama, llama_config
from tests.zoo import NAMED, generate


def test_a_window_is_refused_where_positions_are_a_bias() -> None:
    sample = NAMED["t5"]()
    with hfkv.patch(sample.model, "window:8"), pytest.raises(NotImplementedError, match="adds a position bias"):
        generate(sample.model, sample.inputs)


def test_global_layers_that_are_not_the_windows_are_refused() -> None:
    model = NAMED["qwen3_next"]().model
    for window in (Window(8, global_layers=[0]), Window(8, global_heads={0: [0]})):
        with pytest.raises(ValueError, match="names layer 0, which the window is not for"):
            KVCache(model, KVConfig(window=window))
    kv = KVConfig(window=Window(8, global_layers=[0]), layers={"0": KVConfig(window=4)})
    with pytest.raises(ValueError, match="names layer 0, which the window is not for"):
        KVCache(llama_config(), kv)
    with pytest.raises(ValueError, match="says nothing of layer 0"):
        KVCache(llama_config(), "window:8+sink_positions:cache", rotary={})


@pytest.mark.parametrize("heads", [[0, 1], [7]], ids=["all", "not there"])
def test_global_heads_that_leave_none_to_slide_are_refused_before_any_forward(heads: list[int]) -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"of layer 1; it has 0-1, and at least one must slide"):
        hfkv.patch(model, KVConfig(window=Window(8, global_heads={1: heads})))
