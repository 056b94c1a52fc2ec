"""Compiles kernels for a GPU without having one: the interpreter takes much that a compiler refuses.

Each argument of ``python -m tests.kernels.compiling`` is one kernel: "<compute capability> <operation> <key codec>
<value codec> <dtype> <head dim> <page size> <options ...>", or "<compute capability> <gemv or gemm> <form of the
experts> <dtype> <tokens> <inputs> <options ...>". The option "transposed" is of values with tokens side by side, "mean"
of keys less their mean, all of whose numbers are turned. Those with a number are "groups:G", query heads a kv head, and
of experts "outputs:N" and "experts:E", of which each token has "top:K".
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hfkv.codecs.key_mean import KeyMean
from hfkv.codecs.waves import Waves
from hfkv.kernels.experts import triton as triton_experts
from hfkv.kernels.experts import triton_combine as triton_experts_combine
from hfkv.kernels.experts import triton_slots as triton_experts_slots
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.placed_mean import PlacedMean
from hfkv.kernels.selftest.inputs import turned
from hfkv.kernels.triton import append as triton_append
from hfkv.kernels.triton import latent as triton_latent
from hfkv.kernels.triton import merge as triton_merge
from hfkv.kernels.triton import operator as triton_operator
from hfkv.kernels.triton.decode import decode_attention
from hfkv.kernels.triton.prefill import prefill_attention
from hfkv.kernels.triton.tiling import LITTLE_SHARED_MEMORY, SHARED_MEMORY, Device
from hfkv.stores.layout import Layout
from tests.kernels.expert_cases import choose, stack
from tests.kernels.held import garbage

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
POINTERS |= {torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32"}
# What one program may have of it, in bytes.
SHARED_LIMITS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Beside latents, whose dimensions are the head dim.
ROTARY_DIM = 64
# Rows of a product, at least.
MIN_ROWS = 16
APPEND, MERGE = triton_append._append_kernel, triton_merge._merge_kernel
LATENT = triton_latent._latent_kernel
ATTENTION, PRODUCT_DTYPES = triton_operator._attention_kernel, triton_operator.product_dtypes
DIGITS, DIGITS_CONSTANTS = triton_operator._digits_kernel, triton_operator.digits_constants
GEMV, GEMM = triton_experts._gemv_kernel, triton_experts._gemm_kernel
TILE, COMBINE = triton_experts_slots._tile_kernel, triton_experts_combine._combine_kernel


@dataclass(frozen=True)
class Binary:
    """What the compiler made of a kernel.

    Attributes:
        name: the kernel's.
        constants: its compile-time constants by name, arguments that are 1 or None among them.
        options: what it was compiled with, `num_warps` among them.
        compiled: Triton's own object.
    """

    name: str
    constants: dict[str, Any]
    options: dict[str, Any]
    compiled: Any


# All that was compiled in this process.
BINARIES: list[Binary] = []


class Compiled:
    """A kernel that is compiled for its arguments instead of launched."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *arguments: Any, **options: Any) -> None:
        signature, constants, attributes = {}, {}, {}
        for index, (parameter, argument) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            is_one = isinstance(argument, int) and argument == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or argument is None or is_one:
                signature[parameter.name] = "constexpr"
                constants[(index,)] = argument
            elif isinstance(argument, torch.Tensor):
                signature[parameter.name] = POINTERS[argument.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(argument, float) else "i32"
                if signature[parameter.name] == "i32" and argument % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        assert compiled.metadata.shared <= SHARED_LIMITS[self.capability], compiled.metadata.shared
        named = {self.kernel.params[index].name: value for (index,), value in constants.items()}
        BINARIES.append(Binary(self.kernel.__name__, named, options, compiled))
        print(self.kernel.__name__, compiled.metadata.shared, "bytes of shared memory")


def target(capability: int) -> None:
    """Makes every launch a compilation for a GPU of `capability`."""
    shared_memory = SHARED_MEMORY.get(divmod(capability, 10), LITTLE_SHARED_MEMORY)
    triton_append._append_kernel = Compiled(APPEND, capability)
    triton_append.rows_together = lambda device: 1
    triton_merge._merge_kernel = Compiled(MERGE, capability)
    triton_operator._attention_kernel = Compiled(ATTENTION, capability)
    triton_operator._digits_kernel = Compiled(DIGITS, capability)
    triton_operator.digits_constants = lambda *arguments: DIGITS_CONSTANTS(*arguments[:3], torch.device("cuda"))
    triton_latent._latent_kernel = Compiled(LATENT, capability)
    triton_experts._gemv_kernel = Compiled(GEMV, capability)
    triton_experts._gemm_kernel = Compiled(GEMM, capability)
    triton_experts_slots._tile_kernel = Compiled(TILE, capability)
    triton_experts_combine._combine_kernel = Compiled(COMBINE, capability)
    for module in (triton_operator, triton_latent, triton_experts):
        module.device_of = lambda device: Device(132, shared_memory)
        module.has_assembly = lambda device: True
        module.product_dtypes = lambda dtype, codec, device: PRODUCT_DTYPES(dtype, codec, torch.device("cuda"))


def _number(options: list[str], name: str, default: int) -> int:
    """Gives the number of option `name`, written "name:number"."""
    return next((int(option.split(":")[1]) for option in options if option.startswith(f"{name}:")), default)


def run(operation: str, codecs: tuple[str, str], dtype: str, head_dim: int, page_size: int, options: list[str]) -> None:
    length, cpu = 64, torch.device("cpu")
    columns = -(-2 * length // page_size) if page_size else 0
    spans = tuple((0, min(page_size, length - low)) for low in range(0, length, page_size)) if page_size else ()
    layout = Layout(length, table=torch.zeros(2, columns, dtype=torch.long) if page_size else None, spans=spans)
    shape = (2, 2, page_size or 2 * length, head_dim)
    keys, values = (garbage(codec, shape, getattr(torch, dtype), cpu) for codec in codecs)
    if "transposed" in options:
        values = turned(values)
    if "mean" in options:
        waves = Waves(torch.ones(head_dim // 2, dtype=torch.float64), False, head_dim)
        keys = keys._replace(mean=PlacedMean(KeyMean(torch.zeros(2, head_dim), waves), (0, 0)))
    num_queries = length if operation == "prefill" else 1
    num_queries = 4 if "few" in options else num_queries
    num_heads = 16 if "wide" in options else 2 * _number(options, "groups", 4)
    query = torch.zeros(2, num_heads, num_queries, head_dim, dtype=getattr(torch, dtype))
    if operation.startswith("latent"):
        # A set of latents and one of rotary keys, for the 128 heads of DeepSeek-V3.
        keys, values = (
            garbage(codecs[0], (2, 1, page_size or 2 * length, dim), query.dtype, cpu) for dim in (head_dim, ROTARY_DIM)
        )
        query = query.new_zeros(2, 128, 1, head_dim + ROTARY_DIM)
    bounds = torch.zeros(2, num_queries, dtype=torch.long) if "bounds" in options else None
    mask = torch.ones(2, query.shape[1], num_queries, length, dtype=torch.bool) if "mask" in options else None
    visibility = Visibility(length, (0, 0), bounds=bounds, mask=mask)
    scoring = Scoring(0.1, softcap=30.0, sink_logits=query[0, :, 0, 0]) if "scoring" in options else Scoring(0.1)
    if operation == "latent":
        triton_latent.latent_attention(query, keys, values, layout, visibility, scoring, num_splits=4)
    elif operation == "latent-append":
        new = query[:, :1, :, :head_dim], query[:, :1, :, head_dim:]
        triton_append.append(*new, keys, values, layout)
    elif operation == "append":
        triton_append.append(query[:, :2], query[:, :2], keys, values, layout)
    elif operation == "prefill":
        prefill_attention(query, keys, values, layout, visibility, scoring)
    else:
        decode_attention(query, keys, values, layout, visibility, scoring, num_splits=4)


def run_experts(
    kernel: Literal["gemv", "gemm"], form: str, dtype: str, num_tokens: int, num_inputs: int, options: list[str]
) -> None:
    cpu, num_experts, num_outputs = (
        torch.device("cpu"),
        _number(options, "experts", 8),
        _number(options, "outputs", 256),
    )
    top_k = _number(options, "top", 2)
    slots = choose(num_tokens, top_k, num_experts, cpu)
    x = torch.zeros(num_tokens, num_inputs, dtype=getattr(torch, dtype))
    parts = stack(form, (num_experts, num_outputs, num_inputs), x.dtype, cpu)
    bias = x.new_zeros(num_experts, num_outputs) if "bias" in options else None
    y = triton_experts.expert_linear(x, parts, slots, num_outputs, bias, rows_are_slots=False, kernel=kernel)
    if "combine" in options:
        triton_experts_combine.combine(y, torch.zeros(num_tokens, top_k), x.dtype)


def compile_kernel(kernel: str) -> None:
    """Compiles one kernel, described as an argument of this module is."""
    capability, operation, *rest = kernel.split()
    target(int(capability))
    if operation in ("gemv", "gemm"):
        form, dtype, num_tokens, num_inputs, *options = rest
        run_experts(operation, form, dtype, int(num_tokens), int(num_inputs), options)  # type: ignore[arg-type]
    else:
        key_codec, value_codec, dtype, head_dim, page_size, *options = rest
        run(operation, (key_codec, value_codec), dtype, int(head_dim), int(page_size), options)


if __name__ == "__main__":
    for kernel in sys.argv[1:]:
        compile_kernel(kernel)
