"""The self-test finds kernels that are wrong, that raise, and that crash; and passes those that are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hfkv.codecs import CODECS
from hfkv.kernels import dispatch
from hfkv.kernels.backend import Kernel
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.merge import Attended
from hfkv.kernels.naive import append_naive, attention_naive
from hfkv.kernels.native.library import library
from hfkv.kernels.selftest import suite as selftest
from hfkv.kernels.selftest.suite import NOT_TESTED, RAISED, RIGHT, WRONG, Check, HeadShape

CPU, SMALL = torch.device("cpu"), HeadShape(32, 32, 2)
# Of one codec in one setting, of all in one, and of those that are tested with their mean taken off besides.
NUM_EACH = 2 * len(selftest.CPU_QUERIES)
NUM_IN_SETTING = len(CODECS) * NUM_EACH
NUM_LESS_MEAN = sum(codec.takes_mean for codec in CODECS.values()) * NUM_EACH
NUM_READS = NUM_IN_SETTING * 4 + NUM_LESS_MEAN
NUM_APPENDS = len(CODECS) * 2 * len(selftest.NEW_TOKENS)


def run(dtype: torch.dtype = torch.float32, heads: HeadShape = SMALL) -> list[Check]:
    """All checks but the product in a process of its own."""
    return [check.run() for check in selftest.plan(CPU, dtype, (heads,)) if check.name != "int8 product"]


def of(checks: list[Check], *uses: str) -> list[Check]:
    return [check for check in checks if check.what in uses]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "heads", [HeadShape(64, 64, 4), HeadShape(80, 48, 1), HeadShape(96, 32, 4, is_latent=True)], ids=str
)
def test_the_kernels_of_this_cpu_are_right(dtype: torch.dtype, heads: HeadShape) -> None:
    checks = run(dtype, heads)
    reads = of(checks, "decode", "prefill")
    assert [check.outcome for check in reads] == [RIGHT] * (NUM_READS - heads.is_latent * NUM_LESS_MEAN)
    assert {check.heads for check in reads} == {heads}
    assert all(0 < check.error <= check.allowed for check in reads if check.error is not None)
    kernel = dispatch.latent_kernel if heads.is_latent else dispatch.attention_kernel
    assert {(check.codec, check.kernel) for check in of(checks, "decode")} == {
        (codec, kernel(codec, dtype, CPU, 1, heads[:2]).name) for codec in CODECS
    }
    appends = of(checks, "append")
    assert len(appends) == NUM_APPENDS
    # What the codecs themselves append is said, and not called right; with a C++ compiler that is plain tokens.
    expected = {("torch", NOT_TESTED)} | ({("native append", RIGHT)} if library() is not None else set())
    assert {(check.kernel, check.outcome) for check in appends} == expected
    assert all("CPU" in (check.note or "") for check in appends if check.outcome == NOT_TESTED)


def test_a_pair_of_codecs_is_tested_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = "k:int8+v:int4"
    own = [check for check in selftest.plan(CPU, torch.float32, (SMALL,), (pair,)) if f", {pair}, " in check.name]
    assert len(own) == 4 * NUM_EACH + NUM_APPENDS // len(CODECS)
    checks = [check.run() for check in own]
    assert {check.outcome for check in checks} == ({RIGHT} if library() is not None else {RIGHT, NOT_TESTED})
    attend_with(monkeypatch, nudged(out=1e-3))
    assert {check.run().outcome for check in own if "append" not in check.name} == {WRONG}


def test_values_are_tested_in_the_order_that_stores_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attend(query: torch.Tensor, keys: Encoded, values: Encoded, *rest: Any) -> Attended:
        asked.append((keys.codec.name, values.planes[0].stride(2), keys.planes[0].stride(3)))
        return attention_naive(query, keys, values, *rest, dtype=query.dtype)

    attend_with(monkeypatch, attend)
    monkeypatch.setattr(selftest, "wants_values_innermost", lambda *_: True)
    assert {check.outcome for check in of(run(), "decode", "prefill")} == {RIGHT}
    assert {codec for codec, of_token, _ in asked if of_token == 1} == set(CODECS) - {"none"}
    assert {of_number for *_, of_number in asked} == {1}


def attend_with(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    monkeypatch.setattr(selftest, "attention_kernel", lambda *_: Kernel("broken", "for a test", kernel))


def nudged(out: float = 0.0, lse: float = 0.0, **settings: Any) -> Any:
    """A kernel that is right but for an offset, where `settings` are the scoring's or the visibility's."""

    def kernel(query, keys, values, layout, visibility, scoring) -> Attended:
        result, sums = attention_naive(query, keys, values, layout, visibility, scoring, dtype=query.dtype)
        asked = {**vars(visibility), **vars(scoring), "is_paged": layout.is_paged, "codec": keys.codec.name}
        asked["has_mean"] = keys.mean is not None
        if all(asked[name] == value for name, value in settings.items()):
            result, sums = result + out, sums + lse
        return Attended(result, sums)

    return kernel


@pytest.mark.parametrize("offset", [{"out": 1e-3}, {"lse": 1e-3}], ids=str)
def test_an_error_beyond_the_twins_is_found(monkeypatch: pytest.MonkeyPatch, offset: dict[str, float]) -> None:
    attend_with(monkeypatch, nudged(**offset))
    reads = of(run(), "decode", "prefill")
    assert [check.outcome for check in reads] == [WRONG] * NUM_READS
    assert all(check.kernel == "broken" and "allowed" in (check.note or "") for check in reads)
    assert all(check.error == pytest.approx(1e-3, rel=0.1) for check in reads)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"is_paged": True}, NUM_READS // 2),
        ({"codec": "int4"}, 5 * NUM_EACH),
        ({"softcap": 5.0}, NUM_IN_SETTING),
        ({"pads": (0, 38), "num_slots": 4, "sinks": 4}, NUM_IN_SETTING),
        ({"pads": (0, 17, 203)}, NUM_IN_SETTING),
        ({"pads": (0, 21), "has_mean": True}, NUM_LESS_MEAN),
    ],
    ids=str,
)
def test_a_kernel_wrong_in_one_setting_is_wrong_there_alone(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], share: int
) -> None:
    attend_with(monkeypatch, nudged(out=0.1, **settings))
    outcomes = [check.outcome for check in of(run(), "decode", "prefill")]
    assert (outcomes.count(WRONG), outcomes.count(RIGHT)) == (share, NUM_READS - share)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda out, lse: (torch.full_like(out, torch.nan), lse), "the output is NaN"),
        (lambda out, lse: (torch.full_like(out, torch.inf), lse), "the output is NaN or infinite"),
        (lambda out, lse: (out, torch.full_like(lse, -torch.inf)), "the log-sum-exp is NaN or infinite"),
        (lambda out, lse: (out.double(), lse), "torch.float64"),
        (lambda out, lse: (out[..., :-1], lse), "the output is ["),
    ],
)
def test_what_is_no_number_or_of_another_shape_is_wrong(monkeypatch: pytest.MonkeyPatch, spoil: Any, said: str) -> None:
    def kernel(*arguments: Any) -> Attended:
        return Attended(*spoil(*attention_naive(*arguments, dtype=arguments[0].dtype)))

    attend_with(monkeypatch, kernel)
    for check in of(run(), "decode", "prefill"):
        assert check.outcome == WRONG
        assert said in (check.note or "")


def test_a_kernel_that_raises_is_a_failure_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_: Any) -> Attended:
        raise RuntimeError("out of shared memory")

    attend_with(monkeypatch, kernel)
    reads = of(run(), "decode", "prefill")
    assert {(check.outcome, check.kernel, check.note) for check in reads} == {
        (RAISED, "broken", "RuntimeError: out of shared memory")
    }
    assert all(check.is_failure for check in reads)


def test_a_kernel_that_cannot_be_imported_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> Kernel:
        raise ImportError("no libcuda")

    monkeypatch.setattr(selftest, "attention_kernel", ask)
    assert {(check.outcome, check.note) for check in of(run(), "decode")} == {(RAISED, "ImportError: no libcuda")}


def test_where_there_is_no_kernel_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_with(monkeypatch, None)
    assert {(check.outcome, check.note) for check in of(run(), "decode")} == {(NOT_TESTED, "for a test")}


def append_with(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> list[Check]:
    monkeypatch.setattr(selftest, "append_kernel", lambda *_: Kernel("broken", "for a test", kernel))
    return of(run(), "append")


def test_an_append_of_the_codecs_own_bytes_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check.outcome for check in append_with(monkeypatch, append_naive)] == [RIGHT] * NUM_APPENDS


@pytest.mark.parametrize("side", [2, 3])
def test_one_wrong_byte_of_an_append_is_found(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    def kernel(*arguments: Any) -> None:
        append_naive(*arguments)
        written: Encoded = arguments[side]
        written.planes[-1].view(torch.uint8)[-1, -1, -1, -1] ^= 1  # perhaps where nothing was to be written

    for check in append_with(monkeypatch, kernel):
        assert check.outcome == WRONG
        assert (check.note or "").startswith("1 bytes of plane")
        assert ("keys" if side == 2 else "values") in (check.note or "")


def test_an_append_that_writes_nothing_or_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {check.outcome for check in append_with(monkeypatch, lambda *_: None)} == {WRONG}

    def kernel(*_: Any) -> None:
        raise ValueError("no room")

    assert {check.note for check in append_with(monkeypatch, kernel)} == {"ValueError: no room"}


def test_a_wrong_kernel_for_latents_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*arguments: Any) -> Attended:
        out, lse = latent_attention_naive(*arguments, dtype=arguments[0].dtype)
        return Attended(out + 1e-3, lse)

    monkeypatch.setattr(selftest, "latent_kernel", lambda *_: Kernel("broken", "for a test", kernel))
    reads = of(run(heads=HeadShape(32, 8, 2, is_latent=True)), "decode", "prefill")
    assert [(check.outcome, check.kernel) for check in reads] == [(WRONG, "broken")] * (NUM_IN_SETTING * 4)


# The int8 product, in a process of its own.


def test_the_int8_product_of_this_cpu_is_exact() -> None:
    check = selftest.check_int8_product()
    if not is_exact():
        assert check.outcome == NOT_TESTED
        assert "no kernel uses them" in str(check.note)
        return
    assert (check.outcome, check.note) == (RIGHT, None)


def test_a_product_that_no_kernel_uses_is_not_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "is_exact", lambda: False)
    assert selftest.check_int8_product().outcome == NOT_TESTED


@pytest.mark.parametrize(
    ("body", "outcome", "said"),
    [
        ("out.copy_(a.int() @ b.int())\n    if a.shape[1] == 5: out += 1", WRONG, "[1, 5] @ [5, 64] is not"),
        ("os.abort() if b.shape[1] == 3 else out.copy_(a.int() @ b.int())", RAISED, "SIGABRT at T = 3"),
        ("raise RuntimeError('no such instruction')", RAISED, "RuntimeError: no such instruction"),
    ],
)
def test_a_product_that_is_wrong_or_crashes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, outcome: str, said: str
) -> None:
    path = tmp_path / "int8_matmul.py"
    path.write_text(f"import os\ndef int8_matmul(a, b, out):\n    {body}\n    return out\n")
    monkeypatch.setattr(selftest, "INT8_MATMUL", path)
    monkeypatch.setattr(selftest, "is_exact", lambda: True)
    check = selftest.check_int8_product()
    assert check.outcome == outcome
    assert said in (check.note or "")
    assert check.is_failure


def test_only_a_cpu_tests_the_product_for_cpus() -> None:
    names = {
        device: [check.name for check in selftest.plan(torch.device(device), torch.float32)]
        for device in ("cpu", "cuda")
    }
    assert "int8 product" in names["cpu"]
    assert "int8 product" not in names["cuda"]
    assert len(set(names["cuda"])) == len(names["cuda"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_of_this_gpu_are_right(dtype: torch.dtype) -> None:
    checks = [check.run() for check in selftest.plan(torch.device("cuda"), dtype)]
    assert [check for check in checks if check.is_failure] == []
    assert sum(check.outcome == RIGHT for check in checks) >= len(checks) // 2
