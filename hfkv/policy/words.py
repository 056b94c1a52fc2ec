"""The string form of a `KVConfig`: ``"int8+window:4096+sinks:4+offload"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hfkv.policy.codec_pair import CODEC_WORDS, word_of
from hfkv.policy.promise import read_percent, say_percent
from hfkv.policy.recent import Recent
from hfkv.policy.reuse import Reuse
from hfkv.policy.rules import RULES
from hfkv.policy.units import read_bytes, say_bytes
from hfkv.policy.window import Window

STORES = ("auto", "contiguous", "paged")


def read_words(text: str) -> dict[str, Any]:
    """The fields of a `KVConfig` that `text` names.

    Raises:
        TypeError: `text` is not a str.
        ValueError: naming the word and what is allowed.
    """
    if not isinstance(text, str):
        raise TypeError(f"KVConfig.parse takes a str, got {type(text).__name__}")
    given: dict[str, Any] = {}
    for word in text.strip().split("+"):
        name, value = _read_word(word.strip(), text)
        if name in given:
            raise ValueError(f"{text!r} gives {name} twice")
        given[name] = value
    _join_sides(given, text)
    of_window = {name: given.pop(name) for name in _WINDOW_WORDS if name in given}
    if "window" in given:
        window = given["window"]
        size = {"schedule": window} if window in RULES else {"size": window}
        if "size" in of_window and window not in RULES:
            raise ValueError(f"{text!r} gives the window's size twice; size:SIZE goes with window:{next(iter(RULES))}")
        given["window"] = Window(**size, **of_window)
    elif of_window:
        name = next(iter(of_window))
        what = "sinks need a window" if name == "sinks" else f"{name} needs a window"
        raise ValueError(f"{text!r}: {what}; write window:SIZE+{name}:...")
    _join_recent(given, text)
    return given


def _join_sides(given: dict[str, Any], text: str) -> None:
    """Makes one codec of those of keys and of values, where these are named apart."""
    key, value = given.pop("k", None), given.pop("v", None)
    if key is None and value is None:
        return
    both = given.get("codec")
    if both is not None:
        raise ValueError(
            f"{text!r} names a codec for keys and values, {both}, and another for one of them; write "
            f"k:{key or both}+v:{value or both}"
        )
    if key is None or value is None:
        named, missing = ("keys", f"k:{key}+v:CODEC") if value is None else ("values", f"k:CODEC+v:{value}")
        raise ValueError(f"{text!r} names a codec for {named} alone; write {missing}, or {key or value} for both")
    given["codec"] = word_of(key, value)


def _join_recent(given: dict[str, Any], text: str) -> None:
    """Makes one `Recent` of its words."""
    recent, sinks = given.get("recent"), given.pop("recent_sinks", None)
    if recent is not None:
        given["recent"] = Recent(**recent) if sinks is None else Recent(**recent, sinks=sinks)
    elif sinks is not None:
        raise ValueError(f"{text!r}: recent_sinks needs recent tokens; write recent:SIZE+recent_sinks:{sinks}")


def words_of(kv: Any) -> list[str]:
    """The words for `kv`, except `layers`, a salt and a schedule of one's own, which have no word."""
    words = [kv.codec] if kv.loss_change is None else [f"{_PROMISE}:{say_percent(kv.loss_change)}"]
    words += [] if kv.key_mean else ["key_mean:off"]
    if isinstance(kv.window, Window):
        words += _window_words(kv.window)
    words += [] if kv.recent is None else _recent_words(kv.recent)
    words += [kv.store] if kv.store != "auto" else []
    words += [f"page_size:{kv.page_size}"] if kv.page_size is not None else []
    words += ["offload"] if kv.offload else []
    words += [f"device_budget:{say_bytes(int(kv.device_budget))}"] if kv.device_budget is not None else []
    words += [f"reuse:{kv.reuse}"] if kv.reuse is not None else []
    return words


def _window_words(window: Window) -> list[str]:
    if window.schedule is None:
        words = [f"window:{window.size}"]
    else:
        name = window.schedule if isinstance(window.schedule, str) else _name_of(window.schedule)
        words = [f"window:{name}"] + ([f"size:{window.size}"] if window.size is not None else [])
    words.append(f"sinks:{window.sinks}")
    if window.sink_positions != "absolute":
        words.append(f"sink_positions:{window.sink_positions}")
    if window.global_layers:
        words.append(f"global_layers:{_dotted(window.global_layers)}")
    if window.global_heads:
        heads = (f"{layer}={_dotted(heads)}" for layer, heads in window.global_heads.items())
        words.append(f"global_heads:{','.join(heads)}")
    if window.summary is not None:
        words += [f"summary:{window.summary}", f"summary_pages:{window.summary_pages}"]
        words.append(f"summary_page_size:{window.summary_page_size}")
    return words


def _recent_words(recent: Recent) -> list[str]:
    sinks = [] if recent.sinks == Recent.sinks else [f"recent_sinks:{recent.sinks}"]
    return [f"recent:{recent.size}:{recent.codec.replace('+', _BESIDE)}", *sinks]


def _name_of(schedule: Any) -> str:
    """The name of a schedule of one's own, which is no word: not one that a rule has."""
    name = getattr(schedule, "__name__", "schedule")
    return f"{name}()" if name in RULES else name


def _dotted(indices: tuple[int, ...]) -> str:
    return ".".join(map(str, indices))


def _indices(text: str) -> tuple[int, ...]:
    return tuple(int(index) for index in text.split("."))


def _heads(text: str) -> dict[int, tuple[int, ...]]:
    heads = {}
    for part in text.split(","):
        layer, _, indices = part.partition("=")
        if int(layer) in heads:
            raise ValueError
        heads[int(layer)] = _indices(indices)
    return heads


def _size(text: str) -> int | str:
    return text if text in RULES else int(text)


def _switch(text: str) -> bool:
    return {"on": True, "off": False}[text]


def _codec(text: str) -> str:
    if text not in CODEC_WORDS:
        raise ValueError
    return text


def _recent(text: str) -> dict[str, Any]:
    size, colon, codec = text.partition(":")
    return {"size": int(size)} | ({"codec": codec.replace(_BESIDE, "+")} if colon else {})


# word -> how its value is read, and what it looks like
_NUMBER: tuple[Callable[[str], Any], str] = (int, "a whole number")
_WINDOW_WORDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "sinks": _NUMBER,
    "sink_positions": (str, '"absolute" or "cache"'),
    "size": _NUMBER,
    "global_layers": (_indices, "layers such as 0.5"),
    "global_heads": (_heads, "kv heads by layer such as 2=0.1,5=3"),
    "summary": (str, '"mean"'),
    "summary_pages": _NUMBER,
    "summary_page_size": _NUMBER,
}
_A_SIZE = "a size in B, kB, MB, GB, KiB, MiB or GiB such as 512MiB"
# Between two codecs within a word, where + would end it.
_BESIDE = "/"
# The word of `KVConfig.loss_change`; without a value it is that of a store.
_PROMISE = "auto"
_VALUED: dict[str, tuple[Callable[[str], Any], str]] = {
    "k": (_codec, ""),  # see _looks
    "v": (_codec, ""),
    "window": (_size, ""),
    _PROMISE: (read_percent, "a percentage such as 0.5%"),
    "key_mean": (_switch, '"on" or "off"'),
    "recent": (_recent, "a number of tokens, or this and a codec, such as 256:int8"),
    "recent_sinks": _NUMBER,
    "page_size": _NUMBER,
    "device_budget": (str, _A_SIZE),  # see _sized
    "reuse": (str, _A_SIZE),
    **_WINDOW_WORDS,
}
_WORDS = (
    "recent:SIZE",
    "recent:SIZE:CODEC",
    "recent_sinks:COUNT",
    "auto:PERCENT",
    "key_mean:off",
    "auto",
    "contiguous",
    "paged",
    "page_size:TOKENS",
    "offload",
    "device_budget:SIZE",
    "reuse",
    "reuse:SIZE",
)


def _looks(name: str) -> str:
    """What the value of a word looks like."""
    if name in ("k", "v"):
        return f"one of {', '.join(CODEC_WORDS)}"
    return ", or ".join(("a whole number", *(f'"{rule}"' for rule in RULES))) if name == "window" else _VALUED[name][1]


def _read_word(word: str, text: str) -> tuple[str, Any]:
    name, colon, value = word.partition(":")
    if name in _VALUED and word not in ("reuse", _PROMISE):
        read, looks = _VALUED[name][0], _looks(name)
        if not colon:
            raise ValueError(
                f"{text!r}: {word} takes {looks}: {word}:64, say" if read is int else f"{text!r}: {word} takes {looks}"
            )
        if name in ("device_budget", "reuse"):
            return name, _sized(name, value, text)
        try:
            return "loss_change" if name == _PROMISE else name, read(value)
        except (ValueError, KeyError):
            raise ValueError(f"{text!r}: {name} takes {looks}, got {value!r}") from None
    if not colon:
        if word in CODEC_WORDS:
            return "codec", word
        if word in STORES:
            return "store", word
        if word == "offload":
            return "offload", True
        if word == "reuse":
            return "reuse", Reuse()
    allowed = (
        *CODEC_WORDS,
        "k:CODEC",
        "v:CODEC",
        "window:SIZE",
        *(f"window:{rule}" for rule in RULES),
        *_WORDS,
        *(f"{name}:..." for name in _WINDOW_WORDS),
    )
    raise ValueError(f"{text!r}: unknown word {word!r}; allowed: {', '.join(allowed)}")


def _sized(name: str, value: str, text: str) -> int | Reuse:
    try:
        size = read_bytes(name, value)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return Reuse(size) if name == "reuse" else size


def add_codec_word(name: str) -> None:
    """Makes `name` a word for a codec.

    Raises:
        ValueError: it is no plain word, or means something else.
    """
    if name in CODEC_WORDS:
        return
    taken = {*STORES, "offload", *_VALUED}
    if not name.isidentifier() or name in taken:
        others = ", ".join(sorted(taken))
        raise ValueError(f"a codec cannot be called {name!r}: names are plain words, and not {others}")
    CODEC_WORDS.append(name)
