"""`hfkv doctor` for models that cache latents: their kernels, windows and widths."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from transformers import DeepseekV3Config, DeepseekV32Config, PreTrainedConfig

from hfkv.cli.doctor.layers import ModelReport, describe_layers
from hfkv.cli.doctor.report import DoctorReport
from hfkv.cli.doctor.screen import show
from hfkv.cli.errors import CommandError
from hfkv.kernels.dispatch import expanded_kernel, latent_kernel
from hfkv.kernels.selftest.inputs import HeadShape

CPU = torch.device("cpu")


def layers_of(config: PreTrainedConfig, kv: str) -> ModelReport:
    return describe_layers("a model", config, kv, torch.bfloat16, CPU)


def test_layers_that_cache_latents_show_the_kernels_for_latents() -> None:
    config = DeepseekV3Config(num_hidden_layers=2, vocab_size=99)
    report = layers_of(config, "int8+window:64")
    assert report.heads == (HeadShape(512, 64, 128, is_latent=True),)
    (group,) = report.groups
    assert [(use.name, use.kernel, use.why) for use in group.uses[:2]] == [
        ("decode", *latent_kernel("int8", torch.bfloat16, CPU, 1, (512, 64))[:2]),
        ("prefill", *expanded_kernel(torch.bfloat16, CPU)[:2]),
    ]
    assert [use.name for use in group.uses] == ["decode", "prefill", "append"]
    # Sinks that are turned are attended to with absorbed queries.
    turned = layers_of(config, "int8+window:64+sink_positions:cache").groups[0]
    assert [(use.name, use.kernel) for use in turned.uses[1:3]] == [
        ("prefill", "cpu expanded"),
        ("prefill, moved", latent_kernel("int8", torch.bfloat16, CPU, 16, (512, 64)).name),
    ]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(DoctorReport([], report, "cpu", "bfloat16", [], 1.0), console)
    assert "latent 512, rotary 64" in console.export_text()


def test_no_window_for_layers_whose_indexer_picks_tokens() -> None:
    config = DeepseekV32Config(num_hidden_layers=2, vocab_size=99)
    (group,) = layers_of(config, "int8").groups
    assert group.cache == "int8, keys of its indexer"
    with pytest.raises(CommandError, match=r"layer 0 picks .*; leave the window out"):
        layers_of(config, "int8+window:64")
