"""Tiny models with random weights, built in code: every architecture of transformers, and a named few for every day."""

from .asked import inputs_of
from .models import Architecture, CannotBuild, architectures, build, generate, prompt
from .named import NAMED, Sample

__all__ = [
    "NAMED",
    "Architecture",
    "CannotBuild",
    "Sample",
    "architectures",
    "build",
    "generate",
    "inputs_of",
    "prompt",
]
