// RMSNorm of the stream after something is added to it, row by row, for serving on CPU.
//
// XLA makes several loops of this, each over all rows and on one core.

#include <cmath>

#include "cells.h"

namespace {

// sum = x + added; normed = sum / sqrt(mean(sum^2) + eps) * scale.
template <typename Number>
void norm_row(const float* x, const float* added, const float* scale, float eps, int64_t size, float* sum,
              Number* normed) {
  // Stores wait for their lines one after another, where those are far away.
  for (int64_t i = 0; i < size; i += 64 / sizeof(float)) __builtin_prefetch(sum + i, 1);
  for (int64_t i = 0; i < size; i += 64 / sizeof(Number)) __builtin_prefetch(normed + i, 1);
  Floats squares = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats numbers = floats_of(x + i, size - i) + floats_of(added + i, size - i);
    store_some(numbers, size - i, sum + i);
    squares = squares + numbers * numbers;
  }
  float total = 0;
  for (int lane = 0; lane < kLanes; lane++) total += squares[lane];
  const float factor = 1.0f / std::sqrt(total / size + eps);
  for (int64_t i = 0; i < size; i += kLanes)
    store_some(floats_of(sum + i, size - i) * factor * floats_of(scale + i, size - i), size - i, normed + i);
}

// x, added, sum: [M, D]. scale: [D]. normed: [M, D] of float32 or bfloat16.
ffi::Error add_rms_norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> added,
                        ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> sum,
                        ffi::Result<ffi::AnyBuffer> normed, float eps) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1];
  const auto each_row = [&](auto* to) {
    share_out_rows(pool, rows,
                   [=, x = x.typed_data(), added = added.typed_data(), scale = scale.typed_data(),
                    sum = sum->typed_data()](int64_t row) {
                     const int64_t at = row * size;
                     norm_row(x + at, added + at, scale, eps, size, sum + at, to + at);
                   });
  };
  if (normed->element_type() == ffi::F32)
    each_row(static_cast<float*>(normed->untyped_data()));
  else
    each_row(static_cast<uint16_t*>(normed->untyped_data()));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(norm_add_rms, add_rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));
