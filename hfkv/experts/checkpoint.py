"""Models with experts in few bytes, saved by `save_pretrained` and loaded by `from_pretrained` as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfkv.experts.families import experts_of, weight_names
from hfkv.experts.implementation import NAME
from hfkv.experts.int4 import Int4Weights
from hfkv.experts.int8 import Int8Weights
from hfkv.experts.stack import ExpertStack, as_parameter

CODECS: dict[str, type[Int8Weights] | type[Int4Weights]] = {"int8": Int8Weights, "int4": Int4Weights}
# Under this name an experts module keeps the bytes of a parameter while they are read from a file.
_PLANES = "hfkv_{}"


class ExpertsConfig(QuantizationConfigMixin):
    """The entry in ``config.json`` of a saved model: that its experts are hfkv's, and how they are written.

    Args:
        codec: ``"int8"`` or ``"int4"``.
    """

    def __init__(self, codec: str, **kwargs: Any) -> None:
        if codec not in CODECS:
            raise ValueError(f"the experts of a saved model are {' or '.join(CODECS)}, got {codec!r}")
        self.quant_method = NAME
        self.codec = codec


class ExpertsQuantizer(HfQuantizer):
    """Transformers' way to load and save weights that are not plain tensors."""

    _given: dict[str, Any] | None = None

    @property
    def codec(self) -> str:
        """The codec of the expert weights."""
        return self.quantization_config.codec

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: adapters around the experts can, the experts cannot."""
        return True

    def is_serializable(self) -> bool:
        """Whether the model can be saved: always."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Gives every tensor of `model` by name, with its experts' bytes in an order that no processor decides."""
        state = dict(model.state_dict() if self._given is None else self._given)
        for name, experts in experts_of(model).items():
            for parameter in weight_names(experts):
                stack = state.pop(f"{name}.{parameter}", None)
                if stack is None:
                    continue
                planes = self._encoded(stack, experts.is_transposed).portable_planes()
                place = f"{name}.{_PLANES.format(parameter)}"
                state |= {f"{place}.{plane}": tensor for plane, tensor in planes.items()}
        return state, {}

    def _encoded(self, stack: torch.Tensor, is_transposed: bool) -> Any:
        if isinstance(stack, ExpertStack) and stack.weights.form == self.codec:
            return stack.weights
        matrices = stack.transpose(1, 2) if is_transposed else stack + 0
        weights = CODECS[self.codec](tuple(matrices.shape), matrices.dtype, matrices.device)  # type: ignore[arg-type]
        weights.write_all(matrices)
        return weights

    @contextmanager
    def given(self, state: dict[str, Any] | None) -> Iterator[None]:
        """Saves `state` in place of the model's own, while the context lasts."""
        self._given = state
        try:
            yield
        finally:
            self._given = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "hfkv writes experts in fewer bytes once a model is loaded: from_pretrained without a "
                f"quantization_config, then hfkv.patch(model, moe={self.codec!r}); then save_pretrained"
            )
        for experts in experts_of(model).values():
            for parameter in weight_names(experts):
                given = experts._parameters.pop(parameter)
                shape = tuple(given.transpose(1, 2).shape if experts.is_transposed else given.shape)
                weights = CODECS[self.codec](shape, given.dtype, torch.device("meta"))
                experts.add_module(_PLANES.format(parameter), _Planes(weights.planes()))
            # Its numbers all come from the file.
            experts._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, experts in experts_of_planes(model).items():
            for parameter in weight_names(experts):
                holder = experts._modules.pop(_PLANES.format(parameter))
                planes = dict(holder.named_buffers())
                meta = [plane for plane, tensor in planes.items() if tensor.device.type == "meta"]
                if meta:
                    raise ValueError(
                        f"{name}.{parameter} of this checkpoint is put away by a device_map ({', '.join(meta)}); load "
                        "all experts on a device, or keep them in a file: docs/use/expert-offload.md"
                    )
                missing = [plane for plane, tensor in planes.items() if not _is_read(tensor)]
                if missing:
                    raise ValueError(
                        f"{name}.{parameter} is not whole in this checkpoint, whose config says that hfkv wrote its "
                        f"experts as {self.codec}: no {', '.join(missing)}. Save it again from the patched model"
                    )
                weights = CODECS[self.codec].of_planes(planes, model.dtype)
                stack = as_parameter(ExpertStack(weights, experts.is_transposed), requires_grad=False)
                experts.register_parameter(parameter, stack)
        model.set_experts_implementation(NAME)


class _Planes(nn.Module):
    def __init__(self, planes: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, plane in planes.items():
            self.register_buffer(name, plane)


def _is_read(plane: torch.Tensor) -> bool:
    """Whether transformers has read a plane from the checkpoint: it marks the tensors that it has read."""
    return getattr(plane, "_is_hf_initialized", False)


def experts_of_planes(model: nn.Module) -> dict[str, Any]:
    """The experts modules that are being read from a file, by name."""
    return {name: module for name, module in model.named_modules() if _PLANES.format("down_proj") in module._modules}


def register() -> None:
    """Makes ``quant_method="hfkv"`` known to transformers."""
    register_quantization_config(NAME)(ExpertsConfig)
    register_quantizer(NAME)(ExpertsQuantizer)


register()
