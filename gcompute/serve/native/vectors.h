// Vectors as long as the processor has them, by the compiler's extension, and work shared out among XLA's threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));

template <typename Vector, typename Number>
inline Vector splat(Number number) {
  return Vector{} + number;
}

template <typename Vector, typename From>
inline Vector load(const From* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline float as_float(uint32_t bits) {
  float number;
  __builtin_memcpy(&number, &bits, sizeof(number));
  return number;
}

// Calls work(0) ... work(num - 1) on this thread and as many of XLA's as are free. This thread alone finishes them if
// no other comes, so that a pool whose threads all wait here is no deadlock.
template <typename Work>
void share_out(ffi::ThreadPool pool, int64_t num, Work work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto take_part = [progress, num, work] {
    for (int64_t mine; (mine = progress->next.fetch_add(1)) < num;) {
      work(mine);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t others = std::min<int64_t>(pool.num_threads() - 1, num - 1);
  for (int64_t other = 0; other < others; other++) pool.Schedule(std::function<void()>(take_part));
  take_part();
  while (progress->done.load(std::memory_order_acquire) < num) {
#if defined(__AVX512F__)
    _mm_pause();
#endif
  }
}

}  // namespace
