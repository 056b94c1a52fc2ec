"""CUDA graphs: the decode step of a whole model captured once and replayed inside `generate`."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._pytree import tree_map_only
from transformers.utils import ModelOutput

from hfkv.attention.device_step import DeviceStep, advance, step_reason
from hfkv.cache.kv_cache import KVCache
from hfkv.cache.retired import Retired
from hfkv.codecs import autocast
from hfkv.models.parallel import parallel_plan_of
from hfkv.models.probe import growing_rope_type
from hfkv.patches.mla import latent_reason
from hfkv.patches.undo import Undo
from hfkv.stores.layout import Layout

logger = logging.getLogger("hfkv")

# What a decode step of `generate` passes. Tensors are copied to where the graph reads them.
TENSORS = {"input_ids", "position_ids"}
SETTINGS = {"use_cache", "return_dict", "logits_to_keep", "output_attentions", "output_hidden_states"}
DEVICE_TYPES = {"cuda"}
# Caches have room for a multiple of so many tokens: calls whose lengths differ a little share planes and graph.
ROUND = 256


class CudaGraph:
    """One captured run of a function, on one device."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], Any]) -> Any:
        """Captures `run` and returns what it returns; nothing is carried out before `replay`."""
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        """Carries out what was captured, into the same outputs."""
        self._graph.replay()


class CapturedStep:
    """A captured decode step of one cache.

    Attributes:
        step: what the step reads of the cache.
        inputs: the tensors that it reads besides.
        outputs: the fields of the model's output that it writes.
        state: the model's state when it was captured.
    """

    def __init__(self, step: DeviceStep, inputs: dict[str, torch.Tensor], state: Any) -> None:
        self.step, self.inputs, self.state = step, inputs, state
        self.graph: Any = make_graph()
        self.output_class: Any = None
        self.outputs: dict[str, Any] = {}

    def fits(self, tensors: dict[str, torch.Tensor], state: Any) -> bool:
        """Whether it was captured for such inputs and the model as it is."""
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self.inputs.items()}
        return self.state == state and shapes == {name: (given.shape, given.dtype) for name, given in tensors.items()}

    def result(self, cache: KVCache) -> Any:
        """The model's output, in tensors of its own: the next replay overwrites the captured ones."""
        fields = tree_map_only(torch.Tensor, torch.clone, self.outputs)
        return self.output_class(**fields, past_key_values=cache)


def make_graph() -> CudaGraph:
    """A graph that has captured nothing yet."""
    return CudaGraph()


class Graphs:
    """The forward of a patched model: decode steps are replayed, everything else goes to the model's own.

    The first step of a cache runs as usual, which compiles what must be compiled; the second is captured, and the
    others replay it. It is captured anew when the planes of the cache have moved (its store grew), when the number of
    rows or the adapters have changed, and after a forward of several tokens.

    A later call of the same kind (config, rows, no more tokens than before, rounded up) gets the planes of a cache that
    is gone, and replays from its first step on.

    Args:
        model: the patched model.
        forward: the model's own forward.
    """

    def __init__(self, model: Any, forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward
        self.off: str | None = None  # why nothing is captured
        self._captured: weakref.WeakKeyDictionary[KVCache, CapturedStep | None] = weakref.WeakKeyDictionary()
        self._kept: tuple[Retired, CapturedStep] | None = None
        self._modules: list[Any] = []
        self._logged: set[str] = set()

    def __reduce__(self) -> Any:
        # A copy captures for itself.
        return type(self), (self.model, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if self.off is not None or not isinstance(cache, KVCache):
            return self.forward(*args, **kwargs)
        if args or not _is_step(kwargs) or cache.get_seq_length() == 0:
            self._captured.pop(cache, None)
            self._modules = list(self.model.modules())
            if cache.get_seq_length() == 0 and cache.batch_size is None:
                self._lend_planes(cache, kwargs)
            return self.forward(*args, **kwargs)
        if cache not in self._captured:
            self._captured[cache] = self._take_over(cache)
            if self._captured[cache] is None:
                return self.forward(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and _has_windows(cache) and bool((mask != 0).all()):
            # transformers 5.17 passes masks that hide nothing; a window's step takes none at all.
            mask = None
            kwargs = {**kwargs, "attention_mask": None}
        tensors = {name: kwargs[name] for name in TENSORS if kwargs.get(name) is not None}
        state = (mask is None, model_state(self._modules))
        captured = self._captured[cache]
        if captured is not None and not captured.fits(tensors, state):
            captured = None
        reason = _input_reason(kwargs)
        if reason is None and captured is None:
            decoder = self.model.config.get_text_config(decoder=True)
            reason = hooks_reason(self.model) or step_reason(cache, mask, decoder)
            reason = reason or latent_reason(self.model, cache.layers[0].dtype)
        if reason is not None:
            self._captured[cache] = None
            self._log(reason)
            return self.forward(*args, **kwargs)
        befores = advance(cache)
        if captured is None or not captured.step.update(befores, mask):
            return self._capture(cache, kwargs, tensors, befores, state)
        for name, tensor in tensors.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        return captured.result(cache)

    def _capture(
        self,
        cache: KVCache,
        kwargs: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        befores: list[Layout],
        state: Any,
    ) -> Any:
        """Captures the step for which `cache` has been advanced, and carries it out."""
        mask = kwargs.get("attention_mask")
        with torch.inference_mode(False):
            inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        captured = CapturedStep(DeviceStep(list(cache.layers), befores, mask), inputs, state)
        # Attention reads the mask that the step holds; a mask of four dimensions is handed through by transformers.
        placeholder = None if mask is None else mask[:, None, None, :].bool()
        given = {**kwargs, **inputs, "attention_mask": placeholder}
        with captured.step.running():
            try:
                output = captured.graph.capture(functools.partial(self.forward, **given))
            except RuntimeError as error:
                self.turn_off(f"the step cannot be captured ({str(error).splitlines()[0]})")
                return self.forward(**given)
            except BaseException:
                # Nothing has been written where the cache has made room.
                with contextlib.suppress(RuntimeError):
                    cache.crop(-1)
                raise
        if not isinstance(output, ModelOutput):
            raise TypeError(f"{type(self.model).__name__} returned a {type(output).__name__} and not a ModelOutput")
        captured.output_class = type(output)
        captured.outputs = {name: value for name, value in output.items() if name != "past_key_values"}
        captured.graph.replay()
        self._captured[cache] = captured
        self._kept = Retired(cache), captured
        return captured.result(cache)

    def _lend_planes(self, cache: KVCache, kwargs: dict[str, Any]) -> None:
        """Prepares an empty cache for its prompt: with room for texts a little longer, and the planes kept, if any."""
        ids = kwargs.get("input_ids")
        for leaf in cache.leaves:
            leaf.reserve(-(-leaf.reserved // ROUND) * ROUND)
        if self._kept is None or ids is None:
            return
        retired, captured = self._kept
        if retired.is_gone:
            captured.step.release()
        if retired.is_free and retired.kv == cache.kv and retired.rows == ids.shape[0]:
            retired.lend_to(cache)
        elif retired.is_gone:
            self._kept = None  # nothing is kept for nobody

    def _take_over(self, cache: KVCache) -> CapturedStep | None:
        """The step captured for the cache that had these planes; None where there is none."""
        if self._kept is None or not self._kept[0].is_of(cache):
            return None
        retired, captured = self._kept
        if cache.batch_size != retired.rows or not captured.step.adopt(list(cache.layers)):
            self._kept = None
            return None
        retired.hold(cache)
        return captured

    def turn_off(self, reason: str) -> None:
        """Turns capturing off for good, and logs why."""
        self.off, self._kept = reason, None
        self._captured = weakref.WeakKeyDictionary()
        logger.warning("%s: no CUDA graphs: %s", type(self.model).__name__, reason)

    def _log(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("%s: no CUDA graph for such a step: %s", type(self.model).__name__, reason)


def set_graphs(model: Any, undo: Undo) -> Graphs:
    """Overrides `forward` on this instance."""
    graphs = Graphs(model, model.forward)
    reason = model_reason(model)
    if reason is not None:
        graphs.turn_off(reason)
    undo.override_forward(_forward, model, (graphs,), needs_patch=False)
    return graphs


def _forward(model: Any, graphs: Graphs, *args: Any, **kwargs: Any) -> Any:
    return graphs(*args, **kwargs)


def model_reason(model: Any) -> str | None:
    """Why decode steps of `model` are never captured, in words, or None where they may be."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type not in DEVICE_TYPES:
        return f"its parameters are on {', '.join(sorted(map(str, devices)))}, and a graph is of one CUDA device"
    if not parallel_plan_of(model).is_one:
        return "it is spread over several processes"
    hooks = hooks_reason(model)
    if hooks is not None:
        return hooks
    if growing_rope_type(model.config.get_text_config(decoder=True)) is not None:
        return "its rotary angles depend on the length of the text"
    return None


def hooks_reason(model: Any) -> str | None:
    """The hooks that forbid a graph, in words, or None: a replay would not call them."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "torch has forward hooks for all modules"
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"accelerate has set a hook on {name or 'the model'}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has forward hooks, which a replay would not call"
    return None


def model_state(modules: list[Any]) -> Any:
    """What a captured step depends on and may change between two steps: weights, hooks, adapters.

    Args:
        modules: the model's modules, as they were at its last forward of several tokens.
    """
    state: list[Any] = [len(_global_forward_hooks), len(_global_forward_pre_hooks)]
    for module in modules:
        state.append(len(module._forward_hooks) + len(module._forward_pre_hooks))
        state += map(id, module._modules.values())
        state += [weight.data_ptr() for weight in module._parameters.values() if weight is not None]
        if hasattr(module, "merged_adapters"):
            scaling = getattr(module, "scaling", {})
            state += [tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters)]
            state.append(tuple(scaling.items()) if isinstance(scaling, dict) else scaling)
    return state


def _has_windows(cache: KVCache) -> bool:
    return any(layer.window is not None and not layer.is_sliding for layer in cache.kv_layers)


def _is_step(kwargs: dict[str, Any]) -> bool:
    ids = kwargs.get("input_ids")
    return ids is not None and ids.dim() == 2 and ids.shape[1] == 1 and not torch.is_grad_enabled()


def _input_reason(kwargs: dict[str, Any]) -> str | None:
    known = {*TENSORS, *SETTINGS, "past_key_values", "attention_mask"}
    for name, value in kwargs.items():
        if value is not None and name not in known:
            return f"it is given {name!r}"
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            return f"it is asked for {name!r}"
    if kwargs.get("return_dict") is False or kwargs.get("use_cache") is False:
        return "it is asked for a tuple, or for no cache"
    if kwargs.get("position_ids") is None:
        return "it is given no 'position_ids'"
    if autocast.is_on():
        return "autocast casts its weights, and a graph cannot tell for how long the casts are kept"
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return "its attention mask is not [B, seen]"
    return None
