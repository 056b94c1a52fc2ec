"""The blocks of docs/use/clients.md run as they stand, each where its library is installed."""

import ast
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import hfkv

PAGE = (Path(__file__).parent.parent.parent / "docs" / "use" / "clients.md").read_text()
SETUP, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
BLOCKS = {section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0] for section in SECTIONS}
SERVE = BLOCKS.pop("transformers serve")
# Goes before the server's script: leaves a file behind when a cache of hfkv is used.
WITNESS = """
import hfkv
update = hfkv.KVCache.update
hfkv.KVCache.update = lambda *args, **kwargs: (open("used", "w").close(), update(*args, **kwargs))[1]
"""


def skip_without(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.mark.filterwarnings("default")  # what the libraries call of transformers is theirs to renew
@pytest.mark.parametrize("library", BLOCKS)
def test_a_block_runs_and_generates_from_hfkv(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = [node for node in ast.walk(ast.parse(BLOCKS[library])) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    skip_without(*(name.split(".")[0] for name in names if name))
    monkeypatch.chdir(tmp_path)
    updates = 0
    update = hfkv.KVCache.update

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal updates
        updates += 1
        return update(self, *args, **kwargs)

    monkeypatch.setattr(hfkv.KVCache, "update", counted)
    code = re.findall(r"```python\n(.*?)```", SETUP, re.DOTALL)[0] + BLOCKS[library]
    exec(compile(code, f"docs/use/clients.md: {library}", "exec"), {"__name__": "clients"})
    assert updates > 0


def test_the_server_answers_from_hfkv(tmp_path: Path) -> None:
    skip_without("fastapi", "uvicorn", "openai")
    (tmp_path / "serve.py").write_text(WITNESS + SERVE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["serve", hfkv.tiny_lm.PATH, "--device", "cpu", "--host", "127.0.0.1", "--port", port]
    message = {"role": "user", "content": "def parse("}
    body = {"model": hfkv.tiny_lm.PATH, "messages": [message], "max_tokens": 8, "stream": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    log = tmp_path / "log"
    with log.open("w") as stream:
        server = subprocess.Popen([sys.executable, "serve.py", *words], cwd=tmp_path, stdout=stream, stderr=stream)
    try:
        answer = _answer(request, server, log)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert answer["choices"][0]["message"]["content"]
    assert (tmp_path / "used").exists()


def _answer(request: urllib.request.Request, server: subprocess.Popen[bytes], log: Path) -> Any:
    """What the server says, once it listens."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{error}: {error.read().decode()}\n{log.read_text()}")
        except urllib.error.URLError:
            time.sleep(0.2)
    pytest.fail(log.read_text())
