"""Triton's kernels as a backend of any device: on a CPU they are interpreted."""

from __future__ import annotations

import torch

from hfkv.kernels.backend import Asked, Backend, Kernel


class Interpreted(Backend):
    """Triton's kernels of one query, wherever the tensors are."""

    def serves(self, device: torch.device) -> bool:
        return True

    def attention(self, asked: Asked) -> Kernel:
        from hfkv.kernels.triton.decode import decode_attention

        run = decode_attention if asked.num_queries == 1 else None
        return Kernel(
            *("triton decode", "interpreted", run), reads_device_lengths=True, takes_pairs=True, takes_means=True
        )

    def latent(self, asked: Asked) -> Kernel:
        from hfkv.kernels.triton.latent import latent_attention

        return Kernel("triton latent", "interpreted", latent_attention, reads_device_lengths=True, takes_pairs=True)

    def append(self, asked: Asked) -> Kernel:
        from hfkv.kernels.triton.append import append

        return Kernel("triton append", "interpreted", append, reads_device_lengths=True, takes_pairs=True)
