"""`Crossover`: which products of experts' matrices are the fastest on this machine, measured once or by table."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hfkv.kernels.cpu.packed_matmul import pack, packed_linear
from hfkv.kernels.cpu.threads import num_threads
from hfkv.kernels.native import library as native
from hfkv.kernels.native.experts import expert_numbers, expert_products

logger = logging.getLogger("hfkv")

# "0" switches measuring off: then the table below says.
SWITCH = "HFKV_MEASURE"
FORMS = ("plain", "int8", "int4")
ANY = 1 << 62
_DTYPES = (torch.float32, torch.bfloat16)
# Rows of one expert at which products are timed; its matrix; copies, more than the second cache holds; and turns.
ROWS = (1, 4, 16, 64, 128)
_SHAPE, _COPIES, _TURNS = (512, 1024), 6, 9
_SECONDS = 0.2
# Times of one product vary by so much from run to run.
_SLACK = 1.05

# A product of rows and the index of a matrix.
Way = Callable[[torch.Tensor, int], object]


@dataclass(frozen=True)
class Crossover:
    """What is chosen for experts of one dtype.

    Attributes:
        packs: whether oneDNN's order is nowhere slower than plain matrices.
        most_rows: form -> rows of one expert up to which the native kernels are the fastest; 0 for never.
        microseconds: way -> the times of a product at each of `ROWS` that was measured; empty where a table says.
    """

    packs: bool
    most_rows: dict[str, int]
    microseconds: dict[str, list[float]]

    @property
    def is_measured(self) -> bool:
        return bool(self.microseconds)

    @property
    def gains(self) -> list[float]:
        """How many times as fast packed products were as torch's of plain ones, at each number of rows."""
        times = self.microseconds
        return [stock / packed for stock, packed in zip(times.get("stock", ()), times.get("packed", ()), strict=False)]

    def __str__(self) -> str:
        forms = (f"{form} {_said(rows)}" for form, rows in self.most_rows.items())
        return f"{'packed' if self.packs else 'left plain'}; native products: {', '.join(forms)}"


def _said(rows: int) -> str:
    return "never" if not rows else "of any rows" if rows >= ANY else f"to {rows} rows an expert"


def is_native(form: str, x: torch.Tensor) -> bool:
    """Whether rows `x` `[n, K]` on a CPU meet experts of `form` in the native kernels; a trace does not see these."""
    return len(x) <= most_native_rows(form, x.dtype) and not torch.jit.is_tracing()


def can_decode(dtype: torch.dtype) -> bool:
    """Whether the native kernels decode experts on a CPU to `dtype`."""
    return dtype in _DTYPES and native.library() is not None and not torch.jit.is_tracing()


def most_native_rows(form: str, dtype: torch.dtype) -> int:
    """The rows up to which the native kernels multiply an expert of `form`, on a CPU; 0 where there are none."""
    rows = _most_rows.get((form, dtype))
    if rows is None:
        can = dtype in _DTYPES or (dtype == torch.float16 and form != "plain")
        can = can and native.library() is not None
        rows = _most_rows[form, dtype] = crossover(dtype).most_rows[form] if can else 0
    return rows


# A dictionary, not a cache around the function, which torch.compile would look into.
_most_rows: dict[tuple[str, torch.dtype], int] = {}


@functools.cache
def crossover(dtype: torch.dtype) -> Crossover:
    """What is chosen for experts of `dtype` on this machine; measured where that is not known yet.

    Args:
        dtype: float32 or bfloat16; others follow the table.
    """
    table = by_table(dtype)
    if os.environ.get(SWITCH) == "0" or dtype not in _DTYPES:
        return table
    kept = _place(dtype)
    found = None if kept is None else _read(kept)
    if found is None:
        # A thread of its own: it has none of the modes (autocast, fake tensors, ...) that the caller may be in.
        with ThreadPoolExecutor(1) as thread:
            times = thread.submit(measure, dtype).result()
            if times is not None and not chosen(times, table).packs:
                # Other work takes its turns too: what costs most where it is wrong is looked at twice.
                times = _least(times, thread.submit(measure, dtype).result() or times)
        if times is None:
            logger.info("experts in %s follow a table: torch's threads cannot be set here", dtype)
            return table
        found = chosen(times, table)
        logger.info("measured, once on this machine: experts in %s: %s", dtype, found)
        if kept is not None:
            found = _keep(kept, found)
    return found


def _least(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, list[float]]:
    return {way: [min(pair) for pair in zip(times, other[way], strict=False)] for way, times in one.items()}


def forget() -> None:
    """Forgets what this process has found; files stay."""
    _most_rows.clear()
    crossover.cache_clear()


def by_table(dtype: torch.dtype) -> Crossover:
    """What is chosen without measuring: what 2 cores of an EPYC (AVX-512 with bf16) showed, and less elsewhere."""
    is_there = native.library() is not None
    flags = native.processor()
    many = ANY if dtype == torch.float32 or ("avx512_bf16" in flags and "amx_bf16" not in flags) else 16
    rows = {"plain": min(many, 16) if dtype == torch.bfloat16 else many, "int8": many, "int4": many}
    return Crossover(True, rows if is_there else dict.fromkeys(FORMS, 0), {})


def chosen(microseconds: dict[str, list[float]], table: Crossover) -> Crossover:
    """Decides by times: whatever is chosen is nowhere slower than transformers' own products of plain matrices.

    Args:
        microseconds: times of each way, as `measure` gives them.
        table: what is decided where nothing was measured: packing, without oneDNN.
    """
    stock = microseconds["stock"]
    packs = table.packs
    if "packed" in microseconds:
        packs = all(ours <= _SLACK * other for ours, other in zip(microseconds["packed"], stock, strict=True))
    rows = dict.fromkeys(FORMS, 0)
    for form in FORMS:
        others = stock if form == "plain" else microseconds.get(f"{form} decoded", [])
        for num_rows, ours, other in zip(ROWS, microseconds.get(f"{form} native", []), others, strict=False):
            if ours > _SLACK * other:
                break
            rows[form] = ANY if num_rows == ROWS[-1] else num_rows
    return Crossover(packs, rows, microseconds)


def measure(dtype: torch.dtype) -> dict[str, list[float]] | None:
    """Times products of a small expert: about a tenth of a second, and no more than a third.

    One thread, and its own processor time: beside other work two threads wait for each other, which says nothing of
    the products.

    Args:
        dtype: float32 or bfloat16.

    Returns:
        Way -> microseconds at each of `ROWS`, or at the first of them; None where threads cannot be set.
    """
    try:
        with num_threads(1), torch.inference_mode():
            return _times(_ways(dtype), dtype)
    except RuntimeError:
        return None


def _times(ways: dict[str, Way], dtype: torch.dtype) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {way: [] for way in ways}
    began = time.thread_time()
    for num_rows in ROWS:
        x = torch.randn(num_rows, _SHAPE[1], generator=generator).to(dtype)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(_TURNS):
            for way, product in ways.items():
                start = time.thread_time_ns()
                product(x, turn % _COPIES)
                times[way].append((time.thread_time_ns() - start) / 1e3)
            if turn >= 1 and time.thread_time() - began > _SECONDS:
                break
        for way in ways:
            found[way].append(round(min(times[way]), 1))
        if time.thread_time() - began > _SECONDS:
            break
    return found


def _ways(dtype: torch.dtype) -> dict[str, Way]:
    """The products that are compared, by name."""
    outputs, inputs = _SHAPE
    generator = torch.Generator().manual_seed(1)
    matrices = torch.randn(_COPIES, outputs, inputs, generator=generator).mul_(0.02).to(dtype)
    ways: dict[str, Way] = {"stock": lambda x, i: F.linear(x, matrices[i])}
    try:
        packed = [pack(matrix) for matrix in matrices]
        ways["packed"] = lambda x, i: packed_linear(x, packed[i])
    except (RuntimeError, AttributeError):
        pass  # no oneDNN, or none that takes this dtype
    if native.library() is None:
        return ways
    codes = torch.randint(0, 256, (_COPIES, outputs, inputs), generator=generator, dtype=torch.uint8)
    ones = torch.ones(_COPIES, outputs)
    int4 = {
        "weight": codes[:, :, : inputs // 2].contiguous(),
        "groups": codes[:, : inputs // 32, :, None].expand(-1, -1, -1, 2)[:, :, :outputs].contiguous().view(torch.int8),
        "units": torch.ones(_COPIES, outputs, 2, dtype=torch.bfloat16),
    }
    planes = {"plain": {"weight": matrices}, "int8": {"weight": codes.view(torch.int8), "scale": ones}, "int4": int4}

    def native_way(given: dict[str, Any]) -> Way:
        return lambda x, i: expert_products(x, x.new_empty(len(x), outputs), i, **given)

    def decoded_way(given: dict[str, Any]) -> Way:
        def product(x: torch.Tensor, i: int) -> object:
            numbers = x.new_empty(outputs, inputs)
            expert_numbers(numbers, i, **given)
            return F.linear(x, numbers)

        return product

    for form, given in planes.items():
        ways[f"{form} native"] = native_way(given)
        if form != "plain":
            ways[f"{form} decoded"] = decoded_way(given)
    return ways


def _place(dtype: torch.dtype) -> Path | None:
    """The file that keeps what was measured; None where nothing can be kept."""
    try:
        folder = native.private_folder()
    except native.NativeError as error:
        logger.info("what is measured of experts is not kept: %s", error)
        return None
    isa = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.endswith(("_MAX_CPU_ISA", "_ARCH"))]
    here = [native.processor(), str(os.cpu_count()), str(torch.__version__), str(dtype), native.why_not()]
    sources = [path.read_text() for path in (Path(__file__), Path(native.__file__).parent / "experts.cpp")]
    digest = hashlib.sha256("\0".join((*here, *isa, *sources)).encode()).hexdigest()[:20]
    return folder / f"experts-{digest}.json"


def _read(path: Path) -> Crossover | None:
    """What a file says; None where there is none, or it is not what `_keep` writes."""
    try:
        given = json.loads(path.read_text())
        found = Crossover(given["packs"], dict(given["most_rows"]), dict(given["microseconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    counts = [rows for rows in found.most_rows.values() if type(rows) is int and rows >= 0]
    is_ours = isinstance(found.packs, bool) and set(found.most_rows) == set(FORMS) and len(counts) == len(FORMS)
    return found if is_ours and "stock" in found.microseconds else None


def _keep(path: Path, found: Crossover) -> Crossover:
    """Writes a file in one step; where another process was first, its word counts for both."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(asdict(found)))
        other = _read(path)
        if other is not None:
            os.unlink(file.name)
            return other
        os.replace(file.name, path)
    except OSError as error:
        logger.info("what was measured of experts is not kept: %s", error)
    return found
