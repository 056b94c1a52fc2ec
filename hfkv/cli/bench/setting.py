"""What was said on the command line of ``hfkv bench``, as a `Setting`."""

from __future__ import annotations

from typing import Any

from hfkv.bench import Case, Setting, cases_of
from hfkv.bench.contenders import GRAPHS
from hfkv.bench.setting import DEFAULT_KV, DEFAULT_MOE, GRAPHS_KV, HOST_KV, MLA_KV, PARTS, REUSE_KV
from hfkv.cli.errors import CommandError
from hfkv.cli.generate import check_kv
from hfkv.cli.loading import pick_device, pick_dtype
from hfkv.cli.said import whole_numbers

# By suite: the shape on a CPU and elsewhere, tokens, and how long contenders take turns. Others are as SHAPE.
SHAPE = "llama-8b"
SHAPES = {"moe": ("moe-small", "qwen3-30b-a3b"), "mla": ("deepseek-v2-lite", "deepseek-v3")}
# In host only what Python and torch themselves cost is of interest.
SHAPES["host"] = ("host", "host")
SHAPES |= dict.fromkeys(("step", "prefill", "reuse"), ("small", SHAPE))
# Tokens on a CPU and elsewhere; in the suite moe of a call: decoding, and then reading prompts.
CONTEXTS = {
    "attention": ((32_768,), (32_768,)),
    "memory": ((32_768,), (32_768,)),
    "step": ((512, 16_384), (512, 16_384)),
    "prefill": ((4096,), (4096,)),
    "reuse": ((4096,), (4096,)),
    "host": ((64,), (64,)),
    "moe": ((1, 8, 128, 1024), (1, 32, 128, 4096)),
}
TINY_CONTEXTS = (512,)
# A step or a prompt takes longer than a call of experts or of a layer, of which many numbers of tokens are timed.
SECONDS = {"moe": 4.0, "mla": 4.0}


def setting_of(suite: str, given: dict[str, Any]) -> Setting:
    """What to measure: a suite by its name, and values of the options it takes, None where they were not said.

    Raises:
        CommandError, BenchError: a word is unknown, or words contradict each other.
    """
    shape, model, ragged, peers = given["shape"], given.get("model"), given.get("ragged"), given["peers"]
    if shape is not None and model is not None:
        raise CommandError("--shape and --model both say what to build; give one of them")
    if ragged is not None and (given["context"] is not None or given["batch"] is not None):
        raise CommandError("--ragged says the rows and their tokens; leave --context and --batch out")
    for kv in given.get("kv") or ():
        check_kv(kv.removesuffix(GRAPHS))
    if suite == "mla" and peers.lower() not in ("all", "dynamiccache"):
        raise CommandError(f"the suite mla is against DynamicCache and sdpa only, got --peers {peers!r}; leave it out")
    device, dtype = pick_device(given["device"]), pick_dtype(given["dtype"])
    is_other = device.type != "cpu"
    if shape is None and model is None:
        shape = SHAPES.get(suite, (SHAPE, SHAPE))[is_other]
    kvs: tuple[str, ...] = {"mla": MLA_KV, "reuse": REUSE_KV, "host": HOST_KV}.get(suite, DEFAULT_KV)
    if suite == "step" and device.type == "cuda":
        kvs += GRAPHS_KV

    def numbers(option: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        said = given.get(option)
        return default if said is None else whole_numbers(f"--{option}", said)

    contexts: tuple[int, ...] = ()
    if suite != "mla" and ragged is None:
        default = TINY_CONTEXTS if shape == "tiny" else CONTEXTS[suite][is_other]
        contexts = numbers("tokens" if suite == "moe" else "context", default)
    cases: tuple[Case, ...] = ()
    if suite == "mla":
        parts = PARTS if given["part"] is None else [part.strip() for part in given["part"].split(",")]
        cases = cases_of(parts, numbers("tokens"), numbers("queries"))
    return Setting(
        suite=suite,
        shape=shape,
        model=model,
        layers=given.get("layers"),
        contexts=contexts,
        batch=1 if given.get("batch") is None else given["batch"],
        ragged=numbers("ragged"),
        dtype=("float32" if suite == "host" else "bfloat16") if dtype is None else str(dtype).removeprefix("torch."),
        device=str(device),
        kvs=tuple(given.get("kv") or kvs),
        peers=None if suite == "mla" or peers == "all" else tuple(name.strip() for name in peers.split(",")),
        steps=given["steps"],
        seconds=SECONDS.get(suite, 10.0) if given["seconds"] is None else given["seconds"],
        seed=given["seed"],
        moes=tuple(given.get("moe") or DEFAULT_MOE),
        busy=given["busy"],
        cases=cases,
    )
