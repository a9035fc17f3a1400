// Vectors as long as the processor has them, by the compiler's extension, and work shared out among XLA's threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

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

// exp of numbers that are at most 0, off by 2^-22 at most, relative; below -87 it stays at the smallest number.
inline Floats exp_of(Floats x) {
  x = x < -87.0f ? splat<Floats>(-87.0f) : x;
  // Adding 1.5 * 2^23 rounds to a whole number.
  const Floats scaled = x * 1.44269504f + 12582912.0f, whole = scaled - 12582912.0f;
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats power = splat<Floats>(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
    power = power * rest + coefficient;
  power = power * rest * rest + rest + 1.0f;
  const Integers exponent = __builtin_convertvector(whole, Integers) + 127;
  return power * reinterpret_cast<Floats>(exponent << 23);
}

inline Floats silu_of(Floats x) {
  const Floats power = exp_of(x > 0.0f ? -x : x);
  return x * (x > 0.0f ? splat<Floats>(1.0f) : power) / (1.0f + power);
}

// Calls work(0) ... work(num - 1) on this thread and as many of XLA's as are free. Each takes a part of them in their
// order, and then what is left of the others' parts. This thread alone finishes them if no other comes, so that a pool
// whose threads all wait here is no deadlock.
template <typename Work>
void share_out(ffi::ThreadPool pool, int64_t num, Work work) {
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Progress {
    explicit Progress(int64_t num_parts) : parts(num_parts) {}
    std::vector<Part> parts;
    std::atomic<int64_t> came{0}, done{0};
  };
  const int64_t num_parts = std::clamp<int64_t>(num, 1, pool.num_threads());
  auto progress = std::make_shared<Progress>(num_parts);
  for (int64_t at = 0; at < num_parts; at++) {
    progress->parts[at].next = num * at / num_parts;
    progress->parts[at].end = num * (at + 1) / num_parts;
  }
  auto take_part = [progress, num_parts, work] {
    const int64_t own = progress->came.fetch_add(1);
    for (int64_t turn = 0; turn < num_parts; turn++) {
      Part& part = progress->parts[(own + turn) % num_parts];
      int64_t done = 0;
      for (int64_t mine; (mine = part.next.fetch_add(1)) < part.end; done++) work(mine);
      progress->done.fetch_add(done, std::memory_order_release);
    }
  };
  for (int64_t other = 1; other < num_parts; other++) pool.Schedule(std::function<void()>(take_part));
  take_part();
  while (progress->done.load(std::memory_order_acquire) < num) {
#if defined(__AVX512F__)
    _mm_pause();
#endif
  }
}

// Calls work(0) ... work(num_rows - 1), some at a time: fewer are not worth another thread.
template <typename Work>
void share_out_rows(ffi::ThreadPool pool, int64_t num_rows, Work work) {
  constexpr int64_t kRowsOfTask = 4;
  share_out(pool, (num_rows + kRowsOfTask - 1) / kRowsOfTask, [=](int64_t task) {
    for (int64_t row = task * kRowsOfTask; row < std::min(num_rows, (task + 1) * kRowsOfTask); row++) work(row);
  });
}

}  // namespace
