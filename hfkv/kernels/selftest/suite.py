"""Tests of every kernel that would be used on a device, against its naive twin on that very device."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hfkv.codecs import CODECS, Codecs
from hfkv.kernels.cpu import int8_matmul
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.dispatch import append_kernel, attention_kernel, latent_kernel, wants_values_innermost
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.naive import append_naive, attention_naive
from hfkv.kernels.selftest import int8 as selftest_int8
from hfkv.kernels.selftest.inputs import (
    PAGE_SIZE,
    SETTINGS,
    STORES,
    HeadShape,
    Scenario,
    randn,
    random_arguments,
    random_layout,
    room,
    turned,
)
from hfkv.policy.codec_pair import sides_of

RIGHT, WRONG, RAISED, NOT_TESTED = "right", "wrong", "raised", "not tested"
# A CPU has kernels for one and for a few queries, and another for many.
CPU_QUERIES, QUERIES = (1, 7, 33), (1, 33)
NEW_TOKENS = (1, 70)
# Query heads on latents that are tested on a CPU, whose kernel only counts rows, heads times queries: fewer than 32 of
# them and more. The twins of DeepSeek-V3's 128 heads take a minute.
MOST_CPU_HEADS = 16
INT8_MATMUL = Path(int8_matmul.__file__)
INT8_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """One test of a kernel and its outcome.

    Attributes:
        what: kind of test: ``"decode"`` (one query), ``"prefill"`` (several), ``"append"`` or ``"int8 product"``.
        kernel: name of the kernel, as `dispatch` gives it; empty where asking for it raised.
        codec, store, setting: names of the tokens' codec, store and setting; ``"all"`` where it does not matter.
        num_tokens: number of queries, or of new tokens.
        heads: heads of the layer; None for the int8 product.
        outcome: ``"right"``, ``"wrong"``, ``"raised"`` or ``"not tested"``.
        error: largest error against the twin in float64, of the output or of the log-sum-exp, whichever is the larger
            part of what is allowed; None where nothing was computed.
        allowed: the most that this error may be: 2 × the twin's error in the query's dtype + 1e-5.
        note: what is wrong, or why it was not tested; else None.
    """

    what: str
    kernel: str
    codec: str
    store: str
    setting: str
    num_tokens: int
    heads: HeadShape | None
    outcome: str
    error: float | None = None
    allowed: float | None = None
    note: str | None = None

    @property
    def is_failure(self) -> bool:
        return self.outcome in (WRONG, RAISED)


class Planned(NamedTuple):
    """A check to come: its name, and the function that runs it."""

    name: str
    run: Callable[[], Check]


def plan(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[HeadShape, ...] = (HeadShape(),),
    pairs: tuple[str, ...] = (),
) -> list[Planned]:
    """All checks of a device's kernels; none of them raises.

    Args:
        device: device of queries and tokens.
        dtype: dtype of queries and new tokens: bf16, fp16 or fp32.
        heads: heads of the layers to test for.
        pairs: codecs of keys and of values to test besides every codec alone, such as ``"k:int8+v:int4"``.
    """
    planned = []
    for each in heads:
        if each.is_latent and device.type == "cpu":
            each = each._replace(groups=min(each.groups, MOST_CPU_HEADS))
        for codec in (*CODECS, *pairs):
            for store in STORES:
                for num_queries in CPU_QUERIES if device.type == "cpu" else QUERIES:
                    for setting in SETTINGS:
                        if setting.has_mean and (each.is_latent or not Codecs.named(codec).key.takes_mean):
                            continue
                        blank = Check(_use(num_queries), "", codec, store, setting.name, num_queries, each, NOT_TESTED)
                        run = partial(_check_attention, blank, setting, device, dtype)
                        planned.append(Planned(_name(blank), partial(_caught, blank, run)))
                for num_new in NEW_TOKENS:
                    blank = Check("append", "", codec, store, "plain", num_new, each, NOT_TESTED)
                    planned.append(
                        Planned(_name(blank), partial(_caught, blank, partial(_check_append, blank, device, dtype)))
                    )
    if device.type == "cpu":
        planned.append(Planned("int8 product", check_int8_product))
    return planned


def _use(num_queries: int) -> str:
    return "decode" if num_queries == 1 else "prefill"


def _name(check: Check) -> str:
    return f"{check.what} of {check.num_tokens}, {check.codec}, {check.store}, {check.setting}"


def _caught(blank: Check, run: Callable[[], Check]) -> Check:
    try:
        with torch.no_grad():
            return run()
    except Exception as error:  # whatever a kernel or a compiler raises is what the self-test is there to find
        return replace(blank, outcome=RAISED, note=f"{type(error).__name__}: {error}")


def _check_attention(blank: Check, setting: Scenario, device: torch.device, dtype: torch.dtype) -> Check:
    assert blank.heads is not None
    is_innermost = _is_innermost(blank, device, dtype, setting.has_mean)
    asked = blank.codec, dtype, device, blank.num_tokens, blank.heads[:2], is_innermost
    twin: Callable[..., Any]
    if blank.heads.is_latent:
        twin, kernel = latent_attention_naive, latent_kernel(*asked)
    else:
        twin, kernel = attention_naive, attention_kernel(*asked, setting.has_mean)
    check = replace(blank, kernel=kernel.name)
    if kernel.run is None:
        return replace(check, note=kernel.reason)
    shape = blank.heads, blank.codec, blank.store, blank.num_tokens
    given = random_arguments(*shape, setting, device, dtype, is_innermost)
    exact = twin(*given, dtype=torch.float64)
    plain = twin(*given, dtype=dtype)
    try:
        got = kernel.run(*given)
    except Exception as error:  # as in `_caught`, and the kernel is known by now
        return replace(check, outcome=RAISED, note=f"{type(error).__name__}: {error}")
    return _judged(check, got, plain, exact)


def _is_innermost(check: Check, device: torch.device, dtype: torch.dtype, has_mean: bool = False) -> bool:
    """Whether stores on this device keep the tokens of the values' data side by side."""
    assert check.heads is not None
    if check.heads.is_latent or Codecs.named(check.codec).value.is_lossless:
        return False
    return wants_values_innermost(check.codec, dtype, device, check.heads[:2], has_mean)


def _judged(check: Check, got: Any, plain: Any, exact: Any) -> Check:
    """The check with its outcome, error and note: see `Check`."""
    if got[0].dtype != plain[0].dtype:
        return replace(check, outcome=WRONG, note=f"the output is {got[0].dtype}, its queries {plain[0].dtype}")
    worst = (-1.0, 0.0, 0.0)
    for name, ours, theirs, expected in zip(("output", "log-sum-exp"), got, plain, exact, strict=True):
        if ours.shape != expected.shape:
            return replace(check, outcome=WRONG, note=f"the {name} is {list(ours.shape)}, not {list(expected.shape)}")
        # Where a query sees nothing its log-sum-exp is -inf; nothing else may be without bounds.
        if not torch.equal(ours.isneginf(), expected.isneginf()) or ours.isnan().any() or ours.isposinf().any():
            return replace(check, outcome=WRONG, note=f"the {name} is NaN or infinite where the twin's is not")
        finite = expected.isfinite()
        error, twins = ((part.double() - expected)[finite].abs() for part in (ours, theirs))
        if error.numel():
            largest, allowed = error.max().item(), 2 * twins.max().item() + 1e-5
            worst = max(worst, (largest / allowed, largest, allowed))
    share, largest, allowed = worst
    is_right = share <= 1
    note = None if is_right else f"an error of {largest:.2e} against float64, and {allowed:.2e} is allowed"
    return replace(check, outcome=RIGHT if is_right else WRONG, error=largest, allowed=allowed, note=note)


def _check_append(blank: Check, device: torch.device, dtype: torch.dtype) -> Check:
    assert blank.heads is not None
    is_innermost = _is_innermost(blank, device, dtype)
    kernel = append_kernel(blank.codec, dtype, device, blank.heads[:2], is_innermost)
    check = replace(blank, kernel=kernel.name)
    if kernel.run is None:
        return replace(check, note=kernel.reason)
    generator = torch.Generator().manual_seed(0)
    batch = 2
    layout = random_layout(batch, check.store, generator)
    if layout.table is not None:
        num_columns = layout.table.shape[1] + -(-check.num_tokens // PAGE_SIZE)
        layout = replace(layout, table=torch.randperm(batch * num_columns, generator=generator).view(batch, -1))
    shape = (batch, blank.heads.num_kv_heads, check.num_tokens)
    new_keys, new_values = (randn((*shape, dim), device, dtype, generator) for dim in blank.heads[:2])
    sides = list(zip(sides_of(check.codec), (new_keys, new_values), strict=True))
    ours, expected = ([room(name, new, layout) for name, new in sides] for _ in range(2))
    if is_innermost:
        ours[1] = turned(ours[1])
    try:
        kernel.run(new_keys, new_values, *ours, layout)
    except Exception as error:  # as in `_check_attention`
        return replace(check, outcome=RAISED, note=f"{type(error).__name__}: {error}")
    append_naive(new_keys, new_values, expected[0], expected[1], layout)
    for name, one, other in zip(("keys", "values"), ours, expected, strict=True):
        for index, (plane, twins) in enumerate(zip(one.planes, other.planes, strict=True)):
            num_wrong = int((plane.view(torch.uint8) != twins.view(torch.uint8)).sum())
            if num_wrong:
                note = f"{num_wrong} bytes of plane {index} of the {name} are not the codec's own"
                return replace(check, outcome=WRONG, note=note)
    return replace(check, outcome=RIGHT)


def check_int8_product() -> Check:
    """Checks whether torch's int8 matrix product is exact here, in a process of its own: it may crash."""
    rows = ", ".join(map(str, selftest_int8.NUM_ROWS))
    setting = f"T = 1..{selftest_int8.MOST_TOKENS}, M = {rows}"
    check = Check("int8 product", "torch int8", "int8", "all", setting, selftest_int8.MOST_TOKENS, None, RIGHT)
    if not is_exact():
        note = "torch's int8 products are not exact without VNNI, where their sums saturate: no kernel uses them here"
        return replace(check, outcome=NOT_TESTED, note=note)
    command = [sys.executable, "-P", selftest_int8.__file__, str(INT8_MATMUL)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INT8_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return replace(check, outcome=RAISED, note=f"{type(error).__name__}: {error}")
    last = (done.stdout.strip() or "its start").splitlines()[-1]
    if done.returncode == 0 and last == "exact":
        return check
    if done.returncode == 1 and not done.stderr:
        return replace(check, outcome=WRONG, note=last)
    if done.returncode < 0:
        return replace(check, outcome=RAISED, note=f"crashed with {signal.Signals(-done.returncode).name} at {last}")
    said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return replace(check, outcome=RAISED, note=f"{said} (at {last})")
