// Products whose weights were packed once, for serving on CPU: y[M, O] = x[M, I] . w[O, I]^T.
//
// XLA repacks the weights of every product that it carries out, which for few rows costs more than the product. Here
// they come packed: a panel holds kPanel output channels, and for each 32-bit word of a row (2 bfloat16, 4 int8 or 1
// float32) the words of all its channels lie side by side, so that one pass over a panel reads memory in its order.
// Sums run along a row in its order, whatever M is: the result of a row does not depend on the rows beside it.
//
// Where words are taken apart in registers, x is unfolded first: tile after tile, the numbers of its rows side by side.
// Tiles then take a slice of a panel one after another, which stays in the first cache meanwhile.

#include "cells.h"

namespace {

// The words of a slice: 16 KiB of a panel, half of the smallest first cache of a processor that has such vectors.
constexpr int64_t kSlice = 16384 / (kPanel * 4);
// Rows of a task at most: the more, the seldomer a panel is read.
constexpr int64_t kTaskRows = 96;

// Rows in equal tiles of kMostRows at most, and what they are multiplied by.
template <typename Kind>
struct Operand {
  int64_t num_rows, num_words, num = (num_rows + kMostRows - 1) / kMostRows;
  const uint32_t* words = nullptr;
  std::unique_ptr<uint32_t[]> unfolded = nullptr;

  // Words between tiles' beginnings, which are counted in rows.
  int64_t stride() const { return num_words * Kind::kParts; }
  int64_t first(int64_t tile) const { return num_rows * tile / num; }

  // The numbers of rows, each a word, those of a tile side by side.
  template <typename Number>
  void unfold(ffi::ThreadPool pool, const Number* x) {
    unfolded.reset(new uint32_t[num_rows * stride()]);
    words = unfolded.get();
    share_out(pool, num, [x, to = unfolded.get(), this](int64_t tile) {
      const int64_t rows = first(tile + 1) - first(tile);
      for (int64_t row = 0; row < rows; row++) {
        const Number* from = x + (first(tile) + row) * stride();
        uint32_t* found = to + first(tile) * stride() + row;
        for (int64_t at = 0; at < stride(); at++) found[at * rows] = word_of(from[at]);
      }
    });
  }

  static uint32_t word_of(float number) {
    uint32_t word;
    __builtin_memcpy(&word, &number, sizeof(word));
    return word;
  }
  static uint32_t word_of(uint16_t number) { return static_cast<uint32_t>(number) << 16; }
  static uint32_t word_of(int8_t number) { return static_cast<int32_t>(number); }
};

// How a product is taken apart: a task is one panel by the rows of some tiles that follow each other.
template <typename Kind>
struct Plan {
  const Operand<Kind>& x;
  const uint32_t* panels;
  int64_t num_panels, num_threads;
  // Fewer groups would leave threads idle where panels are few.
  int64_t num_groups = std::min(x.num, std::max((x.num_rows + kTaskRows - 1) / kTaskRows,
                                                Kind::kFolded ? x.num : (4 * num_threads - 1) / num_panels + 1));
  int64_t num_tasks = num_panels * num_groups;
  int64_t num_slices = Kind::kFolded || x.num == 1 ? 1 : (x.num_words + kSlice - 1) / kSlice;
  // One pass over the panels is in the order of memory, which the processor fetches best by itself. More passes over
  // each would leave the memory idle, but that every one fetches its share of the next panel.
  int64_t strips = kVectors / vectors_of((x.num_rows + x.num - 1) / x.num), passes = x.num * strips;
  int64_t lines = passes == 1 ? 0 : (kTogether * kPanel * 4 / 64 + passes - 1) / passes;

  // How often a task's tiles fetch something.
  int64_t fetches() const { return (passes + num_groups - 1) / num_groups * (x.num_words / kTogether); }

  int64_t panel(int64_t task) const { return task / num_groups; }
  int64_t first_tile(int64_t task) const { return x.num * (task % num_groups) / num_groups; }
  int64_t end_tile(int64_t task) const { return x.num * (task % num_groups + 1) / num_groups; }
  int64_t first_row(int64_t task) const { return x.first(first_tile(task)); }
  int64_t end_row(int64_t task) const { return x.first(end_tile(task)); }

  // y = a task's rows times a panel, `width` of its columns; some of `later` is fetched too.
  void multiply_by(int64_t panel, int64_t task, typename Kind::Sum* y, int64_t stride, int64_t width,
                   Places& later) const {
    for (int64_t slice = 0; slice < num_slices; slice++) {
      const int64_t word = x.num_words * slice / num_slices, end = x.num_words * (slice + 1) / num_slices;
      const uint32_t *words = panels + (panel * x.num_words + word) * kPanel, *next = words + x.num_words * kPanel;
      for (int64_t tile = first_tile(task); tile < end_tile(task); tile++) {
        const int64_t first = x.first(tile), rows = x.first(tile + 1) - first;
        const Ahead ahead{reinterpret_cast<const char*>(next) + tile * strips * lines * 64 * ((end - word) / kTogether),
                          lines, &later};
        const int64_t skipped = Kind::kFolded ? word : word * Kind::kParts * rows;
        multiply<Kind, true, !Kind::kFolded>(rows, Rows{x.words + first * x.stride() + skipped, x.stride()}, words,
                                             end - word, y + (first - first_row(task)) * stride, stride, slice > 0,
                                             width, ahead);
      }
    }
  }
};

// x: [M, I]. panels: [ceil(O / kPanel), words of a row, kPanel].
template <typename Kind, typename X>
Operand<Kind> operand_of(ffi::ThreadPool pool, const X& x, const ffi::Buffer<ffi::U32>& panels) {
  Operand<Kind> operand{x.dimensions()[0], panels.dimensions()[1]};
  if constexpr (Kind::kFolded)
    operand.words = reinterpret_cast<const uint32_t*>(x.untyped_data());
  else
    operand.unfold(pool, x.typed_data());
  return operand;
}

template <typename X, typename Y>
bool go_together(const X& x, const ffi::Buffer<ffi::U32>& panels, Y& y, int64_t outputs) {
  const auto dims = panels.dimensions();
  return x.size_bytes() == static_cast<size_t>(y->dimensions()[0] * dims[1]) * 4 &&
         (outputs + kPanel - 1) / kPanel == dims[0];
}

// What a later kernel reads of a pool of pages [P, ...]: row b's first cells, `starts` [B], are in the pages that
// tables [B, n] name. Products of many rows leave the memory time enough to bring it nearer.
class LaterPages {
 public:
  LaterPages(const ffi::RemainingArgs& args, int64_t passes) {
    if (args.size() == 0 || passes == 1) return;
    const auto pool = *args.get<ffi::AnyBuffer>(0);
    const auto tables = *args.get<ffi::Buffer<ffi::S32>>(1), starts = *args.get<ffi::Buffer<ffi::S32>>(2);
    const int64_t num_pages = pool.dimensions()[0], page = pool.dimensions()[1];
    const int64_t num_tables = tables.dimensions()[1];
    bytes_ = pool.size_bytes() / num_pages;
    for (int64_t row = 0; row < tables.dimensions()[0]; row++)
      for (int64_t at = 0; at < num_tables && at * page < starts.typed_data()[row]; at++) {
        const int64_t entry = std::clamp<int64_t>(tables.typed_data()[row * num_tables + at], 0, num_pages - 1);
        begins_.push_back(static_cast<const char*>(pool.untyped_data()) + entry * bytes_);
      }
  }

  // What one of `num` tasks fetches, in `times` times: rows of few words leave none.
  Places share(int64_t task, int64_t num, int64_t times) const {
    if (begins_.empty() || times == 0) return {};
    const int64_t first = begins_.size() * task / num, end = begins_.size() * (task + 1) / num;
    const int64_t left = (end - first) * (bytes_ / 64);
    return {begins_.data() + first, bytes_, std::min<int64_t>(kMostLines, (left + times - 1) / times), left};
  }

 private:
  // More at a time the memory would not bring in time.
  static constexpr int64_t kMostLines = 12;
  std::vector<const char*> begins_;
  int64_t bytes_ = 0;
};

const char* const kShapes = "the shapes of x, panels and y do not go together.";

// y: [M, O].
template <typename Kind, typename X, typename Y>
ffi::Error product(ffi::ThreadPool pool, X x, ffi::Buffer<ffi::U32> panels, ffi::RemainingArgs later, Y y) {
  const int64_t outputs = y->dimensions()[1], num_panels = panels.dimensions()[0];
  if (!go_together(x, panels, y, outputs)) return ffi::Error::InvalidArgument(kShapes);
  const Operand<Kind> operand = operand_of<Kind>(pool, x, panels);
  const Plan<Kind> plan{operand, panels.typed_data(), num_panels, pool.num_threads()};
  const LaterPages pages(later, plan.passes);
  share_out(pool, plan.num_tasks, [=, to = y->typed_data(), &pages, &plan](int64_t task) {
    const int64_t at = plan.panel(task);
    Places places = pages.share(task, plan.num_tasks, plan.fetches());
    plan.multiply_by(at, task, to + plan.first_row(task) * outputs + at * kPanel, outputs,
                     std::min<int64_t>(kPanel, outputs - at * kPanel), places);
  });
  return ffi::Error::Success();
}

// y: [M, O / 2] = silu(first half of the product) * second half, whose panels begin where those of the first end.
template <typename Kind, typename X, typename Y>
ffi::Error gated_product(ffi::ThreadPool pool, X x, ffi::Buffer<ffi::U32> panels, ffi::RemainingArgs later, Y y) {
  const int64_t outputs = y->dimensions()[1], num_panels = panels.dimensions()[0] / 2;
  if (!go_together(x, panels, y, 2 * outputs) || outputs % kPanel) return ffi::Error::InvalidArgument(kShapes);
  const Operand<Kind> operand = operand_of<Kind>(pool, x, panels);
  const Plan<Kind> plan{operand, panels.typed_data(), num_panels, pool.num_threads()};
  const LaterPages pages(later, plan.passes);
  share_out(pool, plan.num_tasks, [=, to = y->typed_data(), &pages, &plan](int64_t task) {
    const int64_t at = plan.panel(task), first = plan.first_row(task);
    Places places = pages.share(task, plan.num_tasks, 2 * plan.fetches());
    float gates[kTaskRows][kPanel], ups[kTaskRows][kPanel];
    plan.multiply_by(at, task, gates[0], kPanel, kPanel, places);
    plan.multiply_by(num_panels + at, task, ups[0], kPanel, kPanel, places);
    for (int64_t row = first; row < plan.end_row(task); row++)
      for (int64_t i = 0; i < kPanel; i += kLanes)
        store_some(silu_of(load<Floats>(gates[row - first] + i)) * load<Floats>(ups[row - first] + i), kLanes,
                   to + row * outputs + at * kPanel + i);
  });
  return ffi::Error::Success();
}

}  // namespace

#define GCOMPUTE_PRODUCT(name, function, Kind, In, Out)                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (function<Kind, ffi::Buffer<In>, ffi::ResultBuffer<Out>>),     \
                                ffi::Ffi::Bind()                                                     \
                                    .Ctx<ffi::ThreadPool>()                                          \
                                    .Arg<ffi::Buffer<In>>()                                          \
                                    .Arg<ffi::Buffer<ffi::U32>>()                                    \
                                    .RemainingArgs()                                                 \
                                    .Ret<ffi::Buffer<Out>>())

GCOMPUTE_PRODUCT(product_float32, product, Float32, ffi::F32, ffi::F32);
GCOMPUTE_PRODUCT(product_bfloat16, product, Bfloat16, ffi::BF16, ffi::F32);
GCOMPUTE_PRODUCT(product_int8, product, Int8, ffi::S8, ffi::S32);
GCOMPUTE_PRODUCT(gated_product_float32, gated_product, Float32, ffi::F32, ffi::F32);
GCOMPUTE_PRODUCT(gated_product_bfloat16, gated_product, Bfloat16, ffi::BF16, ffi::BF16);
