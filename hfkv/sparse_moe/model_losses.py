"""`moe_losses`: the losses of all sparse layers of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hfkv.sparse_moe.layer import SparseMoE


@dataclass(frozen=True)
class MoELosses:
    """The losses of the last forward of every `SparseMoE` of a model.

    Attributes:
        total: what is added to the loss of the task: per layer its coefficients times its losses, then the mean of the
            layers. A scalar, with gradients where the forward had them.
        balance: `load_balancing_loss` by layer name, without coefficient, detached.
        z: `router_z_loss` by layer name, without coefficient, detached.
    """

    total: torch.Tensor
    balance: dict[str, torch.Tensor]
    z: dict[str, torch.Tensor]


def moe_losses(model: nn.Module, attention_mask: torch.Tensor | None = None) -> MoELosses:
    """The losses of the last forward of all `SparseMoE` layers of a model: add ``.total`` to the loss of the task.

    Nothing is added up between calls: with gradient accumulation, call it after every forward. Under gradient
    checkpointing the second forward counts for nothing. A stock MoE model of transformers has no such layers: it adds
    its own loss when it is called with ``output_router_logits=True``.

    Args:
        model: any module that holds `SparseMoE` layers.
        attention_mask: [B, T] of the last forward, 0 for padding, which is then left out; may be None.

    Returns:
        The losses, on the device of the first layer.

    Raises:
        ValueError: there are no such layers, or the mask has another size than the last forward.
        RuntimeError: a layer has not run yet, or ran without gradients where they are expected.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseMoE)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no SparseMoE layers; a stock MoE model adds its own loss when it is called "
            "with output_router_logits=True"
        )
    totals, balance, z = [], {}, {}
    for name, layer in layers.items():
        balance_loss, z_loss = _layer_losses(name, layer, attention_mask)
        totals.append(layer.balance_coef * balance_loss + layer.z_coef * z_loss)
        balance[name], z[name] = balance_loss.detach(), z_loss.detach()
    total = torch.stack([loss.to(totals[0].device) for loss in totals]).mean()
    return MoELosses(total, balance, z)


def _layer_losses(
    name: str, layer: SparseMoE, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    record = layer.last_forward
    if record is None:
        raise RuntimeError(f"layer {name!r} has not run yet: call the model, then moe_losses")
    if torch.is_grad_enabled() and record.lacks_gradients:
        raise RuntimeError(
            f"layer {name!r} ran in training mode without gradients, so its losses would train nothing. With gradient "
            'checkpointing use gradient_checkpointing_kwargs={"use_reentrant": False}; under torch.no_grad() call '
            "moe_losses there too"
        )
    return record.losses(attention_mask)
