"""How hfkv and its command start: quickly, and an interrupt ends them quietly."""

import subprocess
import sys

import pytest

import hfkv

MODULES_AFTER = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
# Sends itself Ctrl-C when a module is looked for, as the first word says.
INTERRUPTED = """
import os, signal, sys
wanted = sys.argv.pop(1)
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
from hfkv.cli import main
sys.meta_path.insert(0, Interrupting())
main()
"""


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)


def test_importing_hfkv_loads_nothing_heavy() -> None:
    loaded = run(f"import hfkv; hfkv.tiny_lm.PATH; {MODULES_AFTER}").stdout.split()
    assert "hfkv" in loaded
    light = run(
        f"from hfkv.policy import words, window; import hfkv; hfkv.policy.units; {MODULES_AFTER}"
    ).stdout.split()
    assert "hfkv" in light
    assert "torch" not in light
    assert not {"torch", "transformers", "numpy", "rich"} & set(loaded)


@pytest.mark.parametrize("words", [("--help",), ("bench", "--help"), ("--version",)])
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    ended = run(f"from hfkv.cli import main\ntry: main()\nfinally: {MODULES_AFTER}", *words)
    assert ended.returncode == 0, ended.stderr
    loaded = ended.stdout.splitlines()[-1].split()
    assert "typer" in loaded
    assert not {"torch", "transformers", "numpy"} & set(loaded)


@pytest.mark.parametrize("first", ["hfkv", "hfkv.patches"])
def test_the_names_are_registered_before_a_model_can_be_made(first: str) -> None:
    code = (
        f"import {first}\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)\n"
        "model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation='hfkv')\n"
        "assert model.config._attn_implementation == 'hfkv'\n"
        "assert 'hfkv' in ALL_EXPERTS_FUNCTIONS.valid_keys() and 'hfkv' in AUTO_QUANTIZER_MAPPING\n"
        "import sys, hfkv.models.registration as r\n"
        "assert not any(isinstance(finder, r._AfterModels) for finder in sys.meta_path)\n"
    )
    ended = run(code)
    assert ended.returncode == 0, ended.stderr


def test_the_public_names_are_there_and_no_others() -> None:
    assert {"KVConfig", "patch", "tiny_lm", "upcycle"} <= set(hfkv.__all__) <= set(dir(hfkv))
    for name in hfkv.__all__:
        assert getattr(hfkv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'KVConfigs'"):
        _ = hfkv.KVConfigs


@pytest.mark.parametrize(
    "moment",
    ["typer", "rich.progress", "numpy._core._multiarray_umath", "transformers.modeling_utils", "hfkv.cache.view"],
)
def test_ctrl_c_during_start_up_ends_quietly(moment: str) -> None:
    ended = run(INTERRUPTED, moment, "generate", "--max-new-tokens", "1", "def parse(")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_ctrl_c_while_it_works_ends_quietly() -> None:
    code = (
        "import os, signal\n"
        "import transformers.generation.utils as utils\n"
        "utils.GenerationMixin.generate = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT)\n"
        "from hfkv.cli import main; main()"
    )
    ended = run(code, "generate", "--max-new-tokens", "1", "def parse(")
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
