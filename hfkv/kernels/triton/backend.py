"""The Triton kernels, and what each takes."""

from __future__ import annotations

import torch

from hfkv.kernels.backend import MANY, Asked, Backend, Kernel
from hfkv.kernels.triton.support import unsupported, unsupported_latent


class TritonBackend(Backend):
    """Attention on NVIDIA GPUs. Its kernels are imported when one is asked for: Triton may not be there."""

    def serves(self, device: torch.device) -> bool:
        return device.type != "cpu"

    def attention(self, asked: Asked) -> Kernel:
        names = tuple(codec.name for codec in asked.codecs)
        reason = unsupported(asked.device, asked.dtype, names, asked.head_dims)
        if reason is not None:
            return Kernel("decode + sdpa", reason, None)
        if asked.num_queries < MANY:
            from hfkv.kernels.triton.decode import decode_attention
            from hfkv.kernels.triton.digits.call import CODECS, DTYPES

            return Kernel(
                "triton decode",
                f"fewer than {MANY} queries: split over the tokens' own bytes",
                decode_attention,
                reads_device_lengths=True,
                takes_values_innermost=True,
                takes_pairs=True,
                takes_means=True,
                wants_values_innermost=all(name in CODECS for name in names) and asked.dtype in DTYPES,
            )
        from hfkv.kernels.triton.prefill import prefill_attention

        many = f"{MANY} queries or more: tiles of the tokens' own bytes"
        return Kernel(
            *("triton prefill", many, prefill_attention),
            reads_device_lengths=True,
            takes_values_innermost=True,
            takes_pairs=True,
            takes_means=True,
        )

    def latent(self, asked: Asked) -> Kernel:
        names = tuple(codec.name for codec in asked.codecs)
        reason = unsupported_latent(asked.device, asked.dtype, names, *asked.head_dims)
        if reason is not None:
            return Kernel("decode + absorbed", reason, None)
        from hfkv.kernels.triton.latent import latent_attention

        split = "absorbed queries, split over the latents' own bytes"
        return Kernel("triton latent", split, latent_attention, reads_device_lengths=True, takes_pairs=True)

    def expanded(self, dtype: torch.dtype) -> Kernel:
        return Kernel("expand + sdpa", "scaled_dot_product_attention is the faster flash attention there", None)

    def append(self, asked: Asked) -> Kernel:
        names = tuple(codec.name for codec in asked.codecs)
        reason = unsupported(asked.device, asked.dtype, names, asked.head_dims)
        # What is encoded is no tile of a product: rows may be as wide as latents.
        if reason is not None and unsupported_latent(asked.device, asked.dtype, names, *asked.head_dims):
            return Kernel("torch", reason, None)
        from hfkv.kernels.triton.append import append

        how = "encoded and written in one pass"
        return Kernel(
            *("triton append", how, append),
            reads_device_lengths=True,
            takes_values_innermost=True,
            takes_pairs=True,
        )
