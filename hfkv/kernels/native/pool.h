// Threads that share the tasks of a call: they sleep in between, and a call waits for tasks, never for threads.
//
// An OpenMP region ends when each of its threads has come, and beside other work that is when the system lets it come:
// milliseconds later. Here a thread that is late finds nothing left to do, and nobody has missed it.

#pragma once

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include <signal.h>

namespace hfkv {

class Pool {
  public:
    // The process's own. It is never destroyed: its threads sleep when the process ends. A forked process has none of
    // them, and must ask for one thread only.
    static Pool &shared() {
        static Pool *pool = new Pool;
        return *pool;
    }

    // Calls `work(i)`, which may not throw, for i = 0 .. tasks - 1 on this thread and up to `threads` - 1 others.
    template <typename Work> void run(int64_t threads, int64_t tasks, const Work &work) {
        std::unique_lock<std::mutex> call(calls, std::defer_lock);
        if (threads < 2 || tasks < 2 || !call.try_lock()) {  // another thread of the program has them
            for (int64_t i = 0; i < tasks; i++) work(i);
            return;
        }
        auto job = std::make_shared<Job>();
        job->tasks = tasks, job->context = &work;
        job->call = [](const void *context, int64_t index) { (*static_cast<const Work *>(context))(index); };
        std::fegetenv(&job->environment);  // how this thread rounds
        offer(job, threads - 1);
        take_part(*job);
        finish(*job);
    }

  private:
    struct Job {
        std::atomic<int64_t> next{0}, done{0};
        int64_t tasks = 0;
        const void *context = nullptr;  // read for a task that is taken, before it is counted as done
        void (*call)(const void *, int64_t) = nullptr;
        std::fenv_t environment;
    };

    // A few microseconds: what a task of another thread takes that is nearly done.
    static constexpr int LOOKS = 200;

    void offer(const std::shared_ptr<Job> &job, int64_t helpers) {
        {
            std::lock_guard<std::mutex> guard(lock);
            while (sleepers < helpers && start_one()) {}
            offered = job, wanted = helpers;
        }
        for (int64_t i = 0; i < helpers; i++) wake.notify_one();
    }

    void finish(Job &job) {
        for (int i = 0; i < LOOKS && job.done.load(std::memory_order_acquire) < job.tasks; i++) std::this_thread::yield();
        std::unique_lock<std::mutex> guard(lock);
        offered = nullptr, wanted = 0;
        all_done.wait(guard, [&] { return job.done.load(std::memory_order_acquire) == job.tasks; });
    }

    void take_part(Job &job) {
        for (;;) {
            int64_t index = job.next.fetch_add(1, std::memory_order_relaxed);
            if (index >= job.tasks) return;
            job.call(job.context, index);
            if (job.done.fetch_add(1, std::memory_order_acq_rel) + 1 == job.tasks) {
                std::lock_guard<std::mutex> guard(lock);
                all_done.notify_all();
            }
        }
    }

    // Another thread, with every signal left to the program's own; whether there is one.
    bool start_one() {
        sigset_t every, before;
        sigfillset(&every);
        pthread_sigmask(SIG_SETMASK, &every, &before);
        bool is_started = true;
        try {
            std::thread([this] { serve(); }).detach();
            sleepers++;
        } catch (const std::system_error &) {
            is_started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return is_started;
    }

    void serve() {
        for (;;) {
            std::shared_ptr<Job> job;
            {
                std::unique_lock<std::mutex> guard(lock);
                wake.wait(guard, [&] { return wanted > 0; });
                wanted--, job = offered;
            }
            std::fesetenv(&job->environment);
            take_part(*job);
        }
    }

    std::mutex calls, lock;
    std::condition_variable wake, all_done;
    std::shared_ptr<Job> offered;
    int64_t wanted = 0, sleepers = 0;
};

}  // namespace hfkv
