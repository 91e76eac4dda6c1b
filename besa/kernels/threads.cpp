// See threads.h.

#include "threads.h"

#ifdef _OPENMP

void besa::on_threads(void*, int lanes, void (*lane)(void*), void* task) {
#pragma omp parallel num_threads(lanes)
    lane(task);
}

#else

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Threads that are started when they are first needed and wait for calls until the process ends. A
// call waits for those only that have begun on it: what others are busy with does not hold it up, and
// where there are none it does its work alone.
class Pool {
   public:
    void run(int lanes, void (*lane)(void*), void* task) {
        Call call{lane, task, lanes - 1, {0}};
        std::unique_lock<std::mutex> lock(mutex_);
        start(lanes - 1);
        calls_.push_back(&call);
        ++waiting_;
        lock.unlock();
        wake_.notify_all();
        lane(task);
        lock.lock();
        if (call.wanted > 0) close(&call);
        lock.unlock();
        const auto done = [&] { return call.running == 0; };
        spin(done);
        lock.lock();
        done_.wait(lock, done);
    }

   private:
    struct Call {
        void (*lane)(void*);
        void* task;
        int wanted;                // threads that may still begin on it
        std::atomic<int> running;  // threads that have
    };

    // Looks for a while before it sleeps: waking a thread takes as long as a small product.
    template <class Condition>
    static void spin(const Condition& met) {
        const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
        while (!met() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    }

    // No more threads are to begin on a call.
    void close(Call* call) {
        calls_.erase(std::find(calls_.begin(), calls_.end(), call));
        --waiting_;
    }

    // Has so many threads in all, or as many as the system grants.
    void start(int threads) {
        try {
            for (; started_ < threads; ++started_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    void work() {
        for (;;) {
            const auto wanted = [this] { return waiting_ > 0; };
            spin(wanted);
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, wanted);
            Call& call = *calls_.front();
            ++call.running;
            if (--call.wanted == 0) close(&call);
            lock.unlock();
            call.lane(call.task);
            lock.lock();
            if (--call.running == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<Call*> calls_;     // that want more threads, the oldest first
    std::atomic<int> waiting_{0};  // how many they are
    int started_ = 0;
};

Pool* pool = nullptr;  // never deleted: its threads may outlive static objects

void make_pool() { pool = new Pool; }

}  // namespace

void besa::on_threads(void*, int lanes, void (*lane)(void*), void* task) {
    // The child of a fork has none of the threads, and a mutex that one of them may have held.
    [[maybe_unused]] static const int once =
        (make_pool(), pthread_atfork(nullptr, nullptr, make_pool));
    pool->run(lanes, lane, task);
}

#endif
