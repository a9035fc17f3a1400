// Keys and values of a step put among a dispatch's new cells, for serving on CPU: XLA rewrites all of them.

#include "cells.h"

namespace {

// Rows of a task: fewer are not worth another thread.
constexpr int64_t kRowsOfPlacing = 4;

// Numbers of one array [B, K, C, H], `num` of each row from cell `first` on. Others are dropped.
struct NewCells {
  float* cells;
  const int32_t* first;
  int64_t heads, room, size;

  NewCells(const ffi::Buffer<ffi::F32>& before, const ffi::Buffer<ffi::S32>& first, ffi::ResultBuffer<ffi::F32>& after)
      : cells(after->typed_data()), first(first.typed_data()) {
    const auto dims = before.dimensions();
    heads = dims[1], room = dims[2], size = dims[3];
    // XLA need not have made them one array.
    if (cells != before.typed_data()) std::copy_n(before.typed_data(), before.element_count(), cells);
  }

  // Where a head of the row's cell `first + one` lies, or null.
  float* at(int64_t row, int64_t one, int64_t head) const {
    const int64_t cell = first[row] + one;
    return cell < 0 || cell >= room ? nullptr : cells + ((row * heads + head) * room + cell) * size;
  }
};

// cells, stored: [B, K, C, H], one array. new_cells: [B, T, K, H], for cells from `first` [B] on; others are dropped.
ffi::Error store(ffi::Buffer<ffi::F32> cells, ffi::Buffer<ffi::F32> new_cells, ffi::Buffer<ffi::S32> first,
                 ffi::ResultBuffer<ffi::F32> stored) {
  const NewCells to(cells, first, stored);
  const float* from = new_cells.typed_data();
  for (int64_t row = 0; row < cells.dimensions()[0]; row++)
    for (int64_t one = 0; one < new_cells.dimensions()[1]; one++)
      for (int64_t head = 0; head < to.heads; head++, from += to.size)
        if (float* place = to.at(row, one, head)) std::copy_n(from, to.size, place);
  return ffi::Error::Success();
}

// The nearest bfloat16, if that is asked for.
inline Floats rounded_if(bool rounds, Floats numbers) {
  return rounds ? reinterpret_cast<Floats>(__builtin_convertvector(bfloat16_bits(numbers), Words) << 16) : numbers;
}

// A head's numbers; each pair (x[i], x[i + size / 2]) turned by its angle, where there are cosines.
void put_head(const float* x, const float* cos, const float* sin, int64_t size, bool rounds, float* to) {
  const int64_t half = cos ? size / 2 : 0;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    const Floats first = floats_of(x + i, left), second = floats_of(x + half + i, left);
    const Floats c = floats_of(cos + i, left), s = floats_of(sin + i, left);
    store_some(rounded_if(rounds, first * c - second * s), left, to + i);
    store_some(rounded_if(rounds, second * c + first * s), left, to + half + i);
  }
  for (int64_t i = 2 * half; i < size; i += kLanes)
    store_some(rounded_if(rounds, floats_of(x + i, size - i)), size - i, to + i);
}

// joined: [B, T, (N + 2 K) H], heads of queries, keys and values. table: cosines and sines, [2, B, T, H / 2], or empty.
// q: [B, T, N, H] of the queries turned by it. Keys turned and values go among the new cells, as by `store`, rounded to
// bfloat16 if `rounded`.
ffi::Error place(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> joined, ffi::Buffer<ffi::F32> table,
                 ffi::Buffer<ffi::F32> new_k, ffi::Buffer<ffi::F32> new_v, ffi::Buffer<ffi::S32> first,
                 ffi::ResultBuffer<ffi::F32> q, ffi::ResultBuffer<ffi::F32> stored_k,
                 ffi::ResultBuffer<ffi::F32> stored_v, bool rounded) {
  const auto dims = q->dimensions();
  const int64_t num = dims[0] * dims[1], a_row = dims[1], num_heads = dims[2], size = dims[3];
  const NewCells keys(new_k, first, stored_k), values(new_v, first, stored_v);
  const auto place_one = [=, x = joined.typed_data(), cosines = table.typed_data(), turns = table.element_count() > 0,
                          to = q->typed_data()](int64_t at) {
    const float* cos = turns ? cosines + at * (size / 2) : nullptr;
    const float* sin = turns ? cosines + (num + at) * (size / 2) : nullptr;
    const float* from = x + at * (num_heads + 2 * keys.heads) * size;
    for (int64_t head = 0; head < num_heads; head++, from += size)
      put_head(from, cos, sin, size, false, to + (at * num_heads + head) * size);
    for (int64_t head = 0; head < keys.heads; head++, from += size)
      if (float* cell = keys.at(at / a_row, at % a_row, head)) put_head(from, cos, sin, size, rounded, cell);
    for (int64_t head = 0; head < values.heads; head++, from += size)
      if (float* cell = values.at(at / a_row, at % a_row, head))
        put_head(from, nullptr, nullptr, size, rounded, cell);
  };
  share_out(pool, (num + kRowsOfPlacing - 1) / kRowsOfPlacing, [=](int64_t task) {
    for (int64_t at = task * kRowsOfPlacing; at < std::min(num, (task + 1) * kRowsOfPlacing); at++) place_one(at);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cells_store, store,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cells_place, place,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("rounded"));
