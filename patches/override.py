"""`Override`: a method of ours on one instance, which looks like a bound method."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

# Names what a method of ours does, to be found under what others have wrapped around it.
_MARK = "hfkv_function"
# Where an overridden forward of the instance's own is.
INNER = "_hfkv_forward"


class Override:
    """Replaces a method of a class on one instance, as ``types.MethodType(function, owner)`` would.

    A plain bound method is pickled by its name, and comes back as the class's own; a partial has no ``__func__``, which
    models and libraries take to bind a method to another object or to look through wrappers. An override has both: it
    is copied and pickled with its owner, and its ``__func__`` takes any other object. On another object, and once the
    patch has been taken off, it does what the class's own method does.

    Args:
        function: takes the object, then `given`, then what it is called with.
        owner: the instance.
        name: the method's name.
        given: further arguments of `function`.
        needs_patch: whether an object must be a patched model for `function`; else the class's own method is called.
    """

    def __init__(
        self, function: Callable[..., Any], owner: Any, name: str, given: tuple[Any, ...] = (), needs_patch: bool = True
    ) -> None:
        self._owner = owner
        self._made_of = (function, name, needs_patch)
        self._given = given
        make: Any = _make if given else _made_once  # what is given may hold on to the owner
        self._method = make(function, type(owner), name, needs_patch, *given)
        self.__doc__ = self._method.__doc__

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return MethodType

    @property
    def __func__(self) -> Any:
        return self._method

    @property
    def __self__(self) -> Any:
        return self._owner

    @property
    def function(self) -> Callable[..., Any]:
        """The function behind it, which takes any object."""
        return self._made_of[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self._owner:
            # Bound once more: accelerate does that with what it takes for the function that it had wrapped.
            args = args[1:]
        return self._method(self._owner, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if "_method" not in vars(self):  # while it is being made
            raise AttributeError(name)
        return getattr(self._method, name)

    def __eq__(self, other: object) -> bool:
        return is_override(other, self) and getattr(other, "__self__", None) is self._owner

    def __hash__(self) -> int:
        return hash((id(self._owner), self._method))

    def __repr__(self) -> str:
        return f"<hfkv's {self._method.__qualname__} of a {type(self._owner).__name__}>"

    def __deepcopy__(self, memo: Any) -> Override:
        function, name, needs_patch = self._made_of
        owner, given = copy.deepcopy((self._owner, self._given), memo)
        return Override(function, owner, name, given, needs_patch)

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, name, needs_patch = self._made_of
        return Override, (function, self._owner, name, self._given, needs_patch)


def is_override(method: Any, ours: Override) -> bool:
    """Whether `method` is `ours`, or bound anew from it by other code."""
    inner = getattr(method, "__func__", None)
    return method is ours or inner is ours._method or inner is ours


def does(method: Any, function: Callable[..., Any]) -> bool:
    """Whether a method, or the one it says it wraps, is an override by `function`."""
    while method is not None:
        method = getattr(method, "__func__", method)
        if getattr(method, _MARK, None) is function:
            return True
        method = getattr(method, "__wrapped__", None)
    return False


def inner_forward(module: Any) -> Callable[..., Any]:
    """The forward that an override has replaced."""
    inner = vars(module).get(INNER)
    return functools.partial(type(module).forward, module) if inner is None else inner  # which a compiler can trace


def _make(function: Callable[..., Any], kind: type, name: str, needs_patch: bool, *given: Any) -> Any:
    stock = getattr(kind, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if needs_patch and "hfkv" not in vars(self):
            return inner_forward(self)(*args, **kwargs) if name == "forward" else stock(self, *args, **kwargs)
        return function(self, *given, *args, **kwargs)

    for copied in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(method, copied, getattr(stock, copied, None))
    # Not `__wrapped__`: who looks for what is wrapped would go past this one.
    method.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    setattr(method, _MARK, function)
    return method


_made_once = functools.cache(_make)
