"""`CPUBackend`: the kernels of a CPU, and the tokens that each takes."""

from __future__ import annotations

import torch

from hfkv.codecs import Codec
from hfkv.kernels.backend import MANY, Asked, Backend, Kernel, dtype_name
from hfkv.kernels.cpu.decode import decode_attention
from hfkv.kernels.cpu.expanded import expanded_attention
from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.cpu.latent import latent_attention

# Numbers of keys and values together from which the kernels are faster, for one query a row, than to decode everything
# and to call scaled_dot_product_attention. Measured on 2 cores of an EPYC, for 2 to 8 kv heads of 64 and 128: none,
# int8 and int4 0.4 to 2 million, fp8 0.3 to 1 million.
WORTH_FROM, WORTH_FROM_OF_FLOATS = 1 << 19, 1 << 18
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CPUBackend(Backend):
    """Attention in torch's own products, a stretch of tokens at a time, which `Layout.read` gives."""

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def attention(self, asked: Asked) -> Kernel:
        coded = [codec for codec in asked.codecs if not codec.is_lossless]
        numbers = {codec.numbers for codec in coded}
        worth_from = WORTH_FROM_OF_FLOATS if torch.bfloat16 in numbers else WORTH_FROM
        if asked.dtype not in DTYPES:
            return Kernel("decode + sdpa", f"no CPU kernel computes in {dtype_name(asked.dtype)}", None)
        if asked.is_plain:
            why = "plain tokens are read where they lie, once for all of a kv head"
        elif asked.num_queries >= MANY:
            why = f"{MANY} queries or more: tokens are decoded a stretch at a time"
        elif None in numbers:
            why = f"{_without_form(coded)} has no affine form: tokens are decoded a stretch at a time"
        elif torch.int8 in numbers and not is_exact():
            why = "this processor has no exact int8 product: tokens are decoded"
        else:
            how = "int8 products read the tokens' own bytes"
            how = how if numbers == {torch.int8} else "float32 products of stretches"
            few = f"fewer than {MANY} queries: {how}"
            return Kernel(
                *("cpu decode", few, decode_attention),
                worth_from=worth_from,
                takes_values_innermost=True,
                takes_pairs=True,
                takes_means=True,
            )
        # Plain tokens of a window lie close together: they are attended to where they lie, without a kernel's help.
        return Kernel(
            *("cpu flash", why, flash_attention),
            reads_moved_windows=not asked.is_plain,
            worth_from=worth_from,
            takes_values_innermost=True,
            takes_pairs=True,
            takes_means=True,
        )

    def latent(self, asked: Asked) -> Kernel:
        if asked.dtype not in DTYPES:
            return Kernel("decode + absorbed", f"no CPU kernel computes in {dtype_name(asked.dtype)}", None)
        name = _without_form([codec for codec in asked.codecs if not codec.is_lossless])
        if name is not None:
            return Kernel("decode + absorbed", f"{name} has no affine form: latents are decoded", None)
        why = "absorbed queries read the latents' own bytes once for all heads"
        return Kernel("cpu latent", why, latent_attention, takes_values_innermost=True, takes_pairs=True)

    def expanded(self, dtype: torch.dtype) -> Kernel:
        if dtype not in DTYPES:
            return Kernel("expand + sdpa", f"no CPU kernel computes in {dtype_name(dtype)}", None)
        why = "many queries: latents are expanded, a stretch at a time"
        return Kernel("cpu expanded", why, expanded_attention, takes_values_innermost=True, takes_pairs=True)

    def append(self, asked: Asked) -> Kernel:
        return Kernel("torch", "a CPU encodes and writes with torch's own operations", None)


def _without_form(codecs: list[Codec]) -> str | None:
    """The first of these codecs that has no affine form; None where all have one."""
    return next((codec.name for codec in codecs if codec.numbers is None), None)
