// Attention over pages where they lie: softmax(q k^T / sqrt(H)) v, for serving on CPU.
//
// A task takes the query heads of one key/value head for some queries of one row. It copies the cells that they see,
// a block at a time, into scratch memory as float32, those of before from the row's pages and the new ones from beside
// them, and keeps for each query the largest score, the sum of weights and the weighted sum of values so far.
// Blocks begin at fixed positions, and sums run over cells in their order: a query's result depends on its cells alone,
// not on which of them are new, on what other queries there are or on the length of the table.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

// Cells of a block, queries of a task and heads that are worked on together.
constexpr int64_t kBlock = 256, kQueries = 32;
constexpr int kHeads = 4;
constexpr float kNever = -std::numeric_limits<float>::infinity();

template <int kWidth>
constexpr int from_first(int lane) {
  const int inside = lane % (2 * kWidth);
  return lane - inside + (inside < kWidth ? inside : kLanes + inside - kWidth);
}

#if defined(__clang__)
#define GCOMPUTE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GCOMPUTE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

// Of every 2 kWidth lanes: the first half has sums of a's, kWidth apart, the second half of b's.
template <int kWidth, size_t... kLane>
inline Floats folded(Floats a, Floats b, std::index_sequence<kLane...>) {
  return GCOMPUTE_SHUFFLE(a, b, from_first<kWidth>(kLane)...) +
         GCOMPUTE_SHUFFLE(a, b, from_first<kWidth>(kLane) + kWidth...);
}

// Lane i of the result is the sum of all lanes of vectors[i].
template <int kWidth = kLanes / 2>
inline Floats sums_of_lanes(Floats* vectors) {
  for (int i = 0; i < kWidth; i++)
    vectors[i] = folded<kWidth>(vectors[i], vectors[i + kWidth], std::make_index_sequence<kLanes>());
  if constexpr (kWidth > 1) return sums_of_lanes<kWidth / 2>(vectors);
  return vectors[0];
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

inline float exp_of(float x) { return exp_of(splat<Floats>(x))[0]; }

using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

inline float nearest_bfloat16(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

struct Pages {
  const void* cells;
  const float* scales;  // of int8
  ffi::DataType dtype;
  bool rounded;  // int8 times its scale is rounded to bfloat16
  int64_t num_pages, page, heads, size;

  // `num` cells of one page and head as float32, `stride` numbers apart.
  void read(int64_t at, int64_t head, int64_t num, float* to, int64_t stride) const {
    int64_t first = (at * heads + head) * size;
    for (int64_t cell = 0; cell < num; cell++, to += stride, first += heads * size) {
      if (dtype == ffi::F32) {
        std::memcpy(to, static_cast<const float*>(cells) + first, size * sizeof(float));
      } else if (dtype == ffi::S8) {
        const auto* from = static_cast<const int8_t*>(cells) + first;
        const float scale = scales[(at + cell) * heads + head];
        for (int64_t i = 0; i < size; i++) to[i] = rounded ? nearest_bfloat16(from[i] * scale) : from[i] * scale;
      } else {
        const auto* from = static_cast<const uint16_t*>(cells) + first;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
          const Words bits = __builtin_convertvector(load<Halves>(from + i), Words) << 16;
          __builtin_memcpy(to + i, &bits, sizeof(bits));
        }
        for (; i < size; i++) to[i] = as_float(static_cast<uint32_t>(from[i]) << 16);
      }
    }
  }

  // Tells the processor to fetch one head's cells of a page.
  void fetch(int64_t at, int64_t head) const {
    const int64_t width = size * (dtype == ffi::F32 ? 4 : dtype == ffi::S8 ? 1 : 2);
    const char* from = static_cast<const char*>(cells) + (at * heads + head) * width;
    for (int64_t cell = 0; cell < page; cell++, from += heads * width)
      for (int64_t line = 0; line < width; line += 64) __builtin_prefetch(from + line);
  }
};

// Everything that a task reads and writes; sizes are B rows, T queries, N query heads, C new cells, n pages a row.
struct Call {
  const float* q;
  Pages k, v;
  const int32_t *tables, *starts, *positions;
  const float *new_k, *new_v;
  float* out;
  int64_t num_queries, num_heads, num_new, num_tables;
};

// The cells of a block as float32, [kBlock, stride]; scores or weights of kHeads heads; what queries have so far.
// Lanes between a head's size and the stride are zero. A thread keeps its memory from task to task.
struct Scratch {
  int64_t size = 0, stride = 0;
  std::vector<float> k, v, scores, q, largest, total, sums;

  void prepare(int64_t new_size, int64_t rows) {
    if (new_size != size) {
      size = new_size;
      stride = (size + kLanes - 1) / kLanes * kLanes;
      k.assign(kBlock * stride, 0);
      v.assign(kBlock * stride, 0);
      scores.assign(kHeads * kBlock, 0);
      q.clear();
    }
    if (q.size() < static_cast<size_t>(rows * stride)) q.assign(rows * stride, 0);
    largest.assign(rows, kNever);
    total.assign(rows, 0);
    sums.assign(rows * stride, 0);
  }
};

void read_cells(const Call& call, int64_t row, int64_t head, int64_t first, int64_t end, Scratch& scratch) {
  const int64_t page = call.k.page, size = call.k.size, stride = scratch.stride;
  const int64_t start = std::clamp<int64_t>(call.starts[row], first, end);
  const int32_t* table = call.tables + row * call.num_tables;
  const auto first_cell = [&](int64_t entry) { return std::clamp<int64_t>(table[entry], 0, call.k.num_pages - 1) * page; };
  for (int64_t cell = first; cell < start;) {
    const int64_t entry = cell / page, inside = cell - entry * page, num = std::min(page - inside, start - cell);
    if (cell + num < start) {
      call.k.fetch(first_cell(entry + 1), head);
      call.v.fetch(first_cell(entry + 1), head);
    }
    call.k.read(first_cell(entry) + inside, head, num, scratch.k.data() + (cell - first) * stride, stride);
    call.v.read(first_cell(entry) + inside, head, num, scratch.v.data() + (cell - first) * stride, stride);
    cell += num;
  }
  for (int64_t cell = start; cell < end; cell++) {
    const int64_t at = ((row * call.k.heads + head) * call.num_new + cell - call.starts[row]) * size;
    std::memcpy(scratch.k.data() + (cell - first) * stride, call.new_k + at, size * sizeof(float));
    std::memcpy(scratch.v.data() + (cell - first) * stride, call.new_v + at, size * sizeof(float));
  }
}

// sums += weights . v, for kRows heads and kWide vectors of each, from `offset` of a cell on.
template <int kRows, int kWide>
void add_values(const Scratch& scratch, int64_t num_cells, int64_t offset, float* sums) {
  Floats held[kRows][kWide];
  for (int row = 0; row < kRows; row++)
    for (int w = 0; w < kWide; w++) held[row][w] = load<Floats>(sums + row * scratch.stride + offset + w * kLanes);
  const float* v = scratch.v.data() + offset;
  for (int64_t cell = 0; cell < num_cells; cell++, v += scratch.stride)
    for (int w = 0; w < kWide; w++) {
      const Floats values = load<Floats>(v + w * kLanes);
      for (int row = 0; row < kRows; row++) held[row][w] = held[row][w] + values * scratch.scores[row * kBlock + cell];
    }
  for (int row = 0; row < kRows; row++)
    for (int w = 0; w < kWide; w++)
      __builtin_memcpy(sums + row * scratch.stride + offset + w * kLanes, &held[row][w], sizeof(Floats));
}

// Takes a block's first `num_cells` cells into account for kRows heads of one query, the first of which is `first`.
template <int kRows>
void attend_to_block(Scratch& scratch, int64_t num_cells, int64_t first) {
  for (int row = 0; row < kRows; row++) {
    const float* q = scratch.q.data() + (first + row) * scratch.stride;
    float* scores = scratch.scores.data() + row * kBlock;
    Floats most = splat<Floats>(kNever);
    for (int64_t cell = 0; cell < num_cells; cell += kLanes) {
      Floats products[kLanes] = {};
      for (int64_t h = 0; h < scratch.stride; h += kLanes) {
        const Floats query = load<Floats>(q + h);
        const float* k = scratch.k.data() + cell * scratch.stride + h;
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; lane++)
          products[lane] = products[lane] + query * load<Floats>(k + lane * scratch.stride);
      }
      Floats found = sums_of_lanes(products);
      for (int64_t lane = num_cells - cell; lane < kLanes; lane++) found[lane] = kNever;
      __builtin_memcpy(scores + cell, &found, sizeof(found));
      most = most > found ? most : found;
    }
    float largest = scratch.largest[first + row];
    for (int lane = 0; lane < kLanes; lane++) largest = std::max(largest, most[lane]);
    Floats total = {};
    for (int64_t cell = 0; cell < num_cells; cell += kLanes) {
      const Floats weights = exp_of(load<Floats>(scores + cell) - largest);
      __builtin_memcpy(scores + cell, &weights, sizeof(weights));
      total = total + weights;
    }
    float added = 0;
    for (int lane = 0; lane < kLanes; lane++) added += total[lane];
    const float kept = exp_of(scratch.largest[first + row] - largest);
    scratch.total[first + row] = scratch.total[first + row] * kept + added;
    scratch.largest[first + row] = largest;
    float* sums = scratch.sums.data() + (first + row) * scratch.stride;
    for (int64_t h = 0; h < scratch.stride; h++) sums[h] *= kept;
  }
  float* sums = scratch.sums.data() + first * scratch.stride;
  int64_t offset = 0;
  for (; offset + 4 * kLanes <= scratch.stride; offset += 4 * kLanes) add_values<kRows, 4>(scratch, num_cells, offset, sums);
  for (; offset < scratch.stride; offset += kLanes) add_values<kRows, 1>(scratch, num_cells, offset, sums);
}

void attend_to_block(Scratch& scratch, int64_t num_cells, int64_t first, int64_t rows) {
  for (int64_t end = first + rows; first < end; first += kHeads) switch (end - first) {
      case 1: attend_to_block<1>(scratch, num_cells, first); break;
      case 2: attend_to_block<2>(scratch, num_cells, first); break;
      case 3: attend_to_block<3>(scratch, num_cells, first); break;
      default: attend_to_block<kHeads>(scratch, num_cells, first);
    }
}

void attend(const Call& call, int64_t row, int64_t head, int64_t first, int64_t end) {
  const int64_t size = call.k.size, groups = call.num_heads / call.k.heads;
  thread_local Scratch scratch;
  scratch.prepare(size, (end - first) * groups);
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  const int32_t* positions = call.positions + row * call.num_queries;
  const auto at = [&](int64_t query, int64_t group) {
    return ((row * call.num_queries + query) * call.num_heads + head * groups + group) * size;
  };
  const int64_t most = std::min<int64_t>(call.num_tables * call.k.page, call.starts[row] + call.num_new);
  const auto seen = [&](int64_t query) { return std::min<int64_t>(positions[query] + 1, most); };
  int64_t last = 0;
  for (int64_t query = first; query < end; query++) {
    last = std::max(last, seen(query));
    for (int64_t group = 0; group < groups; group++)
      for (int64_t i = 0; i < size; i++)
        scratch.q[((query - first) * groups + group) * scratch.stride + i] = call.q[at(query, group) + i] * scale;
  }
  for (int64_t begin = 0; begin < last; begin += kBlock) {
    read_cells(call, row, head, begin, std::min(last, begin + kBlock), scratch);
    for (int64_t query = first; query < end; query++) {
      const int64_t num_cells = std::min(kBlock, seen(query) - begin);
      if (num_cells > 0) attend_to_block(scratch, num_cells, (query - first) * groups, groups);
    }
  }
  for (int64_t query = first; query < end; query++)
    for (int64_t group = 0; group < groups; group++) {
      const int64_t held = (query - first) * groups + group;
      for (int64_t i = 0; i < size; i++)
        call.out[at(query, group) + i] = scratch.sums[held * scratch.stride + i] / scratch.total[held];
    }
}

// q, out: [B, T, N, H]. pages: [P, S, K, H] of bfloat16's bits, int8 or float32; scales: [P, S, K] or empty.
// tables: [B, n]. new cells: [B, K, C, H], from position `starts` on. positions: [B, T], which the tables reach.
ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::F32> k_scales, ffi::Buffer<ffi::F32> v_scales, ffi::Buffer<ffi::S32> tables,
                     ffi::Buffer<ffi::F32> new_k, ffi::Buffer<ffi::F32> new_v, ffi::Buffer<ffi::S32> starts,
                     ffi::Buffer<ffi::S32> positions, ffi::ResultBuffer<ffi::F32> out, bool rounded) {
  const auto dims = k.dimensions(), queries = q.dimensions();
  const auto pages = [&](const ffi::AnyBuffer& cells, const ffi::Buffer<ffi::F32>& scales) {
    return Pages{cells.untyped_data(), scales.typed_data(), cells.element_type(), rounded, dims[0], dims[1], dims[2], dims[3]};
  };
  const Call call{q.typed_data(),     pages(k, k_scales),     pages(v, v_scales),  tables.typed_data(),
                  starts.typed_data(), positions.typed_data(), new_k.typed_data(),  new_v.typed_data(),
                  out->typed_data(),   queries[1],             queries[2],          new_k.dimensions()[2],
                  tables.dimensions()[1]};
  const int64_t rows = queries[0], heads = dims[2], parts = (queries[1] + kQueries - 1) / kQueries;
  share_out(pool, rows * parts * heads, [call, heads, parts](int64_t task) {
    const int64_t head = task % heads, part = task / heads % parts, row = task / heads / parts;
    attend(call, row, head, call.num_queries * part / parts, call.num_queries * (part + 1) / parts);
  });
  return ffi::Error::Success();
}

}  // namespace

#define GCOMPUTE_F32 Arg<ffi::Buffer<ffi::F32>>()
#define GCOMPUTE_S32 Arg<ffi::Buffer<ffi::S32>>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_paged, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .GCOMPUTE_F32.Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .GCOMPUTE_F32.GCOMPUTE_F32.GCOMPUTE_S32.GCOMPUTE_F32.GCOMPUTE_F32.GCOMPUTE_S32
                                  .GCOMPUTE_S32.Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("rounded"));
