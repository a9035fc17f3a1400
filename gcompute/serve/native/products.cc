// Matrix products whose weights were packed once, for serving on CPU: y[M, O] = x[M, I] . w[O, I]^T.
//
// XLA repacks the weights of every product that it carries out, which for few rows costs more than the product. Here
// they come packed: a panel holds kPanel output channels, and for each 32-bit word of a row (2 bfloat16, 4 int8 or 1
// float32) the words of all its channels lie side by side, so that one pass over a panel reads memory in its order.
// Sums run along a row in its order, whatever M is: the result of a row does not depend on the rows beside it.
//
// Where the processor has instructions for dot products of bfloat16 or int8, those are used.

#include "vectors.h"

namespace {

constexpr int kPanel = 32;
constexpr int kVectors = kPanel / kLanes;
constexpr int kMostRows = kLanes == 16 ? 12 : 2;
// Words ahead of those that are multiplied which the processor is told to fetch.
constexpr int kAhead = 1024;

struct Float32 {
  using Sum = float;
  using Sums = Floats;
  static Sums add(Sums sums, Words w, uint32_t x) { return sums + reinterpret_cast<Floats>(w) * as_float(x); }
};

struct Bfloat16 {
  using Sum = float;
  using Sums = Floats;
  static Sums add(Sums sums, Words w, uint32_t x) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(w),
                                                     reinterpret_cast<__m512bh>(_mm512_set1_epi32(x))));
#else
    constexpr uint32_t kHigh = 0xffff0000u;
    sums = sums + reinterpret_cast<Floats>(w << 16) * as_float(x << 16);
    return sums + reinterpret_cast<Floats>(w & kHigh) * as_float(x & kHigh);
#endif
  }
};

struct Int8 {
  using Sum = int32_t;
  using Sums = Integers;
  static Sums add(Sums sums, Words w, uint32_t x) {
#if defined(__AVX512VNNI__)
    // The instruction takes x without a sign: 128 is added to each, and `offset` takes it back.
    return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sums), _mm512_set1_epi32(x ^ 0x80808080u), reinterpret_cast<__m512i>(w)));
#else
    const Integers whole = reinterpret_cast<Integers>(w);
    for (int byte = 0; byte < 4; byte++)
      sums = sums + ((whole << (24 - 8 * byte)) >> 24) * static_cast<int32_t>(static_cast<int8_t>(x >> (8 * byte)));
    return sums;
#endif
  }
#if defined(__AVX512VNNI__)
  static constexpr bool kOffset = true;
#else
  static constexpr bool kOffset = false;
#endif
};

template <typename Kind>
constexpr bool has_offset() {
  if constexpr (std::is_same_v<Kind, Int8>) return Int8::kOffset;
  return false;
}

// kRows rows times one panel; `width` of its channels are written.
template <typename Kind, int kRows>
void tile(const uint32_t* x, const uint32_t* panel, int64_t num_words, typename Kind::Sum* y, int64_t stride,
          int64_t width) {
  typename Kind::Sums sums[kRows][kVectors] = {}, offset[kVectors] = {};
  for (int64_t word = 0; word < num_words; word++, panel += kPanel) {
    Words w[kVectors];
    for (int v = 0; v < kVectors; v++) {
      w[v] = load<Words>(panel + v * kLanes);
      __builtin_prefetch(panel + v * kLanes + kAhead);
      // 128 times the sum of the weights: of a row of zeros, to which 128 is added as to any.
      if constexpr (has_offset<Kind>()) offset[v] = Kind::add(offset[v], w[v], 0);
    }
#pragma GCC unroll 12
    for (int row = 0; row < kRows; row++)
      for (int v = 0; v < kVectors; v++) sums[row][v] = Kind::add(sums[row][v], w[v], x[row * num_words + word]);
  }
  for (int row = 0; row < kRows; row++) {
    typename Kind::Sum line[kPanel];
    for (int v = 0; v < kVectors; v++) {
      const typename Kind::Sums total = sums[row][v] - offset[v];
      __builtin_memcpy(line + v * kLanes, &total, sizeof(total));
    }
    std::copy(line, line + width, y + row * stride);
  }
}

template <typename Kind, int kRows = kMostRows>
void tile_of(int64_t rows, const uint32_t* x, const uint32_t* panel, int64_t num_words, typename Kind::Sum* y,
             int64_t stride, int64_t width) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return tile<Kind, kRows>(x, panel, num_words, y, stride, width);
    tile_of<Kind, kRows - 1>(rows, x, panel, num_words, y, stride, width);
  }
}

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
      for (int64_t part = 0; part < tiles; part++) {
        const int64_t first = rows * part / tiles, end = rows * (part + 1) / tiles;
        tile_of<Kind>(end - first, from + first * num_words, weights + at * num_words * kPanel, num_words,
                      to + first * outputs + at * kPanel, outputs, width);
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
