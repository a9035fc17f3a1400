// Rows of 32-bit words (2 bfloat16, 4 int8 or 1 float32) times panels, which hold a word of kPanel columns each.
//
// Sums run along a row in its order, whatever else is multiplied. Where the processor has instructions for dot products
// of bfloat16 or int8, those are used.

#pragma once

#include "vectors.h"

namespace {

constexpr int kPanel = 32;
constexpr int kVectors = kPanel / kLanes;
constexpr int kMostRows = kLanes == 16 ? 12 : 2;

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

struct Rows {
  const uint32_t* words;
  int64_t stride;
};

// Memory that lies in places of one size, which is fetched `lines` lines a time, as long as some are left.
struct Places {
  const char* const* begins = nullptr;
  int64_t bytes = 0, lines = 0, left = 0, inside = 0;

  void fetch_some() {
    const int64_t num = std::min(lines, left);
    for (int64_t line = 0; line < num; line++) {
      __builtin_prefetch(*begins + inside, 0, 1);
      inside += 64;
      if (inside >= bytes) inside = 0, begins++;
    }
    left -= num;
  }
};

// What the processor is told to fetch meanwhile: so many lines for every kTogether words, and some of other places.
struct Ahead {
  const char* from;
  int64_t lines;
  Places* later;
};
constexpr int64_t kTogether = 16;

// y += or = kRows rows times one panel, `width` of its columns.
template <typename Kind, bool kAdds, bool kFetches, int kRows>
void tile(Rows x, const uint32_t* panel, int64_t num_words, typename Kind::Sum* y, int64_t stride, int64_t width,
          Ahead ahead) {
  typename Kind::Sums sums[kRows][kVectors] = {}, offset[kVectors] = {};
  typename Kind::Sum line[kPanel] = {};
  const bool whole = width == kPanel;
  // By the time the sums are there, so are the lines that they go to: stores wait for theirs one after another.
  if constexpr (kFetches)
    for (int row = 0; row < kRows; row++)
      for (int64_t i = 0; i < width; i += kLanes) __builtin_prefetch(y + row * stride + i, 1);
  if constexpr (kAdds)
    for (int row = 0; row < kRows; row++) {
      if (!whole) std::copy_n(y + row * stride, width, line);
      for (int v = 0; v < kVectors; v++)
        sums[row][v] = load<typename Kind::Sums>((whole ? y + row * stride : line) + v * kLanes);
    }
  // The loop over words has no registers left to fetch with.
  for (int64_t word = 0, end; word < num_words; word = end) {
    end = kFetches ? std::min(num_words, word + kTogether) : num_words;
    if constexpr (kFetches) {
      for (int64_t line = 0; line < ahead.lines; line++, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 1);
      if (ahead.later) ahead.later->fetch_some();
    }
    for (int64_t at = word; at < end; at++, panel += kPanel) {
      Words w[kVectors];
      for (int v = 0; v < kVectors; v++) {
        w[v] = load<Words>(panel + v * kLanes);
        // 128 times the sum of the weights: of a row of zeros, to which 128 is added as to any.
        if constexpr (has_offset<Kind>()) offset[v] = Kind::add(offset[v], w[v], 0);
      }
#pragma GCC unroll 12
      for (int row = 0; row < kRows; row++)
        for (int v = 0; v < kVectors; v++) sums[row][v] = Kind::add(sums[row][v], w[v], x.words[row * x.stride + at]);
    }
  }
  for (int row = 0; row < kRows; row++) {
    for (int v = 0; v < kVectors; v++) {
      const typename Kind::Sums total = sums[row][v] - offset[v];
      __builtin_memcpy((whole ? y + row * stride : line) + v * kLanes, &total, sizeof(total));
    }
    if (!whole) std::copy_n(line, width, y + row * stride);
  }
}

// The same for kMostRows rows at most.
template <typename Kind, bool kAdds = false, bool kFetches = false, int kRows = kMostRows>
void multiply(int64_t rows, Rows x, const uint32_t* panel, int64_t num_words, typename Kind::Sum* y, int64_t stride,
              int64_t width = kPanel, Ahead ahead = {}) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return tile<Kind, kAdds, kFetches, kRows>(x, panel, num_words, y, stride, width, ahead);
    multiply<Kind, kAdds, kFetches, kRows - 1>(rows, x, panel, num_words, y, stride, width, ahead);
  }
}

}  // namespace
