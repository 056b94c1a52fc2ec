"""How the native kernels are compiled and kept, and that they stay within their planes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from hfkv.codecs import CODECS
from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.dispatch import attention_kernel, forget_choices
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.naive import append_naive
from hfkv.kernels.native import library as native
from hfkv.kernels.native.kernels import append, attend
from hfkv.kernels.native.latent import attend_latents
from hfkv.stores.layout import Layout
from tests.kernels.cases import case, check
from tests.kernels.guarded import guarded
from tests.kernels.held import garbage
from tests.kernels.stored_experts import EXPERT_CODECS, check_products
from tests.kernels.test_cpu_latent import latent_case
from tests.kernels.test_key_mean import less_mean

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not() or "none")

ALL = ("none", "int8", "fp8", "int4", "int3", "int2")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def same_bytes(planes: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    pairs = zip(planes, others, strict=True)
    return all(torch.equal(plane.view(torch.uint8), other.view(torch.uint8)) for plane, other in pairs)


def test_a_word_switches_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("int8", torch.float32, torch.device("cpu"), 1, (64, 64))
    assert attention_kernel(*chosen).name == "native decode"
    monkeypatch.setenv("HFKV_NATIVE", "0")
    forget_choices()
    try:
        assert attention_kernel(*chosen).name.startswith("cpu")
        assert native.library() is None
        assert "HFKV_NATIVE=0" in native.why_not()
    finally:
        monkeypatch.undo()
        forget_choices()


def test_without_a_compiler_the_reason_and_the_remedy_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native.NativeError, match=r"no C\+\+ compiler: install g\+\+"):
        native._compiled("native")


def test_a_compiler_that_fails_is_no_error_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HFKV_CACHE", str(tmp_path))
    monkeypatch.setenv("HFKV_NATIVE_ARCH", "no-such-processor")
    assert native.library() is None
    assert "no-such-processor" in native.why_not()
    assert not list((tmp_path / "native").iterdir())


def test_a_folder_that_others_may_write_to_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HFKV_CACHE", str(tmp_path))
    (tmp_path / "native").mkdir()
    (tmp_path / "native").chmod(0o777)
    with pytest.raises(native.NativeError, match="others may write to it; name another by HFKV_CACHE"):
        native._compiled("native")


def test_processes_that_compile_at_once_leave_one_library(tmp_path: Path) -> None:
    program = "from hfkv.kernels.native.library import library, why_not; assert library() is not None, why_not()"
    environment = {**os.environ, "HFKV_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]
    assert [process.wait(timeout=240) for process in running] == [0, 0, 0]
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]
    assert (tmp_path / "native").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ALL[1:])
def test_many_random_rows_of_all_magnitudes(codec: str, dtype: torch.dtype) -> None:
    rows = torch.randn(1, 1, 20_000, 64) * torch.exp2(torch.randint(-12, 12, (1, 1, 20_000, 1)))
    rows = rows.to(dtype)
    written, expected = (garbage(codec, (1, 1, 20_000, 64), dtype, rows.device) for _ in range(2))
    append(rows, rows, written, written, Layout(0))
    append_naive(rows, rows, expected, expected, Layout(0))
    assert same_bytes(written.planes, expected.planes)


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        (Layout(6, start=1), 1),
        (Layout(15, table=torch.tensor([[0, 1]]), spans=((0, 8), (0, 7))), 2),
        (Layout(5, table=torch.tensor([[7]]), spans=((0, 5),)), 2),
    ],
)
def test_what_would_be_written_outside_is_refused(layout: Layout, rows: int) -> None:
    new = torch.randn(1, 1, 2, 64)
    planes = garbage("int8", (rows, 1, 8, 64), new.dtype, new.device)
    before = [plane.clone() for plane in planes.planes]
    with pytest.raises(ValueError, match="2 new tokens find no room"):
        append(new, new, planes, planes, layout)
    assert same_bytes(planes.planes, before)


def test_planes_that_do_not_lie_in_one_piece_are_refused() -> None:
    given = case("int8")
    data, scale = given.keys.planes
    strided = Encoded(given.keys.codec, (data.repeat_interleave(2, dim=2)[:, :, ::2], scale), given.keys.head_dim)
    with pytest.raises(ValueError, match="contiguous planes"):
        attend(given.query, strided, given.values, given.layout, given.visibility, given.scoring)
    with pytest.raises(ValueError, match="contiguous planes"):
        append(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), strided, strided, given.layout)


def test_tensors_that_do_not_go_together_are_refused() -> None:
    given = case("int8", batch=2, length=20)
    for mask in (torch.ones(2, 2, 1, 20), torch.ones(2, 1, 1, 10), torch.ones(3, 1, 1, 20), torch.ones(2, 1, 2, 20)):
        visibility = replace(given.visibility, mask=mask.bool())
        with pytest.raises(ValueError, match="masks"):
            attend(*replace(given, visibility=visibility).arguments)
    with pytest.raises(ValueError, match="bounds"):
        attend(*replace(given, visibility=replace(given.visibility, bounds=torch.zeros(2, 3).long())).arguments)
    for query in (given.query[:1], given.query[..., :32], given.query[:, :3]):
        with pytest.raises(ValueError, match="do not go with int8 keys"):
            attend(*replace(given, query=query).arguments)
    for shape in ((1, 2, 1, 64), (2, 1, 1, 64), (2, 2, 1, 32)):
        with pytest.raises(ValueError, match="do not go into planes"):
            append(torch.randn(shape), torch.randn(shape), given.keys, given.values, Layout(3))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("codec", ALL[1:])
def test_keys_and_values_of_other_dtypes_lose_nothing(codec: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    new = [torch.randn(1, 2, 50, 64).to(dtype) for dtype in dtypes]
    sides = [[garbage(codec, (1, 2, 50, 64), x.dtype, x.device) for x in new] for _ in range(2)]
    append(new[0], new[1], *sides[0], Layout(0))
    append_naive(new[0], new[1], *sides[1], Layout(0))
    for one, other in zip(*sides, strict=True):
        assert same_bytes(one.planes, other.planes)


def test_room_for_more_columns_than_there_are_hides_no_token() -> None:
    given = case("none", length=5000, page_size=64)
    assert given.layout.table is not None
    inputs = DeviceInputs.allocate(given.layout, given.visibility, torch.device("cpu"), columns=200)
    # The last column is the one that a stretch begins in.
    last = replace(given.visibility, first=4992)
    assert torch.equal(attend(*given.arguments, inputs=inputs).out, attend(*given.arguments).out)
    inputs = DeviceInputs.allocate(given.layout, last, torch.device("cpu"), columns=200)
    assert torch.equal(
        attend(*replace(given, visibility=last).arguments, inputs=inputs).lse.isinf(), torch.zeros(1, 8, 1).bool()
    )


def test_without_a_home_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("no home")))
    monkeypatch.delenv("HFKV_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(native.NativeError, match="no folder to keep them in: no home; name one by HFKV_CACHE"):
        native._compiled("native")


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 5])
def test_nothing_beyond_a_planes_end_is_read_or_written(codec: str, head_dim: int) -> None:
    for length in (1, 15, 16, 17, 40):
        states = torch.randn(1, 2, length, head_dim)
        planes = tuple(guarded(plane) for plane in CODECS[codec].encode(states))
        encoded = Encoded(CODECS[codec], planes, head_dim)
        given = replace(case(codec, length=length, head_dim=head_dim), keys=encoded, values=encoded)
        given = replace(given, layout=Layout(length), query=guarded(given.query))
        check(attend, given)
        rotary = Encoded(CODECS[codec], tuple(guarded(plane[:, :1]) for plane in planes), head_dim)
        latents = rotary._replace(planes=tuple(guarded(plane[:, 1:]) for plane in planes))
        queries = guarded(torch.randn(1, 5, 2, 2 * head_dim))
        check(attend_latents, replace(given, query=queries, keys=latents, values=rotary), latent_attention_naive)
        before = [plane.clone() for plane in planes]
        new = guarded(states[:, :, -1:])
        append(new, new, encoded, encoded, Layout(length - 1))
        assert same_bytes(planes, before)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["cascadelake", "x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64"])
def test_other_instructions_compute_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFKV_NATIVE_ARCH", architecture)
    if native.library() is None:
        pytest.skip(native.why_not())
    needed = {"cascadelake": "avx512_vnni", "x86-64-v4": "avx512f"}.get(architecture, "")
    if needed not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {needed}")
    native.loaded.cache_clear()
    assert native.loaded() is native.library()
    try:
        compare_with_twins()
    finally:
        monkeypatch.undo()
        native.loaded.cache_clear()


def compare_with_twins() -> None:
    for codec in ALL:
        for settings in (
            {},
            {"page_size": 16, "batch": 2},
            {"num_queries": 5, "softcap": 2.0},
            {"dtype": torch.bfloat16},
        ):
            check(attend, case(codec, length=1000, **settings))  # type: ignore[arg-type]
            check(attend, less_mean(case(codec, length=300, **settings), 77))  # type: ignore[arg-type]
            given = latent_case(codec, "native", length=1000, **settings)  # type: ignore[arg-type]
            check(attend_latents, given, latent_attention_naive)
        rows = torch.randn(1, 2, 500, 64)
        planes = tuple(torch.zeros_like(plane) for plane in CODECS[codec].encode(rows))
        append(rows, rows, *(Encoded(CODECS[codec], planes, 64),) * 2, Layout(0))
        assert same_bytes(planes, CODECS[codec].encode(rows))
    for codec in EXPERT_CODECS:
        for rows_of_experts, dtype in ((2, torch.float32), (9, torch.bfloat16)):
            check_products(codec, (70, 90), rows_of_experts, dtype)


SANITIZED = """
import sys
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.naive import append_naive
from hfkv.kernels.native import library as native
native._FLAGS += ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
native._LINKED += ("-fsanitize=address,undefined",)
assert native.library() is not None, native.why_not()
import pytest
sys.exit(pytest.main(["-q", "-n", "0", "-o", "addopts=", "-p", "no:cacheprovider", "-k", "native and not slow",
                      "tests/kernels/test_cpu_attention.py", "tests/kernels/test_append.py",
                      "tests/kernels/test_cpu_latent.py", "tests/kernels/test_pairs.py",
                      "tests/kernels/test_native_experts.py", "tests/kernels/test_native_digits.py",
                      "tests/kernels/test_key_mean.py"]))
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("this compiler has no sanitizers")
    environment = {**os.environ, "HFKV_CACHE": str(tmp_path), "LD_PRELOAD": ":".join(found)}
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED], cwd=root, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "runtime error" not in done.stderr
