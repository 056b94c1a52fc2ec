"""`NativeBackend`: the kernels in C++, and the tokens that they take."""

from __future__ import annotations

import torch

from hfkv.kernels.backend import MANY, Asked, Backend, Kernel, dtype_name
from hfkv.kernels.native.kernels import DTYPES, append, attend, code_of, step_append, step_attention
from hfkv.kernels.native.latent import attend_latents
from hfkv.kernels.native.library import why_not

# Numbers of keys and values from which plain float32 tokens are worth it: fewer go to torch's own function, as
# transformers sends them, and the results are the same bits.
WORTH_FROM_OF_PLAIN = 1 << 15


class NativeBackend(Backend):
    """Attention of few queries, and the encoding of new tokens, on CPUs where a C++ compiler is found."""

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def attention(self, asked: Asked) -> Kernel:
        reason = _unsupported(asked)
        if reason is None and asked.num_queries >= MANY:
            reason = f"{MANY} queries or more: larger products are torch's"
        if reason is not None:
            return Kernel("decode + sdpa", reason, None)
        is_plain = asked.is_plain and asked.dtype == torch.float32
        few = f"fewer than {MANY} queries: the tokens' own bytes are read once, in C++"
        worth_from = WORTH_FROM_OF_PLAIN if is_plain else 0
        return Kernel(
            *("native decode", few, attend),
            reads_device_lengths=True,
            worth_from=worth_from,
            worth_from_in_pages=0,
            takes_pairs=True,
            takes_means=True,
            of_step=step_attention,
        )

    def latent(self, asked: Asked) -> Kernel:
        reason = _unsupported(asked)
        if reason is not None:
            return Kernel("decode + absorbed", reason, None)
        why = "absorbed queries read the latents' own bytes once for all heads, in C++"
        return Kernel("native latent", why, attend_latents, reads_device_lengths=True, takes_pairs=True)

    def append(self, asked: Asked) -> Kernel:
        reason = _unsupported(asked)
        if reason is not None:
            return Kernel("torch", reason, None)
        if asked.is_plain:
            return Kernel("torch", "on this CPU plain tokens are only copied, by torch", None, of_step=step_append)
        why = "encoded and written in one pass, in C++"
        return Kernel("native append", why, append, reads_device_lengths=True, takes_pairs=True, of_step=step_append)


def _unsupported(asked: Asked) -> str | None:
    """Why the native kernels do not take such tokens; None where they do."""
    if asked.dtype not in DTYPES:
        return f"no native kernel computes in {dtype_name(asked.dtype)}"
    for codec in asked.codecs:
        if code_of(codec.name, asked.dtype) is None:
            return f"no native kernel reads {codec.name} in {dtype_name(asked.dtype)}"
    if min(asked.head_dims) < 1:
        return "there is nothing in heads of no width"
    return why_not() or None
