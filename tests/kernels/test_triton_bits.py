"""int3 and int2 in Triton: assembly against the codec, and rows that programs write one by one."""

import re

import pytest
import torch

from hfkv.codecs import CODECS
from hfkv.kernels.triton import append as triton
from hfkv.kernels.triton.bits.levels import EVEN, ODD
from hfkv.kernels.triton.bits.trellis import PAIRS, pairs_of_strings
from hfkv.stores.layout import Layout
from tests.kernels.test_append import check


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


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of the interpreter, about NaN
@pytest.mark.parametrize(("codecs", "head_dim"), [(("int3", "int2"), 32), (("int2", "int8"), 20)])
def test_programs_of_one_row_and_prompts_of_several_launches(
    codecs: tuple[str, str], head_dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "rows_together", lambda device: 1)
    monkeypatch.setattr(triton, "PATHS", 2 * head_dim // 4 * 64)
    new = torch.randn(1, 1, 3, head_dim, device=device)
    check(triton.append, codecs, (new, new.flip(2)), Layout(2), (1, 1, 6))
