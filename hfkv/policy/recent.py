"""`Recent`: the newest tokens and the sinks of each row in more bits than the rest."""

from __future__ import annotations

from dataclasses import dataclass

from hfkv.policy.codec_pair import checked_codec

_MOST = 1 << 40  # tokens


@dataclass(frozen=True)
class Recent:
    """A query at position t meets key j in `codec` when ``j > t - size or j < sinks``, and else in the config's codec.

    Positions count from a row's first real token, as under a `Window`. Every token is held in the config's codec from
    the start; the newest ones and the sinks are held in this one besides.

    Args:
        size: how many of the newest tokens a query meets so, itself included; at least 1.
        codec: ``"int8"``, or another with more bits than the config's; or one for keys and one for values.
        sinks: how many of the first tokens; at least 0.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
    """

    size: int = 256
    codec: str = "int8"
    sinks: int = 4

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("sinks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Recent.{name} must be an int (a number of tokens), got {value!r}")
            if not least <= value <= _MOST:
                raise ValueError(f"Recent.{name} must be from {least} to {_MOST:,} tokens, got {value:,}")
        object.__setattr__(self, "codec", checked_codec("Recent.codec", self.codec))


def check_recent(recent: object, codec: str, has_window: bool, has_promise: bool) -> None:
    """Checks the recent tokens of a config against what else it says.

    Args:
        recent: what was given; None is right.
        codec: the config's codec.
        has_window: whether the config has a window.
        has_promise: whether it promises a change of the loss instead of naming a codec.

    Raises:
        TypeError: `recent` is no `Recent`.
        ValueError: the other tokens are in the same codec or lose nothing, or a window or a promise stands beside it.
    """
    if recent is None:
        return
    if not isinstance(recent, Recent):
        raise TypeError(
            f'KVConfig.recent must be None or an hfkv.Recent, such as hfkv.Recent(256, "int8"); got {recent!r}'
        )
    if has_window:
        raise ValueError(
            "KVConfig.recent keeps every token, the old ones in fewer bits, and KVConfig.window lets go of them; "
            "leave one of the two out"
        )
    if has_promise:
        raise ValueError(
            "KVConfig.recent goes with a codec for the other tokens, and KVConfig.loss_change finds codecs by itself; "
            "name the codec (int2+recent:256), or leave recent out"
        )
    if codec in ("none", recent.codec):
        raise ValueError(
            f"KVConfig.recent holds the newest tokens in {recent.codec}, in more bits than the others, and these are "
            f"in {codec!r}; name a codec of fewer bits for them (int2+recent:{recent.size}), or leave recent out"
        )
