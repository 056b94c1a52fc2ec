"""Public names stay, with their signatures: what `public_api.txt` lists is what there is."""

import importlib
import inspect
import typing
from pathlib import Path

import pytest

import hfkv
from tests.public_api import PACKAGES, listing


def test_public_names_and_signatures_are_as_listed() -> None:
    expected = Path(__file__).with_name("public_api.txt").read_text(encoding="utf-8").splitlines()
    found = listing().splitlines()
    gone = [line for line in expected if line not in found]
    new = [line for line in found if line not in expected]
    assert not gone, f"gone or changed: {gone}; a name that users import stays"
    assert not new, f"new: {new}; run `python -m tests.public_api > tests/public_api.txt` where that is meant"


@pytest.mark.parametrize("package", [*PACKAGES, "hfkv.tiny_lm"])
def test_types_can_be_looked_up(package: str) -> None:
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", None) or vars(module):
        value = getattr(module, name)
        methods = vars(value).values() if inspect.isclass(value) else ()
        for found in (value, *(getattr(method, "fget", None) or method for method in methods)):
            if inspect.isfunction(found) or (inspect.isclass(found) and found.__module__.startswith("hfkv")):
                assert typing.get_type_hints(found) is not None


def test_only_names_are_attributes() -> None:
    for name in ("a.b", "models.shapes", "nope", "", "a b"):
        assert not hasattr(hfkv, name)
    assert hfkv.models.__name__ == "hfkv.models"
