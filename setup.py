"""The folders of the wheel: all of ``hfkv/``, and ``patches/`` as ``hfkv.patches``. The rest is in pyproject.toml."""

from setuptools import find_packages, setup

PATCHES = "hfkv.patches"

setup(
    packages=[
        *find_packages(include=["hfkv", "hfkv.*"]),
        PATCHES,
        *(f"{PATCHES}.{name}" for name in find_packages("patches")),
    ]
)
