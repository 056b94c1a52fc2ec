// The threads of a call: torch's own, which look out for work for a while between torch's operations, and would have to
// be pushed from their cores by any others; or the pool's, where torch's come late because other programs have the cores.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>

#include "pool.h"

namespace hfkv {

// GOMP_parallel of the OpenMP that torch has loaded, or none. A region ends when each of its threads has come.
using Region = void (*)(void (*)(void *), void *, unsigned, unsigned);
inline Region region = nullptr;

// Calls to come that the pool serves, and how many it is to serve when torch's threads come late again.
inline std::atomic<int> apart{0}, patience{16};
constexpr int MOST_PATIENCE = 1024;
// How much longer than the calling thread others may take: as long as so many tasks take, and a while to wake up in.
constexpr double LATE = 2, WAKING = 100e-6;

// Calls `work(i)`, which may not throw, for i = 0 .. tasks - 1 on so many threads, this one among them.
template <typename Work> void share(int64_t threads, int64_t tasks, const Work &work) {
    using Clock = std::chrono::steady_clock;
    if (threads < 2 || tasks < 2 || !region || apart.load(std::memory_order_relaxed) > 0) {
        if (threads > 1) apart.fetch_sub(1, std::memory_order_relaxed);
        return Pool::shared().run(threads, tasks, work);
    }
    std::atomic<int64_t> next{0};
    auto caller = std::this_thread::get_id();
    auto began = Clock::now(), done = began;
    int64_t own = 0;  // tasks of this thread
    auto take_part = [&] {
        int64_t taken = 0;
        for (int64_t i = next++; i < tasks; i = next++, taken++) work(i);
        if (std::this_thread::get_id() == caller) done = Clock::now(), own = taken;
    };
    region([](void *given) { (*static_cast<decltype(take_part) *>(given))(); }, &take_part,
           unsigned(std::min(threads, tasks)), 0);
    std::chrono::duration<double> worked = done - began, waited = Clock::now() - done;
    bool is_late = waited.count() > worked.count() / std::max<int64_t>(own, 1) * LATE + WAKING;
    int calls = is_late ? patience.load(std::memory_order_relaxed) : 0;
    apart.store(calls, std::memory_order_relaxed);
    patience.store(is_late ? std::min(2 * calls, MOST_PATIENCE) : 16, std::memory_order_relaxed);
}

}  // namespace hfkv
