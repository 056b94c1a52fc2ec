"""What was said on the command line of ``hfkv bench``, as a `Setting`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfkv.cli.errors import CommandError
from hfkv.cli.generate import check_kv
from hfkv.cli.loading import pick_device, pick_dtype
from hfkv.policy.errors import RequestError

if TYPE_CHECKING:
    from hfkv.bench import Setting

# Contexts by suite; a CPU and the shape tiny get less of it.
CONTEXTS = {"attention": (32_768,), "memory": (32_768,), "step": (512, 16_384), "prefill": (4096,), "reuse": (4096,)}
TINY_CONTEXTS = (512,)
# Tokens of a call in the suite moe: decoding, and then reading prompts.
TOKENS = {"cpu": (1, 8, 128, 1024), "other": (1, 32, 128, 4096)}
# A step or a prompt takes longer than a call of experts or of a layer, of which many numbers of tokens are timed.
SECONDS, MOE_SECONDS, MLA_SECONDS = 10.0, 4.0, 4.0
# What says what to measure, and what of it a suite takes; the suites of caches take `_OF_CACHES`.
_OPTIONS = {
    "model": "--model",
    "layers": "--layers",
    "contexts": "--context",
    "batch": "--batch",
    "kvs": "--kv",
    "tokens": "--tokens",
    "moes": "--moe",
    "parts": "--part",
    "queries": "--queries",
}
_OF_CACHES = ("model", "layers", "contexts", "batch", "kvs")
_TAKES = {"moe": ("tokens", "moes"), "mla": ("model", "layers", "batch", "kvs", "tokens", "parts", "queries")}


@dataclass(frozen=True)
class Words:
    """The options as they were given; None where they were not."""

    suite: str | None
    shape: str | None
    model: str | None
    layers: int | None
    contexts: str | None
    batch: int | None
    ragged: str | None
    dtype: str
    device: str
    kvs: list[str] | None
    peers: str
    steps: int | None
    seconds: float | None
    tokens: str | None = None
    moes: list[str] | None = None
    parts: str | None = None
    queries: str | None = None
    busy: int = 0


def setting_of(words: Words, seed: int) -> Setting:
    """What to measure.

    Raises:
        CommandError: a word is unknown, or words contradict each other.
    """
    from hfkv.bench import SUITES, Setting
    from hfkv.bench.contenders import GRAPHS
    from hfkv.bench.setting import DEFAULT_KV, GRAPHS_KV, REUSE_KV

    if words.suite not in SUITES:
        said = f"the suite {words.suite!r} is unknown" if words.suite else "name a suite, or a result with --from"
        raise CommandError(f"{said}; allowed: {', '.join(SUITES)}")
    _refuse(words)
    if words.shape is not None and words.model is not None:
        raise CommandError("--shape and --model both say what to build; give one of them")
    if words.ragged is not None and words.suite != "prefill":
        raise CommandError(f"--ragged is for the suite prefill only, got the suite {words.suite!r}; leave it out")
    if words.suite == "moe":
        return _moe_setting(words, seed)
    if words.ragged is not None and (words.contexts is not None or words.batch is not None):
        raise CommandError("--ragged says the rows and their tokens; leave --context and --batch out")
    for kv in words.kvs or ():
        check_kv(kv.removesuffix(GRAPHS))
    if words.suite == "mla":
        return _mla_setting(words, seed)
    device = pick_device(words.device)
    dtype = pick_dtype(words.dtype)
    shape = words.shape
    if shape is None and words.model is None:
        shape = "small" if device.type == "cpu" and words.suite in ("step", "prefill", "reuse") else "llama-8b"
    kvs = words.kvs or [*DEFAULT_KV, *(GRAPHS_KV if words.suite == "step" and device.type == "cuda" else ())]
    if words.suite == "reuse":
        kvs = words.kvs or list(REUSE_KV)
    contexts = TINY_CONTEXTS if shape == "tiny" else CONTEXTS[words.suite]
    if words.contexts is not None:
        contexts = _numbers("--context", words.contexts)
    try:
        return Setting(
            suite=words.suite,
            shape=shape,
            model=words.model,
            layers=words.layers,
            contexts=() if words.ragged else contexts,
            batch=1 if words.batch is None else words.batch,
            ragged=() if words.ragged is None else _numbers("--ragged", words.ragged),
            dtype="bfloat16" if dtype is None else str(dtype).removeprefix("torch."),
            device=str(device),
            kvs=tuple(kvs),
            peers=None if words.peers == "all" else tuple(name.strip() for name in words.peers.split(",")),
            steps=words.steps,
            seconds=SECONDS if words.seconds is None else words.seconds,
            seed=seed,
            busy=words.busy,
        )
    except RequestError as error:
        raise CommandError(str(error)) from error


def _moe_setting(words: Words, seed: int) -> Setting:
    from hfkv.bench import Setting
    from hfkv.bench.setting import DEFAULT_MOE

    device = pick_device(words.device)
    dtype = pick_dtype(words.dtype)
    kind = "cpu" if device.type == "cpu" else "other"
    try:
        return Setting(
            suite="moe",
            shape=words.shape or ("moe-small" if kind == "cpu" else "qwen3-30b-a3b"),
            contexts=TOKENS[kind] if words.tokens is None else _numbers("--tokens", words.tokens),
            dtype="bfloat16" if dtype is None else str(dtype).removeprefix("torch."),
            device=str(device),
            moes=DEFAULT_MOE if words.moes is None else tuple(words.moes),
            peers=None if words.peers == "all" else tuple(name.strip() for name in words.peers.split(",")),
            steps=words.steps,
            seconds=MOE_SECONDS if words.seconds is None else words.seconds,
            seed=seed,
            busy=words.busy,
        )
    except RequestError as error:
        raise CommandError(str(error)) from error


def _mla_setting(words: Words, seed: int) -> Setting:
    from hfkv.bench import MLASetting
    from hfkv.bench.mla_setting import MLA_KV, PARTS, cases_of

    if words.peers.lower() not in ("all", "dynamiccache"):
        raise CommandError(
            f"the suite mla is against DynamicCache and sdpa only, got --peers {words.peers!r}; leave it out"
        )
    device = pick_device(words.device)
    dtype = pick_dtype(words.dtype)
    shape = words.shape
    if shape is None and words.model is None:
        shape = "deepseek-v2-lite" if device.type == "cpu" else "deepseek-v3"
    parts = PARTS if words.parts is None else tuple(part.strip() for part in words.parts.split(","))
    try:
        return MLASetting(
            shape=shape,
            model=words.model,
            layers=words.layers,
            batch=1 if words.batch is None else words.batch,
            dtype="bfloat16" if dtype is None else str(dtype).removeprefix("torch."),
            device=str(device),
            kvs=MLA_KV if words.kvs is None else tuple(words.kvs),
            cases=cases_of(
                parts,
                () if words.tokens is None else _numbers("--tokens", words.tokens),
                () if words.queries is None else _numbers("--queries", words.queries),
            ),
            steps=words.steps,
            seconds=MLA_SECONDS if words.seconds is None else words.seconds,
            seed=seed,
            busy=words.busy,
        )
    except RequestError as error:
        raise CommandError(str(error)) from error


def _refuse(words: Words) -> None:
    """Options that mean nothing in the suite."""
    taken = _TAKES.get(str(words.suite), _OF_CACHES)
    for name, option in _OPTIONS.items():
        if getattr(words, name) is not None and name not in taken:
            others = ", ".join(_OPTIONS[name] for name in taken)
            raise CommandError(f"{option} means nothing in the suite {words.suite!r}; it takes {others}; leave it out")


def _numbers(option: str, given: str) -> tuple[int, ...]:
    words = [word.strip() for word in given.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise CommandError(f"{option} takes whole numbers with commas, such as 512,1024; got {given!r}")
    return tuple(int(word) for word in words)
