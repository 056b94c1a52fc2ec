"""One model and one text under several caches: what ``hfkv eval`` shows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkv.cli.demo.runs import describe_run
from hfkv.cli.errors import CommandError, first_line
from hfkv.cli.generate import check_kv
from hfkv.policy.config import KVConfig
from hfkv.policy.units import MOST_COUNT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from hfkv.eval import CacheReport, FoundCodecs

BUNDLED = "tiny-lm (bundled)"
BUNDLED_TEXT = "held-out Python source (bundled)"
DEFAULT_KV = ("int8", "int4", "window:512")
# With the defaults and the bundled model, about a minute on two slow cores.
DEFAULT_TOKENS = 16_384
# No tokenizer makes so few tokens of a text that a longer piece of it would be needed.
CHARACTERS_A_TOKEN = 64
MOST_DEPTHS = 1000


@dataclass(frozen=True)
class EvalSetting:
    """What an evaluation measures.

    Attributes:
        kvs: The configs, without the full cache unless it was named.
        context: Tokens a block; None reads the text as one stream.
        tokens: Tokens of the text to score; None takes `DEFAULT_TOKENS`, or all where the text has fewer.
        chunk: Tokens a forward.
        lengths: Tokens of the pass-key prompts; empty where none are wanted.
        num_depths: Depths the keys lie at.
        trials: Prompts of each depth and length.
    """

    kvs: tuple[str, ...] = DEFAULT_KV
    context: int | None = 1024
    tokens: int | None = None
    chunk: int = 128
    lengths: tuple[int, ...] = (512, 1024, 2048)
    num_depths: int = 5
    trials: int = 4

    def __post_init__(self) -> None:
        sizes = {"context": self.context, "tokens": self.tokens, "chunk": self.chunk, "trials": self.trials}
        for name, size in {**sizes, "pass-key-depths": self.num_depths}.items():
            least = 2 if name in ("context", "tokens") else 1
            if size is not None and size < least:
                raise CommandError(f"--{name} must be at least {least}, got {size}")
            most = MOST_DEPTHS if name == "pass-key-depths" else MOST_COUNT
            if size is not None and size > most:
                raise CommandError(f"--{name} must be at most {most:,}, got {size}")
        for kv in self.kvs:
            check_kv(kv)


@dataclass(frozen=True)
class EvalRow:
    """What one cache cost: on the text, and in pass keys found, [depths][lengths], 0 to 1 (None without)."""

    text: CacheReport
    pass_keys: list[list[float]] | None

    @property
    def keys_found(self) -> float | None:
        """Share of all pass keys, 0 to 1."""
        if self.pass_keys is None:
            return None
        cells = [share for row in self.pass_keys for share in row]
        return sum(cells) / len(cells)


@dataclass(frozen=True)
class EvalReport:
    """An evaluation's numbers.

    Attributes:
        model: Its name, or the bundled one's.
        text: The file's name, or the bundled one's.
        num_tokens: Tokens read of it.
        setting: What was measured.
        depths: Where the pass keys lay.
        rows: One row a config, the full cache's first.
        seconds: The whole of it, without loading.
        machine: Where: processor, device, dtype, threads, versions.
        max_positions: The longest text the model was made for, in tokens; None where its config does not say.
        found: For each config that is a promise, the codecs found and what was measured on the calibration text.
    """

    model: str
    text: str
    num_tokens: int
    setting: EvalSetting
    depths: list[float]
    rows: list[EvalRow]
    seconds: float
    machine: dict[str, Any]
    max_positions: int | None
    found: Mapping[str, FoundCodecs] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that was read through one cache."""
        block = self.num_tokens if self.setting.context is None else min(self.setting.context, self.num_tokens)
        return max(block, *self.setting.lengths, 0)

    def write_json(self, path: Path, command: str) -> None:
        """Writes everything to a file."""
        rows = [
            {**asdict(row.text), "pass_keys": row.pass_keys, "pass_keys_found": row.keys_found} for row in self.rows
        ]
        found = {
            name: {
                "kv": json.loads(each.kv.to_json()),
                "promised": each.promised,
                "loss_change": each.loss_change,
                "kl": each.kl,
                "num_tokens": each.num_tokens,
                "alone": each.alone,
            }
            for name, each in self.found.items()
        }
        content = {"command": command, **asdict(replace(self, found={})), "rows": rows, "found": found}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    setting: EvalSetting,
    names: tuple[str, str] = (BUNDLED, BUNDLED_TEXT),
    found: Mapping[str, FoundCodecs] | None = None,
    calibration: str | None = None,
    on_plan: Callable[[int], None] = lambda num_tokens: None,
    on_tokens: Callable[[str, int], None] = lambda what, num_tokens: None,
) -> EvalReport:
    """Runs every config of a setting, and the full cache first.

    Args:
        model: a causal language model or a `PeftModel` around one, not patched; it is left as it was.
        tokenizer: its tokenizer.
        text: what is scored, and what the pass keys are hidden in.
        setting: what to measure.
        names: what to call the model and the text.
        found: the codecs of configs that are promises; see `find`. None where there are no such configs.
        calibration: the text that the mean of keys is taken over, for codecs that take one; None for the bundled one.
        on_plan: called once with how many tokens will be read in all.
        on_tokens: called with what is running and how many tokens it has just read.

    Raises:
        CommandError: a config does not fit the model, the text is too short, or there is not enough memory.
    """
    import torch

    from hfkv.eval import compare, even_depths, pass_key_grid
    from hfkv.eval.compare import distinct
    from hfkv.patches.keys.means import MOST_TOKENS

    found = found or {}
    kvs = {name: found[name].kv if name in found else kv for name, kv in distinct(setting.kvs).items()}
    for name, kv in kvs.items():
        _check_fits(model, name, kv)
    ids = _token_ids(tokenizer, text, setting)
    depths = even_depths(setting.num_depths) if setting.lengths else []
    filler = text[: CHARACTERS_A_TOKEN * max(len(ids), *setting.lengths, 0)]
    on_plan(len(kvs) * (len(ids) + sum(setting.lengths) * len(depths) * setting.trials))
    start = time.perf_counter()
    try:
        read = None
        if calibration is not None:
            some = calibration[: CHARACTERS_A_TOKEN * MOST_TOKENS]
            read = torch.tensor(tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"])
        reports = compare(
            *(model, ids, kvs, setting.context, setting.chunk, lambda kv, count: on_tokens(f"text: {kv}", count)), read
        )
        grids = {}
        for name, kv in kvs.items() if setting.lengths else ():
            on_keys = partial(on_tokens, f"pass keys: {name}")
            grids[name] = pass_key_grid(
                *(model, tokenizer, filler, setting.lengths, depths, setting.trials, kv),
                on_tokens=on_keys,
                calibration=read,
            ).tolist()
    except (ValueError, NotImplementedError) as error:
        raise CommandError(str(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CommandError(
            f"out of memory: {first_line(error)} Every config's cache is held beside the full one: take fewer --kv at "
            "once, a smaller --context or --tokens, or shorter --pass-key-lengths."
        ) from error
    return EvalReport(
        model=names[0],
        text=names[1],
        num_tokens=len(ids),
        setting=setting,
        depths=depths,
        rows=[EvalRow(report, grids.get(report.kv)) for report in reports],
        seconds=time.perf_counter() - start,
        machine=describe_run(model),
        max_positions=getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None),
        found=found,
    )


def find(model: Any, tokenizer: PreTrainedTokenizerBase, setting: EvalSetting, text: str) -> dict[str, FoundCodecs]:
    """Finds the codecs of those configs of a setting that are promises, on a text, read in blocks like the other one.

    Raises:
        CommandError: a promise cannot be kept, or the text is too short.
    """
    from hfkv.eval import find_codecs
    from hfkv.eval.compare import distinct

    promises = {name: kv for name, kv in distinct(setting.kvs).items() if kv.loss_change is not None}
    if not promises:
        return {}
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    found = {}
    for name, kv in promises.items():
        rest, share = replace(kv, loss_change=None), kv.loss_change
        try:
            found[name] = find_codecs(model, ids, share or 0, kv=rest, context=setting.context)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise CommandError(f"--kv {name!r} on {type(model).__name__}: {error}") from error
    return found


def _check_fits(model: Any, name: str, kv: KVConfig) -> None:
    from hfkv.patches.patch import patch

    try:
        patch(model, kv).undo()
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CommandError(f"--kv {name!r} on {type(model).__name__}: {error}") from error


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, setting: EvalSetting) -> torch.Tensor:
    wanted = setting.tokens or DEFAULT_TOKENS
    # verbose: no warning that the text is longer than the model's context; it is cut into blocks.
    ids = tokenizer(text[: wanted * CHARACTERS_A_TOKEN], add_special_tokens=False, return_tensors="pt", verbose=False)[
        "input_ids"
    ][0]
    if setting.tokens is not None and len(ids) < setting.tokens:
        raise CommandError(f"--tokens may be at most {len(ids)}, the text's length; got {setting.tokens}")
    return ids[:wanted].long()
