"""One byte-level model under every cache, side by side in one process: what ``hfkv demo`` shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkv.cli.errors import CommandError
from hfkv.cli.stream import TokenClock

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOCK = "DynamicCache"
# A loss takes about as long as so many new tokens: what a step of the progress bar is worth.
LOSS_STEPS = 32
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class DemoSetting:
    """What a demo measures.

    Attributes:
        prompt_bytes: Length of the prompt; the model has one token a byte.
        max_new_tokens: Tokens generated after it.
        window: Size of the sliding windows, in tokens.
        rounds: Timed runs of each cache; the caches take turns.
        loss_bytes: Length of the held-out text the loss is measured on.
        loss_context: Bytes the text is cut into: several windows long, so that the windows let go of something.
    """

    prompt_bytes: int = 1546  # ends at the head of a function much like the two before it
    max_new_tokens: int = 160
    window: int = 512
    rounds: int = 2
    loss_bytes: int = 8192
    loss_context: int = 2048

    def __post_init__(self) -> None:
        for name, least in (
            ("prompt_bytes", 1),
            ("max_new_tokens", 2),
            ("window", 8),
            ("rounds", 1),
            ("loss_bytes", 1),
        ):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise CommandError(f"--{option} must be at least {least}, got {getattr(self, name)}")

    def caches(self) -> list[tuple[str, str | None]]:
        """The caches to run, as their class and their `kv` string (None for transformers' own)."""
        return [
            (STOCK, None),
            ("KVCache", "none"),
            ("PagedCache", "paged"),
            ("OffloadedCache", "offload"),
            ("QuantizedCache", "int8"),
            ("QuantizedCache", "fp8"),
            ("QuantizedCache", "int4"),
            ("SlidingWindowCache", f"window:{self.window}"),
            ("KVCache", f"int8+window:{self.window}"),
            ("KVCache", "int8+offload+paged"),
        ]


@dataclass(frozen=True)
class DemoRow:
    """What one cache did.

    Attributes:
        cache: Its class.
        kv: Its policies as a string; None for transformers' own.
        allocated_bytes: Bytes allocated at the end.
        held_bytes: Bytes of the tokens it keeps.
        held_ratio: Those bytes over DynamicCache's.
        tokens_per_second: New tokens after the first, best round.
        num_same_tokens: New tokens before the first that differs from DynamicCache's.
        num_new_tokens: New tokens.
        nats_per_byte: Held-out loss.
        loss_change_percent: Its change from DynamicCache's.
    """

    cache: str
    kv: str | None
    allocated_bytes: int
    held_bytes: int
    held_ratio: float
    tokens_per_second: float
    num_same_tokens: int
    num_new_tokens: int
    nats_per_byte: float
    loss_change_percent: float


@dataclass(frozen=True)
class DemoReport:
    """A demo's numbers and the text it made.

    Attributes:
        prompt: The held-out text that was continued.
        text: Its continuation under DynamicCache.
        rows: One row a cache, DynamicCache first.
        setting: What was measured.
        machine: Where: processor, device, dtype, threads, versions.
    """

    prompt: str
    text: str
    rows: list[DemoRow]
    setting: DemoSetting
    machine: dict[str, Any] = field(default_factory=dict)

    def write_json(self, path: Path) -> None:
        """Writes everything to a file."""
        path.write_text(json.dumps({"command": "hfkv demo", **asdict(self)}, indent=2) + "\n", encoding="utf-8")


@dataclass
class _DemoRun:
    """One cache's measurements on their way to a `DemoRow`."""

    cache: str
    kv: str | None
    ids: list[int] = field(default_factory=list)
    allocated_bytes: int = 0
    held_bytes: int = 0
    tokens_per_second: float = 0.0
    nats: float = 0.0

    @property
    def label(self) -> str:
        return self.kv or self.cache


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: str,
    setting: DemoSetting,
    on_step: Callable[[str], None] = lambda what: None,
) -> DemoReport:
    """Runs every cache of a setting in this process, taking turns, after a warm-up of each.

    Args:
        model: a byte-level causal language model, unpatched; it is left as it was.
        tokenizer: its tokenizer.
        held_out: text it was not trained on.
        setting: what to measure.
        on_step: called with what is running, `num_steps` times in all.

    Raises:
        CommandError: the text is too short for the prompt or the loss.
    """
    for option, size in (("--prompt-bytes", setting.prompt_bytes), ("--loss-bytes", setting.loss_bytes)):
        if size > len(held_out):
            raise CommandError(f"{option} may be at most {len(held_out)}, the held-out text's length; got {size}")
    prompt = held_out[: setting.prompt_bytes]
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    runs = [_DemoRun(cache, kv) for cache, kv in setting.caches()]
    for run in runs:
        _generate(model, inputs, run, WARM_UP_TOKENS, partial(on_step, f"warming up: {run.label}"))
    for _ in range(setting.rounds):
        for run in runs:
            _generate(model, inputs, run, setting.max_new_tokens, partial(on_step, f"generating: {run.label}"))
    # verbose: no warning that the text is longer than the model's context; it is cut into blocks.
    ids = tokenizer(held_out[: setting.loss_bytes], add_special_tokens=False, return_tensors="pt", verbose=False)[
        "input_ids"
    ][0]
    for run in runs:
        run.nats = _loss(model, ids, run.kv, setting.loss_context)
        for _ in range(LOSS_STEPS):
            on_step(f"held-out loss: {run.label}")
    text = tokenizer.decode(runs[0].ids, skip_special_tokens=True)
    return DemoReport(prompt, text, [_row(run, runs[0]) for run in runs], setting, describe_run(model))


def num_steps(setting: DemoSetting) -> int:
    """How often `measure` calls `on_step`."""
    return len(setting.caches()) * (WARM_UP_TOKENS + setting.rounds * setting.max_new_tokens + LOSS_STEPS)


def _cached(model: PreTrainedModel, kv: str | None) -> Any:
    """A patch that gives the model the cache; transformers' own model is left alone."""
    from hfkv.patches.patch import patch

    return nullcontext() if kv is None else patch(model, kv)


def _generate(
    model: PreTrainedModel, inputs: Any, run: _DemoRun, num_tokens: int, on_token: Callable[[], None]
) -> None:
    clock = TokenClock(on_token)
    with _cached(model, run.kv):
        output: Any = model.generate(
            **inputs,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
        )
    cache = output.past_key_values
    run.ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    run.allocated_bytes, run.held_bytes = _bytes_of(cache)
    if num_tokens > WARM_UP_TOKENS:
        run.tokens_per_second = max(run.tokens_per_second, clock.tokens_per_second or 0.0)


def _bytes_of(cache: Any) -> tuple[int, int]:
    from hfkv.cache.kv_cache import KVCache

    if isinstance(cache, KVCache):
        return cache.nbytes(), cache.held_bytes()
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def _loss(model: PreTrainedModel, ids: torch.Tensor, kv: str | None, context: int) -> float:
    from transformers import DynamicCache

    from hfkv.cache.kv_cache import KVCache
    from hfkv.eval import held_out_loss

    def make_cache() -> DynamicCache:
        return DynamicCache(config=model.config) if kv is None else KVCache(model, kv)

    with _cached(model, kv):
        return held_out_loss(model, ids, context=context, make_cache=make_cache, batch_size=2).nats


def _row(run: _DemoRun, stock: _DemoRun) -> DemoRow:
    same = next((i for i, pair in enumerate(zip(run.ids, stock.ids, strict=True)) if pair[0] != pair[1]), len(run.ids))
    return DemoRow(
        cache=run.cache,
        kv=run.kv,
        allocated_bytes=run.allocated_bytes,
        held_bytes=run.held_bytes,
        held_ratio=run.held_bytes / stock.held_bytes,
        tokens_per_second=run.tokens_per_second,
        num_same_tokens=same,
        num_new_tokens=len(run.ids),
        nats_per_byte=run.nats,
        loss_change_percent=100 * (run.nats / stock.nats - 1),
    )


def describe_run(model: PreTrainedModel) -> dict[str, Any]:
    """Processor, device, dtype, threads and versions: what a number means nothing without."""
    from hfkv.measure.machine import describe_machine

    machine = describe_machine(model.device)
    processor = machine["accelerator"] or machine["processor"]
    return {**machine, "processor": processor, "dtype": str(model.dtype).removeprefix("torch.")}
