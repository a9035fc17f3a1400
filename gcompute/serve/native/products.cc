// Matrix products whose weights were packed once, for serving on CPU: y[M, O] = x[M, I] . w[O, I]^T.
//
// XLA repacks the weights of every product that it carries out, which for few rows costs more than the product. Here
// they come packed: a panel holds kPanel output channels, and for each 32-bit word of a row (2 bfloat16, 4 int8 or 1
// float32) the words of all its channels lie side by side, so that one pass over a panel reads memory in its order.
// Sums run along a row in its order, whatever M is: the result of a row does not depend on the rows beside it.

#include "cells.h"

namespace {

// Rows that are multiplied by panel after panel, in equal parts of kMostRows at most.
struct Parts {
  Rows all;
  int64_t num_rows, num_words, num = (num_rows + kMostRows - 1) / kMostRows;
  // One pass over the panels is in the order of memory, which the processor fetches best by itself. More passes over
  // each would leave the memory idle, but that every one fetches its share of the next panel.
  int64_t lines = num == 1 ? 0 : (kTogether * kPanel * 4 / 64 + num - 1) / num;

  int64_t first(int64_t part) const { return num_rows * part / num; }
  int64_t size(int64_t part) const { return first(part + 1) - first(part); }

  // y = a part's rows times a panel, `width` of its columns; some of `later` is fetched too.
  template <typename Kind>
  void multiply_by(const uint32_t* panel, int64_t part, typename Kind::Sum* y, int64_t stride, int64_t width,
                   Places& later) const {
    const char* next = reinterpret_cast<const char*>(panel + num_words * kPanel);
    const Ahead ahead{next + part * lines * 64 * (num_words / kTogether), lines, &later};
    multiply<Kind, false, true>(size(part), Rows{all.words + first(part) * num_words, num_words}, panel, num_words, y,
                                stride, width, ahead);
  }
};

// x: [M, I]. panels: [ceil(O / kPanel), words of a row, kPanel].
template <typename X>
Parts parts_of(const X& x, const ffi::Buffer<ffi::U32>& panels) {
  const int64_t num_words = panels.dimensions()[1];
  return {Rows{reinterpret_cast<const uint32_t*>(x.untyped_data()), num_words}, x.dimensions()[0], num_words};
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
  LaterPages(const ffi::RemainingArgs& args, const Parts& parts) {
    if (args.size() == 0 || parts.num == 1) return;
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
  const Parts parts = parts_of(x, panels);
  const LaterPages pages(later, parts);
  // A panel by one part of the rows: whole panels would leave a thread waiting for the other's last.
  const int64_t num = num_panels * parts.num;
  share_out(pool, num, [=, weights = panels.typed_data(), to = y->typed_data(), &pages](int64_t task) {
    const int64_t at = task / parts.num, part = task % parts.num;
    Places places = pages.share(task, num, parts.num_words / kTogether);
    parts.multiply_by<Kind>(weights + at * parts.num_words * kPanel, part,
                            to + parts.first(part) * outputs + at * kPanel, outputs,
                            std::min<int64_t>(kPanel, outputs - at * kPanel), places);
  });
  return ffi::Error::Success();
}

// y: [M, O / 2] = silu(first half of the product) * second half, whose panels begin where those of the first end.
template <typename Kind, typename X, typename Y>
ffi::Error gated_product(ffi::ThreadPool pool, X x, ffi::Buffer<ffi::U32> panels, ffi::RemainingArgs later, Y y) {
  const int64_t outputs = y->dimensions()[1], num_panels = panels.dimensions()[0] / 2;
  if (!go_together(x, panels, y, 2 * outputs) || outputs % kPanel) return ffi::Error::InvalidArgument(kShapes);
  const Parts parts = parts_of(x, panels);
  const LaterPages pages(later, parts);
  const int64_t num = num_panels * parts.num;
  share_out(pool, num, [=, weights = panels.typed_data(), to = y->typed_data(), &pages](int64_t task) {
    const int64_t at = task / parts.num, part = task % parts.num, panel_words = parts.num_words * kPanel;
    Places places = pages.share(task, num, 2 * parts.num_words / kTogether);
    float gates[kMostRows][kPanel], ups[kMostRows][kPanel];
    parts.multiply_by<Kind>(weights + at * panel_words, part, gates[0], kPanel, kPanel, places);
    parts.multiply_by<Kind>(weights + (num_panels + at) * panel_words, part, ups[0], kPanel, kPanel, places);
    for (int64_t row = 0; row < parts.size(part); row++)
      for (int64_t i = 0; i < kPanel; i += kLanes)
        store_some(silu_of(load<Floats>(gates[row] + i)) * load<Floats>(ups[row] + i), kLanes,
                   to + (parts.first(part) + row) * outputs + at * kPanel + i);
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
