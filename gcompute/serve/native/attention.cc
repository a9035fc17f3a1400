// Attention over pages where they lie: softmax(q k^T / sqrt(H)) v, for serving on CPU.
//
// A task takes one or all key/value heads for some queries of one row. Keys are packed into panels a block of cells at
// a time and multiplied by all queries that see them; then scores become weights; then values are packed and multiplied
// by those. Operands are rounded where the model's own attention rounds them. Sums run over cells in their order: a
// query's result depends on its cells alone, not on what other queries there are or on the length of the table.

#include <cmath>
#include <limits>
#include <vector>

#include "single_query.h"

namespace {

// Queries of a task at most, and scores of a task (unless one query has more).
constexpr int64_t kQueries = 32, kScores = 1 << 18;
constexpr float kNever = -std::numeric_limits<float>::infinity();

// Turns `num` scores into weights, the words of which come to lie at the beginning; zeros follow up to `end`.
template <typename Kind>
void weigh(float* scores, int64_t num, int64_t end) {
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
  std::fill(scores + num, scores + end, 0.0f);
  for (int64_t cell = 0; cell < end; cell += kLanes) {
    const Floats weights = load<Floats>(scores + cell) / sum;
    if constexpr (kNumbers<Kind> == 1) {
      const Floats kept = std::is_same_v<Kind, Rounded> ? rounded(weights) : weights;
      __builtin_memcpy(scores + cell, &kept, sizeof(kept));
    } else {
      const Halves halves = bfloat16_bits(weights);
      __builtin_memcpy(reinterpret_cast<char*>(scores) + cell * sizeof(uint16_t), &halves, sizeof(halves));
    }
  }
}

// Everything that a task reads and writes; sizes are B rows, T queries, N query heads, n pages a row.
struct Call {
  const float* q;
  Pages k, v;
  const int32_t *tables, *positions;
  void* out;
  // Whether `out` is of bfloat16.
  bool rounds;
  int64_t num_queries, num_heads, num_tables;

  int64_t groups() const { return num_heads / k.heads; }
};

// A thread's memory, kept from task to task. Of a key/value head's queries and their heads, in this order, a row each:
// q's words, scores and sums of values; and a block of cells, copied and as panels. Strides are in words.
struct Scratch {
  int64_t cell_stride, score_stride, sum_stride;
  std::vector<uint32_t> copies, panels, q;
  std::vector<float> scores, sums;

  void prepare(int64_t size, int64_t numbers, int64_t heads, int64_t rows, int64_t num_cells) {
    sum_stride = rounded_up(size, kPanel);
    cell_stride = sum_stride / numbers;
    // Not a power of 2, lest rows share lines of the cache.
    score_stride = rounded_up(num_cells, kBlock) + kLanes;
    grow(copies, (kBlock + 1) * heads * cell_stride);
    grow(panels, kBlock * cell_stride);
    grow(q, rows * cell_stride);
    grow(scores, rows * score_stride);
    sums.assign(rows * sum_stride, 0);
  }

  template <typename Number>
  static void grow(std::vector<Number>& memory, int64_t num) {
    if (memory.size() < static_cast<size_t>(num)) memory.resize(num);
  }
};

// Queries `first_query` to `end_query` of a row, for some key/value heads, with operands of a kind.
template <typename Kind>
struct Task {
  const Call& call;
  int64_t row, first_head, end_head, first_query, end_query;
  Scratch& scratch;
  const int64_t size = call.k.size, groups = call.groups(), rows_of_head = (end_query - first_query) * groups;

  // Cells that a query sees.
  int64_t seen(int64_t query) const {
    return std::min<int64_t>(call.positions[row * call.num_queries + query] + 1, call.num_tables * call.k.page);
  }

  // Cells that any of some rows of a head sees.
  int64_t seen_by(int64_t first, int64_t end) const {
    int64_t most = 0;
    for (int64_t query = first / groups; query <= (end - 1) / groups; query++)
      most = std::max(most, seen(first_query + query));
    return most;
  }

  RowOfCells cells(const Pages& pages) const {
    return {pages, call.tables + row * call.num_tables, first_head, end_head};
  }

  // The first block that a task reads.
  Block first_keys() const {
    return Block(cells(call.k), 0, std::min<int64_t>(seen_by(0, rows_of_head), kBlock));
  }

  // Calls act(cells, head of the task's, first cell, fetch) for every head of every block, which calls fetch(lines) now
  // and then: so comes the next block, and after the last one `then`, while this one is worked on.
  template <typename Act>
  void over_blocks(const RowOfCells& cells, int64_t most, const Block& then, Act act) const {
    Block block(cells, 0, std::min<int64_t>(most, kBlock));
    for (int64_t first = 0; first < most; first += kBlock) {
      const int64_t left = most - first - kBlock;
      const Block next = left > 0 ? Block(cells, first + kBlock, std::min<int64_t>(left, kBlock)) : then;
      const Operands operands = operands_of<Kind>(block, scratch.cell_stride, scratch.copies.data());
      Fetching fetch{next};
      for (int64_t head = 0; head < end_head - first_head; head++) act(operands, head, first, fetch);
      block = next;
    }
  }

  // Calls act(first row in the scratch memory, number of rows) for tiles of a head's rows that see cell `cell`.
  template <typename Act>
  void over_tiles(int64_t head, int64_t cell, Act act) const {
    const int64_t tiles = (rows_of_head + kMostRows - 1) / kMostRows;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t first = rows_of_head * tile / tiles, end = rows_of_head * (tile + 1) / tiles;
      if (cell < seen_by(first, end)) act(head * rows_of_head + first, end - first);
    }
  }

  // Calls act(query, its row in the scratch memory, its first number in q and out) for every query and head.
  template <typename Act>
  void each(Act act) const {
    for (int64_t head = first_head; head < end_head; head++)
      for (int64_t query = first_query; query < end_query; query++)
        for (int64_t group = 0; group < groups; group++)
          act(query, (head - first_head) * rows_of_head + (query - first_query) * groups + group,
              ((row * call.num_queries + query) * call.num_heads + head * groups + group) * size);
  }

  // `after` is what the thread reads next.
  void attend(const Block& after) {
    const int64_t most = seen_by(0, rows_of_head), ends = rounded_up(most, kBlock), heads = end_head - first_head;
    scratch.prepare(size, kNumbers<Kind>, heads, heads * rows_of_head, most);
    const int64_t stride = scratch.cell_stride, score_stride = scratch.score_stride, sum_stride = scratch.sum_stride;
    const int64_t key_words = (size + kNumbers<Kind> - 1) / kNumbers<Kind>;
    uint32_t *panels = scratch.panels.data(), *q = scratch.q.data();
    float *scores = scratch.scores.data(), *sums = scratch.sums.data();

    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    each([&](int64_t, int64_t held, int64_t at) {
      float* scaled = sums + held * sum_stride;
      for (int64_t i = 0; i < size; i++) scaled[i] = call.q[at + i] * scale;
      copy_cell<Kind>(scaled, size, 1.0f, stride, q + held * stride);
      std::fill(scaled, scaled + size, 0.0f);
    });
    const RowOfCells keys = cells(call.k), values = cells(call.v);
    const Block first_values(values, 0, std::min<int64_t>(most, kBlock));
    // Panels are worth their packing to many rows.
    const bool single = end_query - first_query == 1 && groups <= kFewRows && key_words % kLanes == 0;
    over_blocks(keys, most, first_values, [&](const Operands& cells, int64_t head, int64_t cell, auto& fetch) {
      if (single)
        return with_rows(groups, [&](auto rows) {
          score<Kind, rows>(Rows{q + head * groups * stride, stride}, cells, head, key_words,
                            scores + head * groups * score_stride + cell, score_stride, fetch);
        });
      pack_keys(cells, head, panels, fetch);
      over_tiles(head, cell, [&](int64_t held, int64_t num) {
        multiply<Kind>(num, Rows{q + held * stride, stride}, panels, key_words, scores + held * score_stride + cell,
                       score_stride);
      });
    });
    each([&](int64_t query, int64_t held, int64_t) { weigh<Kind>(scores + held * score_stride, seen(query), ends); });
    over_blocks(values, most, after, [&](const Operands& cells, int64_t head, int64_t cell, auto& fetch) {
      constexpr int64_t kWords = kBlock / kNumbers<Kind>;
      if (single)
        return with_rows(groups, [&](auto rows) {
          const auto* weights = reinterpret_cast<const uint32_t*>(scores + head * groups * score_stride);
          add_values<Kind, rows>(Rows{weights + cell / kNumbers<Kind>, score_stride}, cells, head,
                                 sums + head * groups * sum_stride, sum_stride, fetch);
        });
      pack_values<Kind>(cells, head, panels, fetch);
      over_tiles(head, cell, [&](int64_t held, int64_t num) {
        const auto* weights = reinterpret_cast<const uint32_t*>(scores + held * score_stride) + cell / kNumbers<Kind>;
        for (int64_t column = 0; column < sum_stride; column += kPanel)
          multiply<Kind>(num, Rows{weights, score_stride}, panels + column * kWords, kWords,
                         sums + held * sum_stride + column, sum_stride, true);
      });
    });
    each([&](int64_t, int64_t held, int64_t at) {
      if (call.rounds)
        unpack_sums<Kind>(sums + held * sum_stride, size, static_cast<uint16_t*>(call.out) + at);
      else
        unpack_sums<Kind>(sums + held * sum_stride, size, static_cast<float*>(call.out) + at);
    });
  }
};

template <typename Kind>
void attend(ffi::ThreadPool pool, const Call& call, int64_t rows) {
  const int64_t heads = call.k.heads, scores = call.groups() * call.num_tables * call.k.page;
  const int64_t at_once = std::clamp<int64_t>(kScores / scores, 1, kQueries);
  const int64_t parts = (call.num_queries + at_once - 1) / at_once;
  // Cells of all heads lie together: few queries read them fastest together.
  const int64_t apart = call.num_queries == 1 && rows >= 2 * pool.num_threads() ? 1 : heads;
  const int64_t items = rows * parts * apart;
  share_out(pool, items, [call, heads, parts, apart, items](int64_t item) {
    thread_local Scratch scratch;
    const auto task = [&](int64_t item) {
      const int64_t share = item % apart, part = item / apart % parts, row = item / apart / parts;
      const int64_t first = call.num_queries * part / parts, end = call.num_queries * (part + 1) / parts;
      return Task<Kind>{call, row, heads * share / apart, heads * (share + 1) / apart, first, end, scratch};
    };
    task(item).attend(item + 1 < items ? task(item + 1).first_keys() : Block());
  });
}

// q, out: [B, T, N, H]. pages: [P, S, K, H] of bfloat16's bits, int8 or float32; scales: [P, S, K] or empty.
// tables: [B, n]. positions: [B, T], which the tables reach.
// rounded: operands are bfloat16. out may be bfloat16 too.
ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::F32> k_scales, ffi::Buffer<ffi::F32> v_scales, ffi::Buffer<ffi::S32> tables,
                     ffi::Buffer<ffi::S32> positions, ffi::Result<ffi::AnyBuffer> out, bool rounded) {
  const auto dims = k.dimensions(), queries = q.dimensions();
  const auto pages = [&](const ffi::AnyBuffer& cells, const ffi::Buffer<ffi::F32>& scales) {
    return Pages{cells.untyped_data(), scales.typed_data(), cells.element_type(), dims[0], dims[1], dims[2], dims[3]};
  };
  const Call call{q.typed_data(),
                  pages(k, k_scales),
                  pages(v, v_scales),
                  tables.typed_data(),
                  positions.typed_data(),
                  out->untyped_data(),
                  out->element_type() == ffi::BF16,
                  queries[1],
                  queries[2],
                  tables.dimensions()[1]};
  rounded ? attend<Narrow>(pool, call, queries[0]) : attend<Float32>(pool, call, queries[0]);
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
                                  .GCOMPUTE_F32.GCOMPUTE_F32.GCOMPUTE_S32.GCOMPUTE_S32.Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("rounded"));
