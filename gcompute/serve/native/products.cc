// Matrix products whose weights were packed once, for serving on CPU: y[M, O] = x[M, I] . w[O, I]^T.
//
// XLA repacks the weights of every product that it carries out, which for few rows costs more than the product. Here
// they come packed: a panel holds kPanel output channels, and for each 32-bit word of a row (2 bfloat16, 4 int8 or 1
// float32) the words of all its channels lie side by side, so that one pass over a panel reads memory in its order.
// Sums run along a row in its order, whatever M is: the result of a row does not depend on the rows beside it.

#include "panels.h"

namespace {

// x: [M, I]. panels: [ceil(O / kPanel), words of a row, kPanel]. y: [M, O].
template <typename Kind, typename X, typename Y>
ffi::Error product(ffi::ThreadPool pool, X x, ffi::Buffer<ffi::U32> panels, Y y) {
  const int64_t rows = x.dimensions()[0], num_panels = panels.dimensions()[0], num_words = panels.dimensions()[1];
  const int64_t outputs = y->dimensions()[1];
  if (x.size_bytes() != static_cast<size_t>(rows * num_words) * 4 || (outputs + kPanel - 1) / kPanel != num_panels)
    return ffi::Error::InvalidArgument("the shapes of x, panels and y do not go together.");
  const auto* from = reinterpret_cast<const uint32_t*>(x.untyped_data());
  const auto* weights = panels.typed_data();
  auto* to = y->typed_data();
  // Enough pieces that threads end together, few enough that taking one costs nothing.
  const int64_t pieces = std::min<int64_t>(num_panels, 16);
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows;
  share_out(pool, pieces, [=](int64_t piece) {
    for (int64_t at = num_panels * piece / pieces; at < num_panels * (piece + 1) / pieces; at++) {
      const int64_t width = std::min<int64_t>(kPanel, outputs - at * kPanel);
      const uint32_t* panel = weights + at * num_words * kPanel;
      // One pass over the panels is in the order of memory, which the processor fetches best by itself. More passes
      // over each would leave the memory idle, but that every one fetches its share of the next panel.
      const int64_t lines = tiles == 1 ? 0 : (kTogether * kPanel * 4 / 64 + tiles - 1) / tiles;
      const char* next = reinterpret_cast<const char*>(panel + num_words * kPanel);
      for (int64_t part = 0; part < tiles; part++) {
        const int64_t first = rows * part / tiles, end = rows * (part + 1) / tiles;
        multiply<Kind, false, true>(end - first, Rows{from + first * num_words, num_words}, panel, num_words,
                                    to + first * outputs + at * kPanel, outputs, width,
                                    Ahead{next + part * lines * 64 * (num_words / kTogether), lines});
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define GCOMPUTE_PRODUCT(name, Kind, In, Out)                                                       \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (product<Kind, ffi::Buffer<In>, ffi::ResultBuffer<Out>>),     \
                                ffi::Ffi::Bind()                                                    \
                                    .Ctx<ffi::ThreadPool>()                                         \
                                    .Arg<ffi::Buffer<In>>()                                         \
                                    .Arg<ffi::Buffer<ffi::U32>>()                                   \
                                    .Ret<ffi::Buffer<Out>>())

GCOMPUTE_PRODUCT(product_float32, Float32, ffi::F32, ffi::F32);
GCOMPUTE_PRODUCT(product_bfloat16, Bfloat16, ffi::BF16, ffi::F32);
GCOMPUTE_PRODUCT(product_int8, Int8, ffi::S8, ffi::S32);
