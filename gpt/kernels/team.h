// Threads that share work: the caller's and helpers, which sleep until there is some.
//
// Work is handed out in pieces that become smaller, so a thread that runs slowly gets less of it, and a helper that
// does not run at all, because another program has its core, gets none. A thread that has to wait spins for a moment,
// as the others are usually almost as far, and then sleeps, so that they, or another program, get its core.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace threads __attribute__((visibility("hidden"))) {  // hidden: each library has a team of its own

constexpr int SPINS = 2000;  // pauses before a thread sleeps: 20 to 100 microseconds

template <class Condition> inline void spin_until(Condition holds) {
    for (int i = 0; i < SPINS && !holds(); i++) {
#if defined(__SSE2__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("isb");  // `yield` does nothing on most CPUs
#endif
    }
}

inline int current_cpu() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}
// Moves this thread to another CPU if it runs on `cpu`: some schedulers leave two busy threads on one CPU
// although another one is idle.
inline void leave(int cpu) {
#ifdef __linux__
    cpu_set_t allowed, others;
    if (cpu < 0 || current_cpu() != cpu || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    others = allowed;
    CPU_CLR(cpu, &others);
    if (!sched_setaffinity(0, sizeof others, &others)) sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

using Work = std::function<void(int thread, int begin, int end)>;

struct Job {  // the work on [0, count)
    const Work &work;
    int members, count, unit, cpu = current_cpu();
    std::atomic<int> next{0};

    void do_pieces(int thread) {
        for (int begin = next, end;; work(thread, begin, end)) {
            do {
                int share = (count - begin) / (2 * members);
                end = std::min(count, begin + std::max((share + unit - 1) / unit, 1) * unit);
                if (begin >= count) return;
            } while (!next.compare_exchange_weak(begin, end));
        }
    }
};

class Team {
    std::mutex in_use;  // by one caller at a time
    int helpers = 0;
    std::mutex mutex;  // is held to change what follows; the two numbers are read without it by those that spin
    std::condition_variable posted, done;
    std::atomic<unsigned> posts{0};  // jobs so far
    std::atomic<int> at_work{0};     // helpers
    Job *job = nullptr;              // that a helper may join

    void help(int thread) {
        for (unsigned seen = 0;;) {
            auto is_new = [&] { return posts != seen; };
            spin_until(is_new);
            std::unique_lock<std::mutex> lock(mutex);
            posted.wait(lock, is_new);
            seen = posts;
            if (!job || thread >= job->members) continue;  // the job is over already, or is for fewer threads
            Job &joined = *job;
            at_work++;
            lock.unlock();
            leave(joined.cpu);
            joined.do_pieces(thread);
            lock.lock();
            if (--at_work == 0) done.notify_one();
        }
    }
    void hire(int count) {
        try {
            for (; helpers < count; helpers++) std::thread(&Team::help, this, helpers + 1).detach();
        } catch (const std::system_error &) {  // the system allows no more threads; fewer do the same work
        }
    }
    void post(Job *next) {
        std::lock_guard<std::mutex> lock(mutex);
        job = next;
        if (job) posts++;
    }

  public:
    // Calls work(thread, begin, end) for pieces of [0, count) on up to `members` threads, with numbers from 0 on, and
    // returns when all are done. The sizes of the pieces are multiples of `unit`, but for the last one. `work` must not
    // throw. A second caller at the same time works alone.
    void share(int members, int count, int unit, const Work &work) {
        std::unique_lock<std::mutex> use(in_use, std::defer_lock);
        if (members == 1 || count <= unit || !use.try_lock()) return work(0, 0, count);
        hire(members - 1);
        Job mine{work, members, count, unit};
        post(&mine);
        posted.notify_all();
        mine.do_pieces(0);
        post(nullptr);
        auto all_done = [&] { return at_work == 0; };
        spin_until(all_done);
        std::unique_lock<std::mutex> lock(mutex);
        done.wait(lock, all_done);
    }
};

// Returns this process's team. A forked process starts with none of the threads, so it gets a new team.
inline Team &team() {
    static Team *current = nullptr;
    static const int registered = (current = new Team, pthread_atfork(nullptr, nullptr, [] { current = new Team; }));
    return (void)registered, *current;  // a team is never deleted: its helpers end with the process
}

template <class Piece> inline void share(int members, int count, int unit, Piece piece) {
    if (count > 0) team().share(members, count, unit, std::ref(piece));
}

}  // namespace threads
