"""The native kernels on 64-bit ARM: compiled for it, and run by an emulator. ``pip install ziglang unicorn``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hfkv.kernels.device_inputs import device_inputs
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.naive import append_naive
from hfkv.kernels.native import kernels
from hfkv.kernels.native import library as native
from hfkv.kernels.native.kernels import append, attend
from hfkv.kernels.native.latent import attend_latents
from hfkv.stores.layout import Layout
from tests.kernels import cases
from tests.kernels.cases import Case, case, check
from tests.kernels.emulated import EmulatedLibrary
from tests.kernels.held import garbage
from tests.kernels.test_cpu_latent import latent_case
from tests.kernels.test_key_mean import less_mean
from tests.kernels.test_native_library import ALL, DTYPES, same_bytes

pytestmark = pytest.mark.slow
pytest.importorskip("ziglang", reason="no compiler for ARM: pip install ziglang")
pytest.importorskip("unicorn", reason="no emulator of ARM: pip install unicorn")

# An ARM server's processor, with products of bytes; and the least that there is.
PROCESSORS = ("neoverse_n1", "generic")


@pytest.fixture(scope="module", params=PROCESSORS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", f"-mcpu={request.param}"]
    made = [folder / f"{source}.o" for source in ("attention.cpp", "append.cpp")]
    running = [
        subprocess.Popen(
            [
                *compiler,
                *native._FLAGS,
                f"-ffp-contract={native._SOURCES[at.stem]}",
                "-c",
                native._HERE / at.stem,
                "-o",
                at,
            ]
        )
        for at in made
    ]
    assert all(process.wait(600) == 0 for process in running)
    source = Path(__file__).parent / "arm_program.cpp"
    subprocess.run([*compiler, "-static", "-O1", "-std=c++17", source, *made, "-o", folder / "program"], check=True)
    return folder / "program"


@pytest.fixture
def library(program: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedLibrary:
    emulated = EmulatedLibrary(program)
    monkeypatch.setattr(kernels, "loaded", lambda: emulated)
    monkeypatch.setattr(kernels, "num_threads", lambda: 1)
    # Cases are encoded by torch: it knows only the memory that a test tells it of.
    monkeypatch.setattr(cases, "encode", lambda codecs, *states: sum(map(codecs.key.encode, states), ()))
    return emulated


def call(library: EmulatedLibrary, given: Case, kernel: Any = attend) -> Any:
    inputs = device_inputs(given.layout, given.visibility, given.query.device)
    planes = (*given.keys.planes, *given.values.planes)
    library.knows(given.query, *planes, inputs.meta, inputs.bounds, inputs.mask, given.scoring.sink_logits)
    return lambda *arguments: kernel(*arguments, inputs=inputs)


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"head_dim": 40, "value_dim": 24, "num_queries": 3, "length": 37},
        {"page_size": 8, "batch": 2, "pads": (0, 5), "sink_logits": True, "softcap": 20.0},
        {"length": 4200, "head_dim": 16},
    ],
    ids=["plain", "odd", "pages", "stretches"],
)
def test_attention_is_that_of_the_twin(library: EmulatedLibrary, codec: str, dtype: torch.dtype, words: Any) -> None:
    given = case(codec, dtype=dtype, **words)
    check(call(library, given), given)


@pytest.mark.parametrize("codec", ["int4", "fp8"])
@pytest.mark.parametrize("words", [{"length": 90}, {"page_size": 8, "batch": 2, "num_queries": 3}], ids=str)
def test_a_mean_that_was_taken_off_is_that_of_the_twin(library: EmulatedLibrary, codec: str, words: Any) -> None:
    given = less_mean(case(codec, **words), 500, size=2.0)
    assert given.keys.mean is not None
    library.knows(given.keys.mean.mean.vector)
    check(call(library, given), given)


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [{}, {"page_size": 8, "batch": 2, "pads": (0, 5)}], ids=["plain", "pages"])
def test_latents_are_those_of_the_twin(library: EmulatedLibrary, codec: str, dtype: torch.dtype, words: Any) -> None:
    given = latent_case(codec, "native", dtype=dtype, num_queries=2, **words)
    check(call(library, given, attend_latents), given, latent_attention_naive)


@pytest.mark.parametrize("codec", ALL[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_those_of_the_codecs(library: EmulatedLibrary, codec: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    new = [(torch.randn(1, 2, 64, 40) * 10 ** torch.arange(-6.0, 2).repeat(8)[:, None]).to(dtype) for _ in "kv"]
    sides = [[garbage(codec, (1, 2, 70, 40), dtype, torch.device("cpu")) for _ in "kv"] for _ in range(2)]
    layout = Layout(3, start=1)
    inputs = device_inputs(layout.end, None, new[0].device)
    library.knows(*new, inputs.meta, *(plane for encoded in sides[0] for plane in encoded.planes))
    append(*new, *sides[0], layout, inputs)
    append_naive(*new, *sides[1], layout)
    for one, other in zip(*sides, strict=True):
        assert same_bytes(one.planes, other.planes)
