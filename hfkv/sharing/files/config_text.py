"""A `KVConfig` as the text of a JSON object, with what has no word: `KVConfig.to_json` and `from_json`."""

from __future__ import annotations

import json
from dataclasses import replace

from hfkv.policy.config import KVConfig
from hfkv.policy.reuse import Reuse
from hfkv.sharing.files.header import kv_from_json, kv_to_json


def config_to_text(kv: KVConfig) -> str:
    """Writes a config, in the form that files of caches have, with what no cache has besides.

    Raises:
        ValueError: a window has a schedule of one's own.
    """
    given = kv_to_json(replace(kv, reuse=None, loss_change=None))
    if kv.reuse is not None:
        given["reuse"] = {"budget": kv.reuse.budget, "salt": kv.reuse.salt}
    if kv.loss_change is not None:
        given["loss_change"] = kv.loss_change
    return json.dumps(given)


def config_from_text(text: str) -> KVConfig:
    """Reads what `config_to_text` wrote.

    Raises:
        TypeError, ValueError: it is no config.
    """
    if not isinstance(text, str):
        raise TypeError(f"KVConfig.from_json takes a str, got {type(text).__name__}")
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("it is no object")
        reuse, loss_change = given.pop("reuse", None), given.pop("loss_change", None)
        kv = kv_from_json(given)
        return replace(kv, reuse=None if reuse is None else Reuse(**reuse), loss_change=loss_change)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"KVConfig.from_json takes what to_json wrote: {error}") from error
