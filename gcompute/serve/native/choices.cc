// The largest logit of each row, for serving on CPU: XLA makes several passes of it, through arrays as large.

#include <limits>

#include "vectors.h"

namespace {

constexpr int64_t kLookedAt = 512;

// The first of the largest numbers; the last number if one is NaN.
int32_t first_largest(const float* x, int64_t num) {
  const int64_t whole = num / kLanes * kLanes;
  Floats most = splat<Floats>(-std::numeric_limits<float>::infinity());
  Integers is_nan = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats found = load<Floats>(x + i);
    most = found > most ? found : most;
    is_nan |= found != found;
  }
  float largest = -std::numeric_limits<float>::infinity();
  bool any_nan = false;
  for (int lane = 0; lane < kLanes; lane++) largest = std::max(largest, most[lane]), any_nan |= is_nan[lane] != 0;
  for (int64_t i = whole; i < num; i++) largest = std::max(largest, x[i]), any_nan |= x[i] != x[i];
  if (any_nan) return num - 1;
  // Lanes are looked at seldom: each has to be taken out.
  int64_t at = 0;
  for (bool found = false; !found && at + kLookedAt <= num; at += found ? 0 : kLookedAt) {
    Integers equal = {};
    for (int64_t i = 0; i < kLookedAt; i += kLanes) equal |= load<Floats>(x + at + i) == largest;
    for (int lane = 0; lane < kLanes; lane++) found |= equal[lane] != 0;
  }
  return std::find(x + at, x + num, largest) - x;
}

// x: [M, N]. ids: [M].
ffi::Error largest(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::S32> ids) {
  const int64_t num = x.dimensions()[1];
  share_out(pool, x.dimensions()[0], [=, x = x.typed_data(), ids = ids->typed_data()](int64_t row) {
    ids[row] = first_largest(x + row * num, num);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(choice_largest, largest,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
