// Attention over pages where they lie: softmax(q k^T / sqrt(H)) v, for serving on CPU.
//
// A task takes one or all key/value heads for some queries of one row: first the scores of all cells that they see, old
// ones in the row's pages and new ones beside them, then their weights, then the sums of values. For several queries
// cells are first copied as float32, a block at a time. Operands are rounded where the model's own attention rounds them.
// Sums run over cells in their order: a query's result depends on its cells alone, not on which of them are new, on what
// other queries there are or on the length of the table.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

// Cells of a block, queries of a task at most, scores of a task (unless one query has more).
constexpr int64_t kBlock = 256, kQueries = 32, kScores = 1 << 18;
// Query heads that are worked on together.
constexpr int kHeads = 4;
// Pages ahead of the one that is read which the processor is told to fetch.
constexpr int kAhead = 2;
constexpr float kNever = -std::numeric_limits<float>::infinity();

inline int64_t whole_vectors(int64_t numbers) { return (numbers + kLanes - 1) / kLanes * kLanes; }

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

inline Floats nearest_bfloat16(Floats numbers) {
  const Words bits = reinterpret_cast<Words>(numbers);
  return reinterpret_cast<Floats>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

inline float nearest_bfloat16(float number) { return nearest_bfloat16(splat<Floats>(number))[0]; }

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
      if (rounded) found = nearest_bfloat16(found);
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

  // Tells the processor to fetch a page with all its heads, which the threads take at about the same time.
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
  bool rounded;  // operands are rounded to bfloat16
};

// Of each query and head, in [rows, stride]: q and the sum of values, and in [rows, score_stride] scores, then weights;
// and a block's cells as float32, [kBlock, stride]. Lanes between a head's size and the stride are zero. A thread keeps
// its memory from task to task.
struct Scratch {
  int64_t size = 0, stride = 0, score_stride = 0;
  std::vector<float> block, q, sums, scores;

  void prepare(int64_t new_size, int64_t rows, int64_t num_cells) {
    if (new_size != size) {
      size = new_size;
      stride = whole_vectors(size);
      block.assign(kBlock * stride, 0);
      q.clear();
    }
    if (q.size() < static_cast<size_t>(rows * stride)) q.assign(rows * stride, 0);
    sums.assign(rows * stride, 0);
    score_stride = whole_vectors(num_cells);
    if (scores.size() < static_cast<size_t>(rows * score_stride)) scores.resize(rows * score_stride);
  }
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

// Scores of cells for kRows heads, from `row` on; `products` has the lanes of those that are yet to be summed.
template <int kRows>
struct Scoring {
  Scratch& scratch;
  int64_t row;
  Floats products[kRows][kLanes] = {};

  // Cells `first` to `first + num`, which follow those before.
  template <typename Number>
  void add(const Cells<Number>& cells, int64_t num, int64_t first) {
    const int64_t stride = scratch.stride;
    const float* q = scratch.q.data() + row * stride;
    for (int64_t cell = 0; cell < num; cell++) {
      Floats sums[kRows] = {};
      for (int64_t i = 0; i < cells.size; i += kLanes) {
        const Floats numbers = cells.numbers(cell, i);
#pragma GCC unroll 4
        for (int at = 0; at < kRows; at++) sums[at] = sums[at] + numbers * load<Floats>(q + at * stride + i);
      }
      const int64_t lane = (first + cell) % kLanes;
#pragma GCC unroll 4
      for (int at = 0; at < kRows; at++) products[at][lane] = sums[at];
      if (lane == kLanes - 1) finish(first + cell);
    }
  }

  // Writes the scores of the vector that `last`, the last cell so far, lies in.
  void finish(int64_t last) {
    float* to = scratch.scores.data() + row * scratch.score_stride + last / kLanes * kLanes;
#pragma GCC unroll 4
    for (int at = 0; at < kRows; at++) {
      const Floats found = sums_of_lanes(products[at]);
      __builtin_memcpy(to + at * scratch.score_stride, &found, sizeof(found));
    }
  }
};

// sums += weights . v, for kRows heads and kWide vectors of each, from number `offset` of a cell on.
template <int kRows, int kWide, typename Number>
void add_some_values(Scratch& scratch, int64_t row, const Cells<Number>& cells, int64_t num, int64_t first, int64_t offset) {
  const int64_t stride = scratch.stride, apart = scratch.score_stride;
  const float* weights = scratch.scores.data() + row * apart + first;
  float* sums = scratch.sums.data() + row * stride + offset;
  Floats held[kRows][kWide];
#pragma GCC unroll 4
  for (int at = 0; at < kRows; at++)
#pragma GCC unroll 4
    for (int w = 0; w < kWide; w++) held[at][w] = load<Floats>(sums + at * stride + w * kLanes);
  for (int64_t cell = 0; cell < num; cell++) {
#pragma GCC unroll 4
    for (int w = 0; w < kWide; w++) {
      const Floats numbers = cells.numbers(cell, offset + w * kLanes);
#pragma GCC unroll 4
      for (int at = 0; at < kRows; at++) held[at][w] = held[at][w] + numbers * weights[at * apart + cell];
    }
  }
#pragma GCC unroll 4
  for (int at = 0; at < kRows; at++)
#pragma GCC unroll 4
    for (int w = 0; w < kWide; w++) __builtin_memcpy(sums + at * stride + w * kLanes, &held[at][w], sizeof(Floats));
}

template <int kRows, typename Number>
void add_values(Scratch& scratch, int64_t row, const Cells<Number>& cells, int64_t num, int64_t first) {
  int64_t offset = 0;
  for (; offset + 4 * kLanes <= scratch.stride; offset += 4 * kLanes)
    add_some_values<kRows, 4>(scratch, row, cells, num, first, offset);
  for (; offset < scratch.stride; offset += kLanes) add_some_values<kRows, 1>(scratch, row, cells, num, first, offset);
}

// Turns one head's scores of `num` cells into weights: softmax, rounded to bfloat16 or not.
void weigh(float* scores, int64_t num, bool rounded) {
  for (int64_t cell = num; cell % kLanes; cell++) scores[cell] = kNever;
  Floats most = splat<Floats>(kNever), total = {};
  for (int64_t cell = 0; cell < num; cell += kLanes) {
    const Floats found = load<Floats>(scores + cell);
    most = most > found ? most : found;
  }
  float largest = kNever, sum = 0;
  for (int lane = 0; lane < kLanes; lane++) largest = std::max(largest, most[lane]);
  for (int64_t cell = 0; cell < num; cell += kLanes) {
    const Floats weights = exp_of(load<Floats>(scores + cell) - largest);
    __builtin_memcpy(scores + cell, &weights, sizeof(weights));
    total = total + weights;
  }
  for (int lane = 0; lane < kLanes; lane++) sum += total[lane];
  for (int64_t cell = 0; cell < num; cell += kLanes) {
    Floats weights = load<Floats>(scores + cell) / sum;
    if (rounded) weights = nearest_bfloat16(weights);
    __builtin_memcpy(scores + cell, &weights, sizeof(weights));
  }
}

// Calls act(number of rows as a constant, row) for kHeads rows at a time.
template <typename Act>
void in_groups(int64_t row, int64_t num, Act act) {
  for (const int64_t end = row + num; row < end; row += kHeads) switch (end - row) {
      case 1: act(std::integral_constant<int, 1>(), row); break;
      case 2: act(std::integral_constant<int, 2>(), row); break;
      case 3: act(std::integral_constant<int, 3>(), row); break;
      default: act(std::integral_constant<int, kHeads>(), row);
    }
}

// Queries `first` to `end` of a row, for one key/value head.
struct Task {
  const Call& call;
  int64_t row, head, first, end;
  Scratch& scratch;

  int64_t groups() const { return call.num_heads / call.k.heads; }

  // Cells that a query sees.
  int64_t seen(int64_t query) const {
    const int64_t most = std::min<int64_t>(call.num_tables * call.k.page, call.starts[row] + call.num_new);
    return std::min<int64_t>(call.positions[row * call.num_queries + query] + 1, most);
  }

  // Calls act(cells, num, first, query) until every query was shown all cells that it sees, in their order.
  template <typename Act>
  void show(const Pages& pages, const float* new_cells, int64_t most, Act act) {
    if (end - first == 1)
      return visit_cells(call, pages, new_cells, row, head, 0, most,
                         [&](const auto& cells, int64_t num, int64_t cell) { act(cells, num, cell, first); });
    const int64_t stride = scratch.stride;
    for (int64_t begin = 0; begin < most; begin += kBlock) {
      visit_cells(call, pages, new_cells, row, head, begin, std::min(most, begin + kBlock),
                  [&](const auto& cells, int64_t num, int64_t cell) {
                    for (int64_t one = 0; one < num; one++)
                      for (int64_t i = 0; i < cells.size; i += kLanes) {
                        const Floats numbers = cells.numbers(one, i);
                        __builtin_memcpy(scratch.block.data() + (cell - begin + one) * stride + i, &numbers, sizeof(numbers));
                      }
                  });
      const Cells<float> block{scratch.block.data(), stride, stride, nullptr, 0, false};
      for (int64_t query = first; query < end; query++)
        if (const int64_t num = std::min(kBlock, seen(query) - begin); num > 0) act(block, num, begin, query);
    }
  }

  void attend() {
    const int64_t size = call.k.size, rows = groups();
    int64_t most = 0;
    for (int64_t query = first; query < end; query++) most = std::max(most, seen(query));
    scratch.prepare(size, (end - first) * rows, most);
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    each([&](int64_t, int64_t held, int64_t at) {
      for (int64_t i = 0; i < size; i++) {
        const float scaled = call.q[at + i] * scale;
        scratch.q[held * scratch.stride + i] = call.rounded ? nearest_bfloat16(scaled) : scaled;
      }
    });
    in_groups(0, rows, [&](auto num_rows, int64_t group) {
      Scoring<num_rows> scoring{scratch, 0};
      show(call.k, call.new_k, most, [&](const auto& cells, int64_t num, int64_t cell, int64_t query) {
        scoring.row = (query - first) * rows + group;
        scoring.add(cells, num, cell);
        if (cell + num == seen(query) && seen(query) % kLanes) scoring.finish(seen(query) - 1);
      });
    });
    each([&](int64_t query, int64_t held, int64_t) {
      weigh(scratch.scores.data() + held * scratch.score_stride, seen(query), call.rounded);
    });
    in_groups(0, rows, [&](auto num_rows, int64_t group) {
      show(call.v, call.new_v, most, [&](const auto& cells, int64_t num, int64_t cell, int64_t query) {
        add_values<num_rows>(scratch, (query - first) * rows + group, cells, num, cell);
      });
    });
    each([&](int64_t, int64_t held, int64_t at) {
      std::copy_n(scratch.sums.data() + held * scratch.stride, size, call.out + at);
    });
  }

  // Calls act(query, its row in the scratch memory, its first number in q and out) for every query and head.
  template <typename Act>
  void each(Act act) const {
    for (int64_t query = first; query < end; query++)
      for (int64_t group = 0; group < groups(); group++)
        act(query, (query - first) * groups() + group,
            ((row * call.num_queries + query) * call.num_heads + head * groups() + group) * call.k.size);
  }
};

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
                  tables.dimensions()[1], rounded};
  const int64_t rows = queries[0], heads = dims[2], scores = queries[2] / heads * call.num_tables * dims[1];
  const int64_t at_once = std::clamp<int64_t>(kScores / scores, 1, kQueries), parts = (queries[1] + at_once - 1) / at_once;
  const int64_t apart = rows * parts >= 2 * pool.num_threads() ? 1 : heads;
  share_out(pool, rows * parts * apart, [call, heads, parts, apart](int64_t task) {
    const int64_t share = task % apart, part = task / apart % parts, row = task / apart / parts;
    thread_local Scratch scratch;
    const int64_t first = call.num_queries * part / parts, end = call.num_queries * (part + 1) / parts;
    for (int64_t head = heads * share / apart; head < heads * (share + 1) / apart; head++)
      Task{call, row, head, first, end, scratch}.attend();
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
