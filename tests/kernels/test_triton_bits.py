"""int3 and int2 in Triton: assembly against the codec, and rows that programs write one by one."""

import re

import pytest
import torch

from hfkv.codecs import CODECS
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.triton import append as triton
from hfkv.kernels.triton.bits.levels import EVEN, ODD
from hfkv.kernels.triton.bits.parts import BITS
from hfkv.kernels.triton.bits.trellis import PAIRS, pairs_of_strings
from hfkv.kernels.triton.decode import decode_attention
from hfkv.kernels.triton.latent import latent_attention
from hfkv.kernels.triton.prefill import prefill_attention
from hfkv.stores.layout import Layout
from tests.kernels.held import check, contiguous, odd_spans, paged, shuffled
from tests.kernels.test_append import check as check_append

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of the interpreter, about NaN

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32


def run(assembly: str, registers: dict[str, torch.Tensor]) -> None:
    """Executes PTX on words, int64 of 32 bits."""
    for line in assembly.strip("{ }").rstrip(";").split(";"):
        operation, *operands = re.findall(r"[\w.$]+", line)
        if operation == ".reg":
            continue
        target, *sources = operands
        values = [registers[each] if each in registers else torch.tensor(int(each, 0)) for each in sources]
        if operation == "prmt.b32":
            low, high, selector = values
            table = [*(low >> 8 * i & 0xFF for i in range(4)), *(high >> 8 * i & 0xFF for i in range(4))]
            found = torch.stack(torch.broadcast_tensors(*table, selector)[:8])
            result = selector * 0
            for byte in range(4):
                nibble = torch.broadcast_to(selector >> 4 * byte & 0xF, found.shape[1:])
                assert bool((nibble < 8).all())  # others repeat the sign
                result = result | found.gather(0, nibble[None])[0] << 8 * byte
        else:
            one, other = values
            result = {
                "and.b32": lambda one=one, other=other: one & other,
                "or.b32": lambda one=one, other=other: one | other,
                "shl.b32": lambda one=one, other=other: one << other,
                "shr.u32": lambda one=one, other=other: one >> other,
            }[operation]()
        registers[target] = result & 0xFFFFFFFF


def test_the_assembly_reads_the_levels_that_the_codec_does() -> None:
    # Rows of 32 numbers: four bytes of even parts, of odd ones and of signs.
    rows = torch.randint(0, 256, (500, 12), dtype=torch.uint8)
    expected = CODECS["int3"].affine((rows, torch.full((500, 1), 168, dtype=torch.uint8)), 32, torch.int8).numbers
    first, second, signs = rows.view(torch.int32).long().bitwise_and(0xFFFFFFFF).unbind(1)
    for words, assembly, part in ((first, EVEN.value, 0), (second, ODD.value, 1)):
        registers = {"$4": words, "$5": signs}
        run(assembly, registers)
        for output in range(4):
            got = registers[f"${output}"].to(torch.int32).view(torch.int8).view(500, 4)
            assert torch.equal(got, expected[:, 4 * (2 * output + part) :][:, :4])


def test_ten_bits_of_a_string_are_two_numbers() -> None:
    strings = torch.randint(0, 256, (300, 9), dtype=torch.uint8)
    expected = CODECS["int2"].affine((strings, torch.full((300, 1), 168, dtype=torch.uint8)), 32, torch.int8).numbers
    words = strings[:, :-1].long() | strings[:, 1:].long() << 8
    for index in range(2):
        two = pairs_of_strings(strings.device)[words >> 4 * index + 2 & PAIRS.value - 1]
        for place in range(2):
            assert torch.equal((two >> 8 * place).to(torch.int8), expected[:, 8 * (2 * index + place) :][:, :8])


@pytest.mark.parametrize(("codecs", "head_dim"), [(("int3", "int2"), 32), (("int2", "int8"), 20)])
def test_programs_of_one_row_and_prompts_of_several_launches(
    codecs: tuple[str, str], head_dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "rows_together", lambda device: 1)
    monkeypatch.setattr(triton, "PATHS", 2 * head_dim // 4 * 64)
    new = torch.randn(1, 1, 3, head_dim, device=device)
    check_append(triton.append, codecs, (new, new.flip(2)), Layout(2), (1, 1, 6))


@pytest.mark.parametrize(
    ("dtype", "head_dims", "page_size"),
    [(BF16, (40, 5), 6), pytest.param(SINGLE, (128, 96), 0, marks=pytest.mark.slow)],
)
def test_bytes_are_the_codecs_own(
    dtype: torch.dtype, head_dims: tuple[int, int], page_size: int, device: torch.device
) -> None:
    new = [torch.randn(1, 1, 17, dim, device=device).mul(3).to(dtype) for dim in head_dims]
    new[0][0, 0, 0, 1] = 1000
    layout, shape = Layout(5, start=3), (1, 1, 30)
    if page_size:
        layout, shape = Layout(4, table=shuffled(1, 4), spans=((2, page_size),)), (4, 1, page_size)
    for codecs in (("int3", "int2"), ("int2", "int3")):
        check_append(triton.append, codecs, (new[0], new[1]), layout, shape, (False, True))


def test_hard_rows(device: torch.device) -> None:
    # Every second number of a row: no stride is what it usually is.
    new = torch.randn(1, 1, 16, 64, device=device)[..., ::2]
    new[0, 0, 0], new[0, 0, 1], new[0, 0, 2], new[0, 0, 3] = 0, -0.0, 7.013, 1e-39
    new[0, 0, 4, 3], new[0, 0, 5, 3], new[0, 0, 6, 3] = 1e30, torch.inf, torch.nan
    new[0, 0, 7:11] *= torch.tensor([3e-5, 8e4, 1e6, 1e25], device=device)[:, None]  # about where scales end
    new[0, 0, 11] = torch.arange(32) - 15.5
    check_append(triton.append, ("int3", "int2"), (new, new.flip(3)), Layout(1), (1, 1, 17))


@pytest.mark.parametrize(
    ("codecs", "head_dims", "num_queries", "page_size", "dtype"),
    [
        (("int3", "int2"), (64, 24), 2, 16, BF16),
        (("int2", "int3"), (40, 64), 1, 0, SINGLE),
        (("int3", "int3"), (32, 32), 33, 0, HALF),
        (("int2", "int2"), (32, 32), 20, 16, BF16),
        *(pytest.param((k, v), (128, 96), 20, 64, BF16, marks=pytest.mark.slow) for k, v in (BITS, BITS[::-1])),
        *(pytest.param((k, k), (256, 256), 3, 10, HALF, marks=pytest.mark.slow) for k in BITS),
        *(pytest.param((k, "int4"), (64, 64), 3, 0, BF16, marks=pytest.mark.slow) for k in BITS),
        *(pytest.param(("none", v), (80, 80), 3, 0, BF16, marks=pytest.mark.slow) for v in BITS),
    ],
)
def test_attention(
    codecs: tuple[str, str],
    head_dims: tuple[int, int],
    num_queries: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    length = 70
    spans = odd_spans(length, page_size) if page_size else ()
    table = shuffled(2, len(spans)) if page_size else None
    parts = []
    for codec, dim in zip(codecs, head_dims, strict=True):
        tokens = torch.randn(2, 1, length, dim, device=device).to(dtype)
        tokens[1, :, :9] = torch.nan  # padding may have left anything behind
        parts.append(
            contiguous(codec, tokens, 3, 9) if table is None else paged(codec, tokens, table, spans, page_size)
        )
    check(
        decode_attention if num_queries < 16 else prefill_attention,
        torch.randn(2, 4, num_queries, head_dims[0], device=device).to(dtype),
        *parts,
        Layout(length, table=table, spans=spans) if page_size else Layout(length, start=3),
        Visibility(length, (0, 9)),
        Scoring(head_dims[0] ** -0.5, softcap=None if page_size else 5.0),
    )


@pytest.mark.parametrize("codec", BITS)
def test_latents(codec: str, device: torch.device) -> None:
    check(
        latent_attention,
        torch.randn(1, 4, 1, 80, device=device).to(BF16),
        contiguous(codec, torch.randn(1, 1, 40, 64, device=device).to(BF16)),
        contiguous(codec, torch.randn(1, 1, 40, 16, device=device).to(BF16)),
        Layout(40),
        Visibility(40, (3,)),
        Scoring(0.125),
        twin=latent_attention_naive,
    )
