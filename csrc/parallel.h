// Tasks on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace idrm {

// Calls work(task, thread) for every task, the next one as soon as a thread is free.
template <class Work>
void in_parallel(int64_t tasks, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto take = [&](int64_t thread) {
    for (int64_t task = next++; task < tasks; task = next++) work(task, thread);
  };
#ifdef __SANITIZE_THREAD__
  // ThreadSanitizer does not see the barriers of torch's thread pool.
  std::vector<std::thread> pool;
  for (int64_t thread = 0; thread < std::min(tasks, threads); ++thread) pool.emplace_back(take, thread);
  for (std::thread& thread : pool) thread.join();
#else
  torch::stable::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) take(thread);
  });
#endif
}

}  // namespace idrm
