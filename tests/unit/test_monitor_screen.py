"""What a `MemoryMonitor` shows: a table, a picture, and one live line on a terminal."""

import io
import re
import struct
import threading

import pytest
from rich.console import Console

import hfkv.cli.monitor_screen
import hfkv.measure.monitor
from hfkv import MemoryMonitor
from hfkv.cli.monitor_screen import StderrConsole
from tests.unit.test_cache import filled
from tests.unit.test_monitor import MIB, FakeMeter, wait_until


def test_the_summary_has_a_line_for_everything(monkeypatch):
    broken = FakeMeter([OSError("gone")])
    broken.name = "broken"
    monkeypatch.setattr(
        hfkv.measure.monitor, "meters_of", lambda devices: [FakeMeter([MIB, 3 * MIB, 2 * MIB], [1] * 99), broken]
    )
    with MemoryMonitor(interval=0.001) as monitor:
        wait_until(lambda: len(monitor.samples) > 3)
    console = Console(file=io.StringIO(), width=100)
    console.print(monitor)
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    assert lines[2] == ["fake", "1.00", "MiB", "3.00", "MiB", "2.00", "MiB", "2.00", "MiB", "of", "samples"]
    assert lines[3][:2] == ["broken", "-"]
    assert lines[4][0] == "caches"


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    monitor = MemoryMonitor(interval=0.001, cache=filled("int8"))
    with pytest.raises(RuntimeError, match="no samples yet"):
        monitor.plot(tmp_path / "memory.png")
    with monitor:
        wait_until(lambda: len(monitor.samples) > 3)
    monitor.plot(tmp_path / "memory.png")
    head = (tmp_path / "memory.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width > height > 400


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch, kind=Terminal):
    file = kind()
    monkeypatch.setattr(hfkv.cli.monitor_screen, "new_console", lambda: StderrConsole(file=file, width=120))
    monkeypatch.setenv("TERM", "xterm")
    return file


def test_a_live_line_shows_the_peak_and_only_one_at_a_time(monkeypatch, capsys):
    file = terminal(monkeypatch)
    with MemoryMonitor(interval=0.001, live=True) as outer:
        with MemoryMonitor(interval=0.001, live=True) as inner:
            assert inner._line is None
        assert outer._line is not None
        wait_until(lambda: "peak" in file.getvalue())
        print("to the program's own output")
    assert not outer.errors
    # pytest's stdout is no terminal: what goes there is left alone.
    assert capsys.readouterr().out == "to the program's own output\n"
    last = file.getvalue().rpartition("cpu")[2]
    assert re.search(r"\(peak [\d.,]+ .iB\).*caches.*\(peak ", last)
    with MemoryMonitor(live=True) as after:
        assert after._line is not None


def test_without_a_terminal_nothing_is_shown(monkeypatch, capsys):
    file = terminal(monkeypatch, io.StringIO)
    with MemoryMonitor(interval=0.001, live=True) as monitor:
        wait_until(lambda: len(monitor.samples) > 3)
    assert file.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_a_line_that_cannot_be_shown_ends_nothing(monkeypatch, caplog):
    class Closed(Terminal):
        def write(self, text):
            if threading.current_thread().name == "hfkv-memory-monitor":
                raise BrokenPipeError("closed")
            return super().write(text)

    terminal(monkeypatch, Closed)
    with MemoryMonitor(interval=0.001, live=True) as monitor:
        wait_until(lambda: monitor.errors)
    assert any("could not show its line" in error for error in monitor.errors)
    assert "could not show its line" in caplog.text
    with MemoryMonitor(live=True) as after:
        assert after._line is not None


def test_a_plot_that_cannot_be_written_is_refused(tmp_path):
    with hfkv.MemoryMonitor() as monitor:
        pass
    for name, message in (("memory.jpg", "PNG file"), ("nowhere/memory.png", "there is no folder")):
        with pytest.raises(ValueError, match=message):
            monitor.plot(tmp_path / name)


def test_a_monitor_that_was_never_started_has_no_peak():
    with pytest.raises(RuntimeError, match="start it first"):
        _ = hfkv.MemoryMonitor().peak
    with pytest.raises(ValueError, match="knows no device 'gpu'; allowed here: cpu"):
        hfkv.MemoryMonitor(devices=["gpu"])
