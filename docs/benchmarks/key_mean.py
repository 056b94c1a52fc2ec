"""Measures what is gained by taking the mean key off before keys are quantised: an experiment, not a part of hfkv.

Before its rotation by position p, much of a key is one vector m, the same for all tokens of a layer and kv head. Here
keys are written as ``encode(R_p (k - m))`` and read as ``decode(...) + R_p m``, with m found on the first tokens of a
text; then with only the n strongest rotary pairs of each head's m, the others set to zero. Keys and values go through
hfkv's codec on their way into transformers' own cache, so every query, those of the same forward too, sees what was
read back. Loss and KL divergence are against the cache without a codec, on the same tokens.

    python docs/benchmarks/key_mean.py --context 4096 --tokens 8192
    python docs/benchmarks/key_mean.py --model FOLDER --text FILE --mean-from OTHER_FILE --pairs 8,16,24
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hfkv import tiny_lm
from hfkv.codecs import CODECS
from hfkv.eval.compare import text_blocks
from hfkv.measure.machine import describe_machine
from hfkv.models.probe import probe_rotary

CHUNK = 256
# The mean key of each layer, [1, H, 1, D], not rotated.
Means = dict[int, torch.Tensor]


class MeanOf(DynamicCache):
    """Sums the keys it is given, turned back to position 0."""

    def __init__(self, config: Any, rotary: Any) -> None:
        super().__init__(config=config)
        self.rotary, self.sums, self.energies, self.count = rotary, {}, {}, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        start = self.get_seq_length(layer_idx)
        back = -torch.arange(start, start + key_states.shape[2])
        keys = self.rotary[layer_idx].rotate(key_states, back).float()
        self.sums[layer_idx] = self.sums.get(layer_idx, 0) + keys.sum(2, keepdim=True)
        self.energies[layer_idx] = self.energies.get(layer_idx, 0) + keys.square().sum().item()
        self.count += keys.shape[2] if layer_idx == 0 else 0
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Through(DynamicCache):
    """Holds keys and values as a codec gives them back, keys after their layer's mean has been taken off."""

    def __init__(self, config: Any, rotary: Any, codec: Any, means: Means | None) -> None:
        super().__init__(config=config)
        self.rotary, self.codec, self.means = rotary, codec, means

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if self.codec is not None:
            if self.means is None:
                key_states = self.read_back(key_states)
            else:
                start = self.get_seq_length(layer_idx)
                positions = torch.arange(start, start + key_states.shape[2])
                mean = self.means[layer_idx].expand(-1, -1, key_states.shape[2], -1)
                mean = self.rotary[layer_idx].rotate(mean, positions)
                key_states = self.read_back(key_states - mean) + mean
            value_states = self.read_back(value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def read_back(self, states: torch.Tensor) -> torch.Tensor:
        return self.codec.decode(self.codec.encode(states), states.shape[-1], states.dtype)


def means_of(model: Any, rotary: Any, ids: torch.Tensor) -> tuple[Means, float, float]:
    """The mean keys over a text, and the least and the largest share of a layer's key energy that they are."""
    cache = MeanOf(model.config, rotary)
    for piece in ids.split(CHUNK):
        model(piece[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    means = {layer: total / cache.count for layer, total in cache.sums.items()}
    shares = [cache.count * mean.square().sum().item() / cache.energies[layer] for layer, mean in means.items()]
    return means, min(shares), max(shares)


def strongest(means: Means, rotary: Any, count: int) -> Means:
    """The means with only so many rotary pairs of each head, those of the largest energy."""
    kept = {}
    for layer, mean in means.items():
        assert 2 * len(rotary[layer].inv_freq) == mean.shape[-1], "all of a head is rotated"
        shape = (-1, 2) if rotary[layer].interleaved else (2, -1)
        axis = -1 if rotary[layer].interleaved else -2
        pairs = mean.unflatten(-1, shape)
        energy = pairs.square().sum(axis)
        chosen = torch.zeros_like(energy).scatter_(-1, energy.topk(count, dim=-1).indices, 1.0)
        kept[layer] = (pairs * chosen.unsqueeze(axis)).flatten(-2)
    return kept


@torch.inference_mode()
def main(
    model: Annotated[str, typer.Option(help="A folder or a name.")] = tiny_lm.PATH,
    text: Annotated[Path | None, typer.Option(help="What is scored; the bundled held-out text.")] = None,
    mean_from: Annotated[
        list[Path] | None, typer.Option(help="Texts of other means; the bundled one is always.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens a block.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens scored.")] = 8192,
    skip: Annotated[int, typer.Option(help="Characters of the text left out at its beginning.")] = 0,
    mean_tokens: Annotated[int, typer.Option(help="Tokens that a mean is taken over.")] = 1024,
    codec: Annotated[str, typer.Option(help="The codec of keys and values.")] = "int4",
    pairs: Annotated[str, typer.Option(help="Rotary pairs of the mean to keep.")] = "8,16,24",
) -> None:
    """Prints a table: the codec without a mean, with means of each text, and with parts of the first."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer, rotary = AutoTokenizer.from_pretrained(model), probe_rotary(loaded)
    table = Table("cache", "loss, nats", "change", "KL, nats", "same top-1")

    def ids_of(words: str) -> torch.Tensor:
        return tokenizer(words, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]

    configs: dict[str, tuple[Any, Means | None]] = {"none": (None, None), codec: (CODECS[codec], None)}
    texts = {"bundled": tiny_lm.calibration_text()} | {path.name: path.read_text() for path in mean_from or ()}
    for name, words in texts.items():
        means, least, most = means_of(loaded, rotary, ids_of(words)[:mean_tokens])
        label = f"{codec}, mean of {name} ({least:.0%}-{most:.0%} of the energy)"
        configs[label] = (CODECS[codec], means)
        if name == "bundled":
            for count in map(int, pairs.split(",")):
                configs[f"{codec}, its {count} strongest pairs"] = (CODECS[codec], strongest(means, rotary, count))
    words = tiny_lm.held_out_text() if text is None else text.read_text()
    blocks = text_blocks(ids_of(words[skip:])[:tokens], loaded.config.bos_token_id, context)
    totals = {name: torch.zeros(4, dtype=torch.float64) for name in configs}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=sum(inputs.shape[1] for inputs, _ in blocks) * len(configs))
        for inputs, targets in blocks:
            caches = {name: Through(loaded.config, rotary, *given) for name, given in configs.items()}
            for ids, wanted in zip(inputs.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True):
                full = None
                for name, cache in caches.items():
                    logs = loaded(ids, past_key_values=cache, use_cache=True).logits.log_softmax(-1)
                    if full is None:
                        full, likely = logs, logs.exp()
                    loss = -logs.gather(-1, wanted[..., None]).sum()
                    kl = likely.flatten().dot((full - logs).flatten())
                    same = (logs.argmax(-1) == full.argmax(-1)).sum()
                    each = [loss.item(), kl.item(), same.item(), ids.shape[1]]
                    totals[name] += torch.tensor(each, dtype=torch.float64)
                    progress.advance(task, ids.shape[1])
    base = totals["none"][0] / totals["none"][3]
    for name, total in totals.items():
        nats, kl, same = (total[:3] / total[3]).tolist()
        table.add_row(name, f"{nats:.4f}", f"{nats / base - 1:+.3%}", f"{kl:.5f}", f"{same:.2%}")
    said = describe_machine(torch.device("cpu"))
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{int(total[3]):,} tokens in blocks of {context:,}, means of {mean_tokens:,}, float32; hfkv {said['hfkv']}, "
        f"torch {said['torch']}, transformers {said['transformers']}, {said['processor']}"
    )


if __name__ == "__main__":
    typer.run(main)
