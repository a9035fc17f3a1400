// Attention over pages where they lie: softmax(q k^T / sqrt(H)) v, for serving on CPU.
//
// A task takes the query heads of one key/value head for some queries of one row, and cells a block at a time: old ones
// in the row's pages, new ones beside them. It keeps for each query head the largest score, the sum of weights and the
// weighted sum of values so far. For several queries a block is first copied as float32.
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
// Pages ahead of the one that is read which the processor is told to fetch.
constexpr int kAhead = 2;
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
using Bytes = int8_t __attribute__((vector_size(kLanes)));

inline float nearest_bfloat16(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// Numbers `i` and on of one cell as float32; zeros where fewer than kLanes are left.
template <typename Number>
inline Floats some_of(const Number* from, int64_t left) {
  using Vector = std::conditional_t<sizeof(Number) == 4, Floats, std::conditional_t<sizeof(Number) == 2, Halves, Bytes>>;
  Vector numbers = {};
  if (left >= kLanes)
    numbers = load<Vector>(from);
  else
    std::memcpy(&numbers, from, left * sizeof(Number));
  if constexpr (sizeof(Number) == 2)
    return reinterpret_cast<Floats>(__builtin_convertvector(numbers, Words) << 16);
  else
    return __builtin_convertvector(numbers, Floats);
}

// Cells of one head that lie `stride` numbers apart, of float32, bfloat16's bits or int8 with a scale each.
template <typename Number>
struct Cells {
  const Number* first;
  int64_t stride, size;
  const float* scales;
  int64_t scale_stride;
  bool rounded;  // int8 times its scale is rounded to bfloat16

  Floats numbers(int64_t cell, int64_t i) const {
    Floats found = some_of(first + cell * stride + i, size - i);
    if constexpr (sizeof(Number) == 1) {
      found = found * scales[cell * scale_stride];
      if (rounded)
        for (int lane = 0; lane < kLanes; lane++) found[lane] = nearest_bfloat16(found[lane]);
    }
    return found;
  }
};

struct Pages {
  const void* cells;
  const float* scales;  // of int8
  ffi::DataType dtype;
  bool rounded;
  int64_t num_pages, page, heads, size;

  // The number of a page's first cell, by its entry in a table.
  int64_t first_cell(int32_t entry) const { return std::clamp<int64_t>(entry, 0, num_pages - 1) * page; }

  // Tells the processor to fetch a page, with all its heads: a task takes them one after another.
  void fetch(int32_t entry) const {
    const int64_t bytes = page * heads * size * (dtype == ffi::F32 ? 4 : dtype == ffi::S8 ? 1 : 2);
    const char* from = static_cast<const char*>(cells) + first_cell(entry) / page * bytes;
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
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

// Scores or weights of kHeads heads, what queries have so far, and a block's cells as float32, [kBlock, stride].
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

  Cells<float> copied(const std::vector<float>& cells) const { return {cells.data(), stride, stride, nullptr, 0, false}; }
};

// Calls visit(cells, num, first) for the cells `begin` to `end` of a row and head, as many as lie together at a time.
template <typename Visit>
void visit_cells(const Call& call, const Pages& pages, const float* new_cells, int64_t row, int64_t head, int64_t begin,
                 int64_t end, Visit visit) {
  const int64_t page = pages.page, size = pages.size, apart = pages.heads * size;
  const int64_t start = std::clamp<int64_t>(call.starts[row], begin, end);
  const int32_t* table = call.tables + row * call.num_tables;
  for (int64_t cell = begin; cell < start;) {
    const int64_t inside = cell % page, num = std::min(page - inside, start - cell);
    const int64_t at = pages.first_cell(table[cell / page]) + inside;
    if (head == 0 && cell + kAhead * page < start) pages.fetch(table[cell / page + kAhead]);
    const int64_t offset = at * apart + head * size;
    if (pages.dtype == ffi::F32)
      visit(Cells<float>{static_cast<const float*>(pages.cells) + offset, apart, size, nullptr, 0, false}, num, cell);
    else if (pages.dtype == ffi::S8)
      visit(Cells<int8_t>{static_cast<const int8_t*>(pages.cells) + offset, apart, size,
                          pages.scales + at * pages.heads + head, pages.heads, pages.rounded},
            num, cell);
    else
      visit(Cells<uint16_t>{static_cast<const uint16_t*>(pages.cells) + offset, apart, size, nullptr, 0, false}, num, cell);
    cell += num;
  }
  if (start < end) {
    const int64_t at = (row * pages.heads + head) * call.num_new + start - call.starts[row];
    visit(Cells<float>{new_cells + at * size, size, size, nullptr, 0, false}, end - start, start);
  }
}

// Scores of `num` cells for kRows heads, the lanes of each yet to be summed: products[row][cell % kLanes].
template <int kRows>
struct Scoring {
  const float* q;
  int64_t stride;
  float* scores;
  Floats products[kRows][kLanes] = {};

  template <typename Number>
  void add(const Cells<Number>& cells, int64_t num, int64_t first) {
    for (int64_t cell = 0; cell < num; cell++) {
      Floats sums[kRows] = {};
      for (int64_t i = 0; i < cells.size; i += kLanes) {
        const Floats numbers = cells.numbers(cell, i);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; row++) sums[row] = sums[row] + numbers * load<Floats>(q + row * stride + i);
      }
      const int64_t lane = (first + cell) % kLanes;
#pragma GCC unroll 4
      for (int row = 0; row < kRows; row++) products[row][lane] = sums[row];
      if (lane == kLanes - 1) finish(first + cell + 1 - kLanes);
    }
  }

  void finish(int64_t first) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; row++) {
      const Floats found = sums_of_lanes(products[row]);
      __builtin_memcpy(scores + row * kBlock + first, &found, sizeof(found));
    }
  }
};

// sums += weights . v, for kRows heads and kWide vectors of each, from number `offset` of a cell on.
template <int kRows, int kWide, typename Number>
void add_values(const Cells<Number>& cells, int64_t num, const float* weights, int64_t offset, float* sums, int64_t stride) {
  Floats held[kRows][kWide];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
    for (int w = 0; w < kWide; w++) held[row][w] = load<Floats>(sums + row * stride + offset + w * kLanes);
  for (int64_t cell = 0; cell < num; cell++) {
#pragma GCC unroll 4
    for (int w = 0; w < kWide; w++) {
      const Floats numbers = cells.numbers(cell, offset + w * kLanes);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; row++) held[row][w] = held[row][w] + numbers * weights[row * kBlock + cell];
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
    for (int w = 0; w < kWide; w++)
      __builtin_memcpy(sums + row * stride + offset + w * kLanes, &held[row][w], sizeof(Floats));
}

// Turns the scores of a block's `num` cells into weights, and scales what was summed before to the new largest score.
void weigh(Scratch& scratch, int64_t num, int64_t row, float* scores) {
  float largest = scratch.largest[row];
  for (int64_t cell = num; cell % kLanes; cell++) scores[cell] = kNever;
  Floats most = splat<Floats>(largest);
  for (int64_t cell = 0; cell < num; cell += kLanes) {
    const Floats found = load<Floats>(scores + cell);
    most = most > found ? most : found;
  }
  for (int lane = 0; lane < kLanes; lane++) largest = std::max(largest, most[lane]);
  Floats total = {};
  for (int64_t cell = 0; cell < num; cell += kLanes) {
    const Floats weights = exp_of(load<Floats>(scores + cell) - largest);
    __builtin_memcpy(scores + cell, &weights, sizeof(weights));
    total = total + weights;
  }
  float added = 0;
  for (int lane = 0; lane < kLanes; lane++) added += total[lane];
  const float kept = exp_of(scratch.largest[row] - largest);
  scratch.total[row] = scratch.total[row] * kept + added;
  scratch.largest[row] = largest;
  float* sums = scratch.sums.data() + row * scratch.stride;
  for (int64_t i = 0; i < scratch.stride; i++) sums[i] *= kept;
}

// Takes a block's first `num` cells into account for kRows heads of one query, the first of which is `row`. visit_k and
// visit_v call what they are given for the cells of the block.
template <int kRows, typename VisitK, typename VisitV>
void attend_to_block(Scratch& scratch, int64_t num, int64_t row, VisitK visit_k, VisitV visit_v) {
  const int64_t stride = scratch.stride;
  float* scores = scratch.scores.data();
  Scoring<kRows> scoring{scratch.q.data() + row * stride, stride, scores};
  visit_k([&](const auto& cells, int64_t part, int64_t first) { scoring.add(cells, part, first); });
  if (num % kLanes) scoring.finish(num / kLanes * kLanes);
#pragma GCC unroll 4
  for (int at = 0; at < kRows; at++) weigh(scratch, num, row + at, scores + at * kBlock);
  float* sums = scratch.sums.data() + row * stride;
  visit_v([&](const auto& cells, int64_t part, int64_t first) {
    int64_t offset = 0;
    for (; offset + 4 * kLanes <= stride; offset += 4 * kLanes)
      add_values<kRows, 4>(cells, part, scores + first, offset, sums, stride);
    for (; offset < stride; offset += kLanes) add_values<kRows, 1>(cells, part, scores + first, offset, sums, stride);
  });
}

template <typename VisitK, typename VisitV>
void attend_to_block(Scratch& scratch, int64_t num, int64_t row, int64_t rows, VisitK visit_k, VisitV visit_v) {
  for (const int64_t end = row + rows; row < end; row += kHeads) switch (end - row) {
      case 1: attend_to_block<1>(scratch, num, row, visit_k, visit_v); break;
      case 2: attend_to_block<2>(scratch, num, row, visit_k, visit_v); break;
      case 3: attend_to_block<3>(scratch, num, row, visit_k, visit_v); break;
      default: attend_to_block<kHeads>(scratch, num, row, visit_k, visit_v);
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
    const int64_t whole = std::min(last - begin, kBlock);
    // visit(cells, num, first), with `first` counted from the block's first cell.
    const auto visit_in_place = [&](const Pages& pages, const float* new_cells, auto visit) {
      visit_cells(call, pages, new_cells, row, head, begin, begin + whole,
                  [&](const auto& cells, int64_t num, int64_t cell) { visit(cells, num, cell - begin); });
    };
    if (end - first == 1) {
      attend_to_block(
          scratch, whole, 0, groups, [&](auto visit) { visit_in_place(call.k, call.new_k, visit); },
          [&](auto visit) { visit_in_place(call.v, call.new_v, visit); });
      continue;
    }
    const auto copy_to = [&](std::vector<float>& to) {
      return [&](const auto& cells, int64_t num, int64_t cell) {
        for (int64_t one = 0; one < num; one++)
          for (int64_t i = 0; i < size; i += kLanes) {
            const Floats numbers = cells.numbers(one, i);
            __builtin_memcpy(to.data() + (cell + one) * scratch.stride + i, &numbers, sizeof(numbers));
          }
      };
    };
    visit_in_place(call.k, call.new_k, copy_to(scratch.k));
    visit_in_place(call.v, call.new_v, copy_to(scratch.v));
    for (int64_t query = first; query < end; query++) {
      const int64_t num = std::min(kBlock, seen(query) - begin);
      if (num > 0)
        attend_to_block(
            scratch, num, (query - first) * groups, groups,
            [&](auto visit) { visit(scratch.copied(scratch.k), num, 0); },
            [&](auto visit) { visit(scratch.copied(scratch.v), num, 0); });
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
  const int64_t apart = rows * parts >= 2 * pool.num_threads() ? 1 : heads;
  share_out(pool, rows * parts * apart, [call, heads, parts, apart](int64_t task) {
    const int64_t share = task % apart, part = task / apart % parts, row = task / apart / parts;
    for (int64_t head = heads * share / apart; head < heads * (share + 1) / apart; head++)
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
