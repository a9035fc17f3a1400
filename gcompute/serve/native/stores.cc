// New keys and values put into the pages of their rows, for serving on CPU: XLA copies or rewrites far more than them.

#include "cells.h"

namespace {

// Where T new cells of each of B rows belong: in pages that tables [B, n] name, at `positions` [B, T], of which the
// first `counts` [B] are wanted. Page 0 is nobody's.
struct NewCells {
  const int32_t *tables, *positions, *counts;
  int64_t num_tables, num_new, num_pages, page;

  NewCells(const ffi::AnyBuffer& pages, const ffi::Buffer<ffi::S32>& tables, const ffi::Buffer<ffi::S32>& positions,
           const ffi::Buffer<ffi::S32>& counts)
      : tables(tables.typed_data()), positions(positions.typed_data()), counts(counts.typed_data()),
        num_tables(tables.dimensions()[1]), num_new(positions.dimensions()[1]), num_pages(pages.dimensions()[0]),
        page(pages.dimensions()[1]) {}

  // The cell of the pool where number `at` of B x T belongs, or -1.
  int64_t place(int64_t at) const {
    const int64_t row = at / num_new, position = positions[at];
    if (at % num_new >= counts[row] || position < 0 || position >= num_tables * page) return -1;
    const int64_t entry = tables[row * num_tables + position / page];
    return entry <= 0 || entry >= num_pages ? -1 : entry * page + position % page;
  }
};

// Pages as they are to be written. XLA need not have made them one array with what they were.
char* pages_of(const ffi::AnyBuffer& before, ffi::Result<ffi::AnyBuffer>& after) {
  char* pages = static_cast<char*>(after->untyped_data());
  if (pages != before.untyped_data()) std::memcpy(pages, before.untyped_data(), before.size_bytes());
  return pages;
}

// pages, stored: [P, S, ...]. new_cells: [B, T, ...].
ffi::Error store(ffi::AnyBuffer pages, ffi::AnyBuffer new_cells, ffi::Buffer<ffi::S32> tables,
                 ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> counts, ffi::Result<ffi::AnyBuffer> stored) {
  const NewCells cells(pages, tables, positions, counts);
  const int64_t num = positions.element_count(), bytes = pages.size_bytes() / (cells.num_pages * cells.page);
  if (new_cells.size_bytes() != static_cast<size_t>(num * bytes))
    return ffi::Error::InvalidArgument("new cells are not of the size of the pool's.");
  char* to = pages_of(pages, stored);
  const char* from = static_cast<const char*>(new_cells.untyped_data());
  for (int64_t at = 0; at < num; at++)
    if (const int64_t cell = cells.place(at); cell >= 0) std::memcpy(to + cell * bytes, from + at * bytes, bytes);
  return ffi::Error::Success();
}

// A head's numbers; each pair (x[i], x[i + size / 2]) turned by its angle, where there are cosines; rounded to bfloat16
// first if `rounds`.
template <typename Number>
void put_head(const float* x, const float* cos, const float* sin, int64_t size, bool rounds, Number* to) {
  const auto put = [=](Floats numbers, int64_t left, int64_t at) {
    if (rounds) numbers = rounded(numbers);
    store_some(numbers, left, to + at);
  };
  const int64_t half = cos ? size / 2 : 0;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    const Floats first = floats_of(x + i, left), second = floats_of(x + half + i, left);
    const Floats c = floats_of(cos + i, left), s = floats_of(sin + i, left);
    put(first * c - second * s, left, i);
    put(second * c + first * s, left, half + i);
  }
  for (int64_t i = 2 * half; i < size; i += kLanes) put(floats_of(x + i, size - i), size - i, i);
}

// joined: [B, T, (N + 2 K) H], heads of queries, keys and values. table: cosines and sines, [2, B, T, H / 2], or empty.
// q: [B, T, N, H] of the queries turned by it. Keys turned and values go to their pages, of float32 or bfloat16's bits,
// rounded to bfloat16 if `rounded`.
ffi::Error place(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> joined, ffi::Buffer<ffi::F32> table, ffi::AnyBuffer k,
                 ffi::AnyBuffer v, ffi::Buffer<ffi::S32> tables, ffi::Buffer<ffi::S32> positions,
                 ffi::Buffer<ffi::S32> counts, ffi::ResultBuffer<ffi::F32> q, ffi::Result<ffi::AnyBuffer> stored_k,
                 ffi::Result<ffi::AnyBuffer> stored_v, bool rounded) {
  const NewCells cells(k, tables, positions, counts);
  const int64_t num = positions.element_count(), num_heads = q->dimensions()[2], size = q->dimensions()[3];
  const int64_t kv_heads = k.dimensions()[2];
  if (joined.element_count() != static_cast<size_t>(num * (num_heads + 2 * kv_heads) * size))
    return ffi::Error::InvalidArgument("the joined heads are not as many as queries, keys and values have.");
  const auto place_each = [&](auto* keys, auto* values) {
    share_out_rows(pool, num, [=, x = joined.typed_data(), cosines = table.typed_data(),
                               turns = table.element_count() > 0, to = q->typed_data()](int64_t at) {
      const float* cos = turns ? cosines + at * (size / 2) : nullptr;
      const float* sin = turns ? cosines + (num + at) * (size / 2) : nullptr;
      const float* from = x + at * (num_heads + 2 * kv_heads) * size;
      for (int64_t head = 0; head < num_heads; head++, from += size)
        put_head(from, cos, sin, size, false, to + (at * num_heads + head) * size);
      const int64_t cell = cells.place(at);
      if (cell < 0) return;
      for (int64_t head = 0; head < kv_heads; head++) {
        const int64_t place = (cell * kv_heads + head) * size;
        put_head(from + head * size, cos, sin, size, rounded, keys + place);
        put_head(from + (kv_heads + head) * size, nullptr, nullptr, size, rounded, values + place);
      }
    });
  };
  char *keys = pages_of(k, stored_k), *values = pages_of(v, stored_v);
  if (k.element_type() == ffi::F32)
    place_each(reinterpret_cast<float*>(keys), reinterpret_cast<float*>(values));
  else
    place_each(reinterpret_cast<uint16_t*>(keys), reinterpret_cast<uint16_t*>(values));
  return ffi::Error::Success();
}

}  // namespace

#define GCOMPUTE_TO_PAGES Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cells_store, store,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().GCOMPUTE_TO_PAGES.Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cells_place, place,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .GCOMPUTE_TO_PAGES.Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("rounded"));
