"""`MemoryMonitor`: what it sees, what it survives, what it shows."""

import doctest
import gc
import itertools
import logging
import threading
import time
import weakref

import pytest
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import hfkv
import hfkv.cli.monitor_screen
import hfkv.measure.meters
import hfkv.measure.monitor
from hfkv import KVCache, MemoryMonitor
from hfkv.measure.meters import Meter
from tests.tiny import feed, greedy, llama, llama_config, prompt
from tests.unit.test_cache import filled

MIB = 2**20
PATIENCE = 30.0  # seconds for what must come


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "hfkv-memory-monitor"]


@pytest.fixture(autouse=True)
def _no_caches_of_other_tests(monkeypatch):
    monkeypatch.setattr(hfkv.measure.allocated, "_live", weakref.WeakSet())


class FakeMeter(Meter):
    """Says what it was told to."""

    def __init__(self, values, marks=None):
        super().__init__("fake")
        self.values, self.marks = list(values), None if marks is None else list(marks)

    def _now(self):
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        if isinstance(value, Exception):
            raise value
        return value

    def _mark(self):
        return None if self.marks is None else self.marks.pop(0)


def test_the_docstrings_example_runs():
    results = doctest.testmod(hfkv.measure.monitor)
    assert results.attempted >= 4
    assert results.failed == 0


def test_the_process_takes_what_is_written_to():
    with MemoryMonitor(interval=0.001, devices=["cpu"]) as monitor:
        first = monitor.samples[0].num_bytes["cpu"]
        numbers = torch.ones(64 * MIB // 4)
        wait_until(lambda: monitor.samples[-1].num_bytes["cpu"] > first + 50 * MIB)
        del numbers
        wait_until(lambda: monitor.samples[-1].num_bytes["cpu"] < first + 30 * MIB)
    assert monitor.peak["cpu"] > first + 50 * MIB
    seconds = [sample.seconds for sample in monitor.samples]
    assert seconds == sorted(seconds)
    assert not monitor.errors


def test_a_patched_models_caches_are_seen_while_it_generates():
    model = llama()
    with hfkv.patch(model, "int8") as patch:
        cache = patch.new_cache()
        with MemoryMonitor(interval=0.001) as monitor:
            assert monitor.samples[0].num_bytes["caches"] == 0

            def look(*args):
                wanted = sum(found.nbytes() for found in hfkv.measure.allocated.live_caches())
                wait_until(lambda: monitor.samples[-1].num_bytes["caches"] == wanted)
                return False

            greedy(model, prompt(), stopping_criteria=[look])
            gc.collect()
            wait_until(lambda: monitor.samples[-1].num_bytes["caches"] == 0)
            greedy(model, prompt(), past_key_values=cache, stopping_criteria=[look])
    assert monitor.peak["caches"] == cache.nbytes() > 0
    assert monitor.samples[-1].num_bytes["caches"] == cache.nbytes()


def test_forks_are_caches_too():
    cache = filled("paged+page_size:4")
    twin = cache.fork(2)
    assert {id(cache), id(twin)} <= {id(found) for found in hfkv.measure.allocated.live_caches()}
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None  # being counted keeps nothing


def test_a_cache_can_have_a_line_of_its_own():
    ours, stock = filled("none"), DynamicCache(config=llama_config())
    monitor = MemoryMonitor(interval=0.001, cache=ours)
    with monitor:
        monitor.watch(stock, name="stock")
        feed(stock, 2, 9)
        both = EncoderDecoderCache(stock, filled("none"))
        monitor.watch(both, name="both")
        # 2 layers, keys and values, 2 rows, 2 heads, 9 tokens, 16 numbers
        size = 2 * 2 * 2 * 2 * 9 * 16 * 4
        wait_until(lambda: monitor.samples[-1].num_bytes.get("both") == 2 * size)
        assert monitor.samples[-1].num_bytes["stock"] == monitor.samples[-1].num_bytes["cache"] == size
        del both, stock
        gc.collect()
        wait_until(lambda: monitor.samples[-1].num_bytes["stock"] == 0)
    assert monitor.peak["cache"] == monitor.peak["stock"] == size
    assert "both" not in monitor.samples[0].num_bytes
    assert monitor.caches == {"caches", "cache", "stock", "both"}


def test_watching_refuses_what_is_no_cache_and_names_that_are_taken():
    monitor, cache = MemoryMonitor(), filled("none")
    with pytest.raises(TypeError, match=r"KV cache.*got dict"):
        monitor.watch({})
    with pytest.raises(ValueError, match="a line 'cpu' already"):
        monitor.watch(cache, name="cpu")
    monitor.watch(cache)
    with pytest.raises(ValueError, match="a line 'cache' already"):
        monitor.watch(cache)


@pytest.mark.parametrize("kv", ["int8+paged+page_size:4", "int4+window:6+sinks:2", "none"])
def test_a_cache_that_changes_all_the_time_is_read_without_harm(kv):
    cache = KVCache(llama_config(), kv)
    with MemoryMonitor(interval=1e-6, cache=cache) as monitor:
        for turn in range(10**5):
            feed(cache, 2, 5)
            cache.batch_repeat_interleave(2)
            cache.crop(-1)
            feed(cache.fork(2), 8, 1)
            cache.batch_select_indices(torch.tensor([3, 0]))
            cache.reset()
            if turn >= 150 and len(monitor.samples) > 20:  # however rarely its thread comes to run
                break
    assert len(monitor.samples) > 20
    assert monitor.peak["cache"] > 0
    assert not monitor.errors


def test_a_cache_between_two_states_is_read_again():
    class Cache:
        readings = 0

        def nbytes(self):
            self.readings += 1
            return 1 // (self.readings % 3 // 2)

    cache = Cache()
    with MemoryMonitor(interval=100) as monitor:
        monitor._meters.append(hfkv.measure.meters.CacheMeter("cache", [cache]))
    assert cache.readings == 2
    assert monitor.samples[-1].num_bytes["cache"] == 1
    assert not monitor.errors


def test_an_exception_in_the_body_is_the_bodys_and_the_thread_ends():
    monitor = MemoryMonitor(interval=100)
    running = []

    def body():
        with monitor:
            running.extend(threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert len(running) == 1
    # An interval of 100 s did not have to pass.
    assert not threads()
    assert not monitor.is_running
    assert len(monitor.samples) == 2


def test_monitors_can_be_nested():
    with MemoryMonitor(interval=0.001) as outer:
        with MemoryMonitor(interval=0.001) as inner:
            assert len(threads()) == 2
            wait_until(lambda: min(len(outer.samples), len(inner.samples)) > 3)
        assert len(threads()) == 1
        wait_until(lambda: len(outer.samples) > len(inner.samples))
    assert not threads()


def test_starting_or_stopping_twice_raises():
    monitor = MemoryMonitor()
    with pytest.raises(RuntimeError, match="never started"):
        monitor.stop()
    monitor.start()
    with pytest.raises(RuntimeError, match="started before"):
        monitor.start()
    monitor.stop()
    with pytest.raises(RuntimeError, match="stopped already"):
        monitor.stop()
    with pytest.raises(RuntimeError, match="started before"):
        monitor.start()


def test_the_body_may_stop_it():
    with MemoryMonitor() as monitor:
        monitor.stop()
    assert len(monitor.samples) == 2


def test_what_cannot_be_read_is_said_at_the_end(monkeypatch, caplog):
    meter = FakeMeter([7, OSError("gone"), OSError("gone"), 5])
    monkeypatch.setattr(hfkv.measure.monitor, "meters_of", lambda devices: [meter])
    with caplog.at_level(logging.WARNING, "hfkv"), MemoryMonitor(interval=0.001) as monitor:
        wait_until(lambda: len(monitor.samples) > 4)
        assert not caplog.records
    assert monitor.errors == {"could not read 'fake': OSError: gone": 2}
    assert [record.getMessage() for record in caplog.records] == [
        "MemoryMonitor: could not read 'fake': OSError: gone (2 times)"
    ]
    assert ["fake" in sample.num_bytes for sample in monitor.samples[:4]] == [True, False, False, True]
    assert monitor.peak["fake"] == 7


@pytest.mark.parametrize(
    ("values", "marks", "peak", "is_exact"),
    [
        ([3, 5, 4], None, 5, False),  # nobody counts
        ([3, 5, 4], [9, 9, 9], 5, False),  # the mark is of before
        ([3, 5, 4], [9, 9, 12], 12, True),  # it has risen meanwhile
        ([3, 5, 4], [9, 2, 5], 5, False),  # somebody set it back
        ([3, 5, 4], [9, 12, 2], 12, False),
    ],
)
def test_a_peak_is_exact_where_the_systems_mark_has_risen(values, marks, peak, is_exact):
    meter = FakeMeter(values, marks)
    assert [meter.read() for _ in values] == values
    assert (meter.peak, meter.is_exact) == (peak, is_exact)


def test_a_peak_between_two_samples_is_seen_where_the_system_counts_it():
    mark = hfkv.measure.meters.ProcessMeter()._mark()
    if mark is None:
        pytest.skip("this system does not say the largest resident set")
    with MemoryMonitor(interval=100, devices=["cpu"]) as monitor:
        size = mark - monitor.samples[0].num_bytes["cpu"] + 64 * MIB
        numbers = torch.ones(size // 4)
        del numbers
    assert "cpu" in monitor.exact
    assert monitor.peak["cpu"] > mark + 50 * MIB
    assert monitor.samples[-1].num_bytes["cpu"] < monitor.peak["cpu"] - 50 * MIB


def test_a_long_run_keeps_a_bounded_number_of_samples(monkeypatch):
    monkeypatch.setattr(hfkv.measure.monitor, "MOST_SAMPLES", 10)
    monkeypatch.setattr(hfkv.measure.monitor, "meters_of", lambda devices: [FakeMeter(range(10**6))])
    with MemoryMonitor(interval=1e-6) as monitor:
        wait_until(lambda: monitor._count > 200)
    kept = [sample.num_bytes["fake"] for sample in monitor.samples]
    assert len(kept) <= 11
    assert kept[0] == 0
    assert kept[-1] == monitor.peak["fake"] == monitor._count - 1
    assert len({later - earlier for earlier, later in itertools.pairwise(kept[:-1])}) == 1


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"interval": 0}, ValueError, "above 0 seconds, got 0"),
        ({"interval": float("nan")}, ValueError, "above 0"),
        ({"interval": True}, TypeError, "seconds for interval, got True"),
        ({"interval": "1"}, TypeError, "got '1'"),
        ({"live": 1}, TypeError, "True or False for live"),
        ({"devices": "cpu"}, TypeError, r"a list of devices, such as \['cpu'\]"),
        ({"devices": ["meta"]}, ValueError, "cannot measure 'meta'; here are: cpu"),
        ({"cache": 3}, TypeError, "got int"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        MemoryMonitor(**options)


def test_devices_are_named_once():
    monitor = MemoryMonitor(devices=["cpu", torch.device("cpu")])
    with monitor:
        pass
    assert list(monitor.peak) == ["cpu", "caches"]


@pytest.mark.gpu
def test_a_gpu_is_counted_exactly_and_its_statistics_are_left_alone():
    device = torch.device("cuda:0")
    before = torch.ones(300 * MIB, dtype=torch.uint8, device=device)
    del before
    highest = torch.cuda.max_memory_allocated(device)
    with MemoryMonitor(interval=100, devices=["cuda:0"]) as monitor:
        first = monitor.samples[0].num_bytes["cuda:0"]
        numbers = torch.ones(100 * MIB, dtype=torch.uint8, device=device)
    assert torch.cuda.max_memory_allocated(device) >= highest
    assert monitor.samples[-1].num_bytes["cuda:0"] - first >= 100 * MIB
    with MemoryMonitor(interval=100) as monitor:
        more = torch.ones(highest, dtype=torch.uint8, device=device)
        del more
    assert "cuda:0" in monitor.exact
    assert monitor.peak["cuda:0"] >= highest + 100 * MIB
    assert monitor.samples[-1].num_bytes["cuda:0"] == first + numbers.numel()
