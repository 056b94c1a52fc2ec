"""What weights take, planned without them, against the weights of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfkv.bench.models import weights_read
from hfkv.models.shapes import shape_config, with_layers
from hfkv.planning.fit import Planner
from hfkv.planning.geometry import Geometry
from hfkv.planning.weights import loaded_weights, planned_weights
from tests.zoo import NAMED

GPU = torch.device("cuda")


@pytest.mark.parametrize("name", [name for name in ("llama", "gpt2", "qwen3_moe", "llava") if name in NAMED])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_real_model(name: str, tied: bool) -> None:
    config = NAMED[name]().model.config
    config.tie_word_embeddings = tied
    skeleton = Geometry.of(config, torch.bfloat16).skeleton
    with torch.device("cpu"):
        real = type(skeleton)._from_config(config, dtype=torch.bfloat16)
    assert real.dtype == torch.bfloat16
    expected = sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers()))
    assert planned_weights(skeleton, "bf16")["bf16"].nbytes == loaded_weights(real).nbytes == expected


@pytest.mark.parametrize(("bits", "options"), [(8, {}), (4, {"bnb_4bit_quant_type": "nf4"})])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_quantised_weights_are_what_bitsandbytes_makes(name: str, bits: int, options: Any, tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = NAMED[name]().model
    model.save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.bfloat16)
    weights = planned_weights(Geometry.of(model.config, torch.bfloat16).skeleton, "bf16")
    present = loaded_weights(loaded).nbytes
    assert weights[f"int{bits}"].nbytes == pytest.approx(present, rel=0.02)
    assert present < weights["bf16"].nbytes


def test_a_step_reads_the_experts_that_are_chosen() -> None:
    planner = Planner.of(with_layers(shape_config("qwen3-30b-a3b", None), 4), None, GPU)
    weights = planner.weights["bf16"]
    for batch in (1, 3, 16, 1000):
        assert weights.read(batch) == pytest.approx(weights_read(planner.geometry.skeleton, batch), rel=1e-6)
    assert weights.read(1) - weights.dense_bytes == weights.expert_bytes * 8 // 128
    assert weights.read(16) == weights.read(1000) == weights.dense_bytes + weights.expert_bytes
    # Stacks of experts stay as they are: 54 GiB in all 48 layers.
    assert planner.weights["int4"].expert_bytes == weights.expert_bytes
    assert planner.weights["int4"].dense_bytes < 0.9 * weights.dense_bytes
