"""`CPUBackend`: the kernels of a CPU, and the tokens that each takes."""

from __future__ import annotations

import torch

from hfkv.kernels.backend import MANY, Asked, Backend, Kernel, dtype_name
from hfkv.kernels.cpu.decode import decode_attention
from hfkv.kernels.cpu.expanded import expanded_attention
from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.cpu.latent import latent_attention

# Numbers of keys and values from which the kernels are faster than decoding and scaled_dot_product_attention.
WORTH_FROM = 1 << 18
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CPUBackend(Backend):
    """Attention in torch's own products, a stretch of tokens at a time."""

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def attention(self, asked: Asked) -> Kernel:
        codec = asked.codec
        if asked.dtype not in DTYPES:
            return Kernel("decode + sdpa", f"no CPU kernel computes in {dtype_name(asked.dtype)}", None)
        if codec.is_lossless:
            why = "plain tokens are read where they lie, once for all of a kv head"
        elif asked.num_queries >= MANY:
            why = f"{MANY} queries or more: tokens are decoded a stretch at a time"
        elif codec.numbers is None:
            why = f"{codec.name} has no affine form: tokens are decoded a stretch at a time"
        elif codec.numbers == torch.int8 and not is_exact():
            why = "this processor has no exact int8 product: tokens are decoded"
        else:
            is_int8 = codec.numbers == torch.int8
            numbers = "int8 products read the tokens' own bytes" if is_int8 else "float32 products of stretches"
            return Kernel(
                "cpu decode", f"fewer than {MANY} queries: {numbers}", decode_attention, worth_from=WORTH_FROM
            )
        # Plain tokens of a window lie close together: they are attended to where they lie, without a kernel's help.
        return Kernel(
            "cpu flash", why, flash_attention, reads_moved_windows=not codec.is_lossless, worth_from=WORTH_FROM
        )

    def latent(self, asked: Asked) -> Kernel:
        if asked.dtype not in DTYPES:
            return Kernel("decode + absorbed", f"no CPU kernel computes in {dtype_name(asked.dtype)}", None)
        if not asked.codec.is_lossless and asked.codec.numbers is None:
            return Kernel("decode + absorbed", f"{asked.codec.name} has no affine form: latents are decoded", None)
        return Kernel("cpu latent", "absorbed queries read the latents' own bytes once for all heads", latent_attention)

    def expanded(self, dtype: torch.dtype) -> Kernel:
        if dtype not in DTYPES:
            return Kernel("expand + sdpa", f"no CPU kernel computes in {dtype_name(dtype)}", None)
        return Kernel("cpu expanded", "many queries: latents are expanded, a stretch at a time", expanded_attention)

    def append(self, asked: Asked) -> Kernel:
        return Kernel("torch", "a CPU encodes and writes with torch's own operations", None)
