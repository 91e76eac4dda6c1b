// See threads.h.

#include "threads.h"

#ifdef _OPENMP

void besa::on_threads(void*, int lanes, void (*lane)(void*), void* task) {
#pragma omp parallel num_threads(lanes)
    lane(task);
}

#else

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Threads that are started when they are first needed and wait for calls until the process ends. A
// call waits for those only that have begun on it: what others are busy with does not hold it up, and
// where there are none (after a fork) it does its work alone.
class Pool {
   public:
    void run(int lanes, void (*lane)(void*), void* task) {
        Call call{lane, task, lanes - 1, 0};
        std::unique_lock<std::mutex> lock(mutex_);
        start(lanes - 1);
        calls_.push_back(&call);
        lock.unlock();
        wake_.notify_all();
        lane(task);
        lock.lock();
        calls_.erase(std::remove(calls_.begin(), calls_.end(), &call), calls_.end());
        done_.wait(lock, [&] { return call.running == 0; });
    }

   private:
    struct Call {
        void (*lane)(void*);
        void* task;
        int wanted;   // threads that may still begin on it
        int running;  // threads that have
    };

    // Has so many threads in all, or as many as the system grants.
    void start(int threads) {
        try {
            for (; started_ < threads; ++started_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return !calls_.empty(); });
            Call& call = *calls_.front();
            ++call.running;
            if (--call.wanted == 0) calls_.erase(calls_.begin());
            lock.unlock();
            call.lane(call.task);
            lock.lock();
            if (--call.running == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<Call*> calls_;  // that want more threads, the oldest first
    int started_ = 0;
};

}  // namespace

void besa::on_threads(void*, int lanes, void (*lane)(void*), void* task) {
    static Pool& pool = *new Pool;  // its threads may outlive static objects
    pool.run(lanes, lane, task);
}

#endif
