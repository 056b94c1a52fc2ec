"""`Setting`: what a run measures."""

from __future__ import annotations

from dataclasses import dataclass

from hfkv.bench.errors import BenchError

SUITES = ("attention", "step", "memory", "prefill", "reuse", "moe")
DEFAULT_KV = ("none", "int8", "int4", "fp8", "paged", "int8+paged", "window:1024")
GRAPHS_KV = ("none+graphs", "int8+graphs", "int8+paged+graphs")  # besides, for steps on a GPU
REUSE_KV = ("none", "none+reuse", "int8", "int8+reuse")  # of the suite reuse
DEFAULT_MOE = ("auto", "int8", "int4", "auto+lora")  # of the suite moe


@dataclass(frozen=True)
class Setting:
    """What a run measures.

    Attributes:
        suite: ``"attention"``, ``"step"``, ``"memory"``, ``"prefill"``, ``"reuse"`` or ``"moe"``.
        shape: a name in `SHAPES`, in the suite moe in `MOE_SHAPES`; None where `model` is given.
        model: a folder or a name on the Hub, of which only the config is read; may be None.
        layers: layers to build or to take turns over; None for the suite's own choice.
        contexts: tokens in the cache before a step, or of a prompt, or of a call in the suite moe.
        batch: rows.
        ragged: real tokens of each row of one left-padded prompt, in place of `contexts` and `batch`; prefill only.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: such as ``"cpu"`` or ``"cuda:0"``.
        kvs: hfkv's contenders; not in the suite moe.
        peers: names in `PEERS`, in the suite moe in `MOE_PEERS`; None for all that can run. DynamicCache, there
            grouped_mm, is always among them.
        steps: timed steps of each contender; None for as many as fit in `seconds`.
        seconds: how long the contenders of one context take turns at least, filling their caches left out.
        seed: of the random keys, values, tokens and weights.
        moes: hfkv's contenders in the suite moe.
        busy: other processes that keep cores busy while the contenders take turns.
    """

    suite: str
    shape: str | None = None
    model: str | None = None
    layers: int | None = None
    contexts: tuple[int, ...] = ()
    batch: int = 1
    ragged: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    device: str = "cpu"
    kvs: tuple[str, ...] = DEFAULT_KV
    peers: tuple[str, ...] | None = None
    steps: int | None = None
    seconds: float = 10.0
    seed: int = 0
    moes: tuple[str, ...] = DEFAULT_MOE
    busy: int = 0

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise BenchError(f"the suite {self.suite!r} is unknown; allowed: {', '.join(SUITES)}")
        if (self.shape is None) == (self.model is None):
            raise BenchError(f"give a shape or a model, one of them; got {self.shape!r} and {self.model!r}")
        if not self.kvs or len(set(self.kvs)) < len(self.kvs):
            raise BenchError(
                f"kv must name different caches, at least one; got {', '.join(self.kvs) or 'none of them'}"
            )
        if not self.moes or len(set(self.moes)) < len(self.moes):
            raise BenchError(
                f"moe must name different experts, at least one; got {', '.join(self.moes) or 'none of them'}"
            )
        if self.ragged and self.suite != "prefill":
            raise BenchError(f"ragged is for the suite prefill only, got the suite {self.suite!r}")
        if not self.contexts and not self.ragged:
            raise BenchError("give a context, in tokens")
        if self.suite == "moe" and (self.layers is not None or self.batch != 1):
            raise BenchError(
                f"the suite moe calls one layer with tokens; leave layers ({self.layers}) and batch ({self.batch}) out"
            )
        sizes = {"layers": self.layers, "batch": self.batch, "steps": self.steps}
        sizes |= {"context": min(self.contexts, default=None), "ragged": min(self.ragged, default=None)}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise BenchError(f"{name} must be at least 1, got {size}")
        if self.busy < 0 or (self.busy and self.suite == "memory"):
            raise BenchError(
                f"busy must be at least 0, and in the suite memory, which has no times, 0; got {self.busy}"
            )
        if not self.seconds > 0:
            raise BenchError(f"seconds must be above 0, got {self.seconds}")
