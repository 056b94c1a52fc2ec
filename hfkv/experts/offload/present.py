"""`PresentWeights`: the experts of one projection of a module, in whatever form they are found there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hfkv.experts.config import MoEConfig
from hfkv.experts.offload.expert_source import Encoder, ExpertSource, contents_digest, plane_shapes
from hfkv.experts.offload.offloaded import OffloadedWeights
from hfkv.experts.stack import ExpertStack
from hfkv.experts.weights import ExpertWeights, PlainWeights
from hfkv.models.weights_at_rest import AtRest, at_rest, execution_device
from hfkv.stores.offload.bus import BUSES, Bus, bus_to


@dataclass(frozen=True, eq=False)
class PresentWeights:
    """Weights, or what is known of them.

    Attributes:
        shape: (E, N, K).
        dtype: the dtype they are computed with.
        device: the device they are computed on.
        weights: their numbers; None where these are not to be had.
        at_rest: the place where accelerate has put them, or None.
        is_transposed: whether they lie as `[E, K, N]` there.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    weights: ExpertWeights | None
    at_rest: AtRest | None = None
    is_transposed: bool = False

    @classmethod
    def of(cls, module: Any, parameter: str, *, needs_numbers: bool = True) -> PresentWeights:
        """The weights of one parameter.

        Args:
            module: the experts module.
            parameter: the parameter's name.
            needs_numbers: whether the shape alone is not enough.

        Raises:
            ValueError: the parameter is on meta, and its numbers are not known.
        """
        tensor = module._parameters[parameter]
        if isinstance(tensor, ExpertStack):
            kept = tensor.weights
            return cls(kept.shape, kept.dtype, kept.device, kept)
        given, found, device = tensor.detach(), None, tensor.device
        if tensor.device.type == "meta" and needs_numbers:
            found, device = at_rest(module, parameter), execution_device(module)
            given = found.tensor
        elif tensor.device.type == "meta":
            device = _device_or_cpu(module)
        matrices = given.transpose(1, 2) if module.is_transposed else given
        weights = None if given.device.type == "meta" else PlainWeights(matrices)
        dtype = tensor.dtype if found is None else found.dtype
        return cls(tuple(matrices.shape), dtype, device, weights, found, module.is_transposed)

    @property
    def codec(self) -> str | None:
        """The codec that the weights are compressed in, or None."""
        form = self.weights.form.removeprefix("offloaded ") if self.weights is not None else ""
        return form if form in ("int8", "int4") else None

    def origin(self) -> str:
        """A mark that tells these weights from others."""
        weights = self.weights
        if isinstance(weights, PlainWeights):
            return contents_digest(weights.matrices)
        assert weights is not None
        return contents_digest(weights.decode(expert) for expert in range(self.shape[0]))

    def planes(
        self, codec: str, device: torch.device, *, has_cpu_order: bool
    ) -> Callable[[int], dict[str, torch.Tensor]]:
        """The function that makes the planes of one expert."""
        weights = self.weights
        assert weights is not None
        if isinstance(weights, OffloadedWeights) and self.codec is not None:
            source = weights.source
            return source.expert if source.has_cpu_order == has_cpu_order else source.portable
        if self.codec is not None:
            as_they_are = weights.cpu_planes() if has_cpu_order else weights.portable_planes()  # type: ignore[attr-defined]
            return lambda expert: {name: plane[expert].cpu() for name, plane in as_they_are.items()}
        encode = Encoder(codec, self.shape, self.dtype, device, has_cpu_order)
        return lambda expert: encode(weights.decode(expert))

    def own_source(self) -> ExpertSource:
        """The source in accelerate's own file."""
        assert self.at_rest is not None
        digest = torch.tensor(list(bytes.fromhex(self.origin())), dtype=torch.uint8)
        return ExpertSource(
            "none",
            self.shape,
            self.dtype,
            {"matrices": self.at_rest.tensor},
            is_transposed=self.is_transposed,
            path=self.at_rest.path,
            digest=digest,
        )

    def host_source(self, codec: str, bus: Bus) -> ExpertSource:
        """The source in host memory that a device reaches at its full speed."""
        shapes = plane_shapes(codec, self.shape, self.dtype)
        planes = {name: bus.allocate(shape, dtype) for name, (shape, dtype) in shapes.items()}
        produce = self.planes(codec, self.device, has_cpu_order=False)
        for expert in range(self.shape[0]):
            for name, plane in produce(expert).items():
                planes[name][expert] = plane
        return ExpertSource(codec, self.shape, self.dtype, planes, is_pinned=True)


def bus_for(device: torch.device) -> Bus | None:
    """The way to a device that has memory of its own; None for a CPU."""
    return bus_to(device) if device.type != "cpu" and device.type in BUSES else None


def codec_of(config: MoEConfig, given: list[PresentWeights], name: str) -> str:
    """The codec to write weights in.

    Raises:
        ValueError: the weights are compressed in another codec.
    """
    for each in given:
        if each.codec not in (None, config.codec):
            raise ValueError(
                f"{name} is {each.codec} already and is not written as {config.codec}: that would round it twice. Give "
                f"codec={each.codec!r}, or load the model anew"
            )
    return config.codec


def _device_or_cpu(module: Any) -> torch.device:
    try:
        return execution_device(module)
    except ValueError:
        return torch.device("cpu")
