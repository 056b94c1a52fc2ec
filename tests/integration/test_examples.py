"""The examples run as they are, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfkv import tiny_lm

# PEFT 0.21 itself reads the attribute that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments, temporary):
    """What the example prints."""
    process = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def save_adapter(folder, std):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(tiny_lm.PATH)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    return folder


def test_pipeline_lora_device_map_prints_a_continuation_of_every_prompt(tmp_path):
    pytest.importorskip("peft")
    printed = run("pipeline_lora_device_map.py", temporary=tmp_path)
    patch, *texts = printed.split("-" * 40 + "\n")
    assert "kv='int8'" in patch
    assert "hfkv attention" in patch
    prompts = ["def main():\n", "import os\n\nfor name in os.listdir("]
    assert len(texts) == len(prompts)
    for text, prompt in zip(texts, prompts, strict=True):
        assert text.startswith(prompt)
        assert len(text) > len(prompt) + 20


def test_pipeline_lora_device_map_uses_the_adapter_it_is_given(tmp_path):
    none, strong = (
        run("pipeline_lora_device_map.py", save_adapter(tmp_path / name, std), temporary=tmp_path)
        for name, std in (("none", 0.0), ("strong", 0.2))
    )
    assert none != strong


def test_endless_text_goes_on_in_the_same_bytes(tmp_path):
    figures = tmp_path / "figures.json"
    printed = run("endless_text.py", "--new-tokens", "2001", "--json", figures, temporary=tmp_path)
    assert "The text ends:" in printed
    rows = json.loads(figures.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1000, 2000]
    assert rows[0]["nbytes"] == rows[1]["nbytes"] > 0
