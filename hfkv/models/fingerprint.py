"""`Fingerprint`: what the keys and values of a model depend on besides its tokens."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

# So many numbers of each tensor are looked at, evenly spaced.
SAMPLES = 64
# What of a config says nothing of keys and values.
_VOLATILE = (
    "_attn_implementation",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "quantization_config",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_LIBRARIES = ("transformers", "accelerate", "kernels", "hfkv")


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a model at one moment.

    Attributes:
        model: the name of its class, and a digest of the parts of its config that shape keys and values.
        adapters: PEFT's active, merged and disabled adapters and their scalings, in words.
        weights: a digest of 64 numbers of every weight, except those of adapters that are not in use.
        versions: a digest of where the weights lie and how often torch has written to them; it holds in one process.
        buffers: a digest of numbers of every buffer (rotary frequencies, say) and of the classes of all modules.
        precision: the dtype of the first weights, autocast's, and whether rotary angles are exact.
        has_hooks: whether forward hooks may change what the model computes unseen (PEFT sets some for mixed batches).
        object: the model itself, while it lives.
    """

    model: str
    adapters: str
    weights: str
    versions: str
    buffers: str
    precision: str
    has_hooks: bool = field(default=False, compare=False)
    object: Any = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "object": None}  # a weak reference cannot be pickled

    def difference(self, other: Fingerprint) -> str | None:
        """What `other` has that this has not, in words, or None where keys and values of both are the same."""
        is_same_object = self.object is not None and other.object is not None and self.object() is other.object()
        is_rewritten = is_same_object and self.versions != other.versions
        return fingerprint_difference(self.fingerprint(), other.fingerprint(), is_rewritten)

    def key(self, salt: str) -> bytes:
        """The key under which pages may be shared."""
        parts = (self.model, self.adapters, self.weights, self.versions, self.buffers, self.precision, salt)
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).digest()

    def fingerprint(self) -> dict[str, str]:
        """The parts that still hold in another process."""
        return {
            "model": self.model,
            "adapters": self.adapters,
            "weights": self.weights,
            "precision": self.precision,
        }


def fingerprint_difference(one: Mapping[str, str], other: Mapping[str, str], is_rewritten: bool = False) -> str | None:
    """What the fingerprint `other` has that `one` has not, in words, or None where they are the same.

    Args:
        one, other: two values of `Fingerprint.fingerprint`.
        is_rewritten: whether the weights are known to have been written to between them.
    """
    if one["model"] != other["model"]:
        return f"another model: {one['model']} and not {other['model']}"
    if one["adapters"] != other["adapters"]:
        return f"another state of the adapters: {one['adapters']} and not {other['adapters']}"
    if one["precision"] != other["precision"]:
        return f"another precision: {one['precision']} and not {other['precision']}"
    return "other weights" if one["weights"] != other["weights"] or is_rewritten else None


def fingerprint_of(model: Any, exact_rotary: bool = False) -> Fingerprint:
    """Looks at a model: a few numbers of every weight, and PEFT's adapters.

    Args:
        model: a `PreTrainedModel`, the base model of a `PeftModel`.
        exact_rotary: whether rotary angles are computed in float64.
    """
    config = model.config.get_text_config(decoder=True)
    shaping = {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}
    digest = hashlib.blake2b(json.dumps(shaping, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    parameters: list[torch.Tensor] = []
    buffers: list[torch.Tensor] = []
    names: list[str] = []
    versions: list[tuple[int, int]] = []
    adapters: dict[str, None] = {}
    has_hooks = bool(_global_forward_hooks or _global_forward_pre_hooks)
    for module in _modules_in_use(model):
        names.append(type(module).__qualname__)
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if _is_packed_later(weight):
                versions.append((id(weight), 0))
                continue
            if weight.device.type == "meta":
                parameters += _plain(_at_rest(module, name, weight))
                continue
            parts = _plain(weight)
            versions += map(_version, parts)
            parameters += parts
        for buffer in module._buffers.values():
            buffers += [] if buffer is None else _plain(buffer)
        has_hooks = has_hooks or _is_hooked(module)
        if _is_adapted(module):
            adapters[_adapters_of(module)] = None
    device_type = next((tensor.device.type for tensor in parameters if tensor.device.type != "meta"), "cpu")
    precision = str(next((tensor.dtype for tensor in parameters if tensor.is_floating_point()), None))
    if torch.is_autocast_enabled(device_type):
        precision += f" under autocast to {torch.get_autocast_dtype(device_type)}"
    return Fingerprint(
        model=f"{type(model).__name__} {digest}",
        adapters=", ".join(adapters) or "none",
        weights=_digest(parameters),
        versions=hashlib.blake2b(repr(versions).encode(), digest_size=16).hexdigest(),
        buffers=_digest(buffers) + hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest(),
        precision=f"{precision}{', exact rotary angles' if exact_rotary else ''}".replace("torch.", ""),
        has_hooks=has_hooks,
        object=weakref.ref(model),
    )


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _is_hooked(module: Any) -> bool:
    """Whether code of the model's user runs in the forward of one module."""
    hooks = [*(module._forward_hooks or {}).values(), *(module._forward_pre_hooks or {}).values()]
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        hooks.append(vars(module)["forward"])
    return any(not _is_known(hook) for hook in hooks)


def _is_known(hook: Any) -> bool:
    """Whether a hook is a library's that changes nothing: transformers captures hidden states by hooks that stay."""
    while hasattr(hook, "func"):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").split(".")[0] in _LIBRARIES


def _is_adapted(module: Any) -> bool:
    # The class is asked: a module looks for an attribute that is not there among its parts, which takes long.
    return hasattr(type(module), "adapter_layer_names") and hasattr(type(module), "active_adapters")


def _in_use(module: Any) -> set[str]:
    """The adapters of a PEFT layer that take part in what it computes."""
    merged = set(getattr(module, "merged_adapters", ()))
    return merged if module.disable_adapters else merged | set(module.active_adapters)


def _adapters_of(module: Any) -> str:
    active = [] if module.disable_adapters else list(module.active_adapters)
    merged = list(getattr(module, "merged_adapters", ()))
    scaling = getattr(module, "scaling", None)
    scales = {name: scaling[name] for name in _in_use(module) if name in scaling} if isinstance(scaling, dict) else {}
    words = [f"active {'+'.join(active) or 'none'}"]
    words += [f"merged {'+'.join(merged)}"] if merged else []
    words += [f"scaled {name} by {scale}" for name, scale in sorted(scales.items())]
    return " ".join(words)


def _modules_in_use(model: nn.Module) -> list[Any]:
    """Every module, except those of adapters that are not in use."""
    found: list[Any] = []
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        found.append(module)
        named: tuple[str, ...] = module.adapter_layer_names if _is_adapted(module) else ()
        for name, child in module._modules.items():
            if child is None:
                continue
            if name not in named:
                waiting.append(child)
            elif isinstance(child, nn.ParameterDict):
                found.append(_Chosen({key: weight for key, weight in child.items() if key in _in_use(module)}))
            else:
                waiting += [adapter for key, adapter in child._modules.items() if key in _in_use(module)]
    return found


class _Chosen:
    """Some weights of a `ParameterDict`, as a module."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self._parameters = parameters
        self._buffers: dict[str, torch.Tensor] = {}
        self._forward_hooks = self._forward_pre_hooks = None  # as a module has them


def _digest(tensors: list[torch.Tensor]) -> str:
    """A digest of the shapes and some numbers of `tensors`, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    by_kind: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        if tensor.device.type != "meta" and tensor.numel():
            by_kind.setdefault((tensor.device, tensor.dtype), []).append((index, _sample(tensor)))
    samples: dict[int, torch.Tensor] = {}
    for (device, dtype), of_kind in by_kind.items():  # one copy from each device
        # Into a tensor of their dtype: autocast would choose another.
        together = torch.empty(0, dtype=dtype, device=device)
        together = torch.cat([sample for _, sample in of_kind], out=together).cpu()
        parts = together.split([len(sample) for _, sample in of_kind])
        samples |= {index: part for (index, _), part in zip(of_kind, parts, strict=True)}
    for index in sorted(samples):
        digest.update(samples[index].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _at_rest(module: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight that accelerate will bring back for one it has put away; the empty one where that is not known."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        weights = getattr(part, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    return weight


def _is_packed_later(weight: torch.Tensor) -> bool:
    """Whether a weight's numbers change at the first forward: on a CPU bitsandbytes packs 4-bit ones anew there."""
    return type(weight).__name__ == "Params4bit" and weight.device.type == "cpu"


def _plain(tensor: Any) -> list[torch.Tensor]:
    """The tensors behind one that stands for others (shards, quantised weights), or the tensor itself."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return [tensor]
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [plain for part in parts if isinstance(part, torch.Tensor) for plain in _plain(part)]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.data
    flat = plain.view(-1) if plain.is_contiguous() else plain.flatten()
    # An odd step does not stay in one column of a matrix.
    return flat[:: max(len(flat) // SAMPLES, 1) | 1][: 2 * SAMPLES]
