"""From how many queries on latents are expanded."""

import pytest
import torch

from hfkv.attention.latent.crossover import forced, form_for
from hfkv.attention.latent.projection import Widths

DEEPSEEK = Widths(latent=512, nope=128, rotary=64, value=128)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
MANY = 1 << 24  # tokens, beside which the queries' own folding is nothing


@pytest.mark.parametrize(
    ("device", "dtype", "last"), [(GPU, torch.bfloat16, 170), (CPU, torch.float32, 170), (CPU, torch.bfloat16, 97)]
)
def test_the_crossover_is_where_operations_are_equal(device: torch.device, dtype: torch.dtype, last: int) -> None:
    forms = [form_for(queries, MANY, DEEPSEEK, dtype, device) for queries in range(1, 400)]
    assert forms == ["absorbed"] * last + ["expanded"] * (399 - last)


def test_a_prompt_is_expanded_and_a_decode_step_is_not() -> None:
    assert form_for(4096, 4096, DEEPSEEK, torch.float32, GPU) == "expanded"
    assert form_for(1, 4096, DEEPSEEK, torch.float32, GPU) == "absorbed"


def test_a_matrix_that_has_to_be_decoded_counts_as_so_many_tokens() -> None:
    forms = {count: form_for(1, count, DEEPSEEK, torch.float32, GPU, True) for count in (16, 256, 1024, 16384)}
    assert forms == {16: "expanded", 256: "expanded", 1024: "absorbed", 16384: "absorbed"}


def test_a_form_is_forced_by_name() -> None:
    with forced("expanded"):
        assert form_for(1, 4096, DEEPSEEK, torch.float32, GPU) == "expanded"
    assert form_for(1, 4096, DEEPSEEK, torch.float32, GPU) == "absorbed"
    with pytest.raises(ValueError, match="got 'folded'"), forced("folded"):  # type: ignore[arg-type]
        pass
