// Rows of numbers times panels: 32-bit words (2 bfloat16, 4 int8 or 1 float32) of kPanel columns each.
//
// Sums run along a row in its order, whatever else is multiplied. Where the processor has instructions for dot products
// of bfloat16 or int8, a word of x is multiplied by words of the panel. Where it has not, words of the panel are taken
// apart in registers, a part at a time, and x lies unfolded: a word for every number, which is broadcast from memory.

#pragma once

#include "vectors.h"

namespace {

#define GCOMPUTE_INLINE __attribute__((always_inline))

constexpr int kPanel = 32;
constexpr int kVectors = kPanel / kLanes;

// What a tile holds in registers: sums of kMostRows rows and kTileVectors vectors of columns. Beside 12 sums, 16
// registers have room for the vectors, one broadcast number and one more; 32 registers have it beside 24, or 16 where
// gcc loads many numbers of x early.
#if defined(__AVX512F__)
constexpr int kMostRows = 12, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kMostRows = 4, kTileVectors = 4;
#else
constexpr int kMostRows = 6, kTileVectors = 2;
#endif

// Calls act(0) ... act(kNum - 1), which are constants: arrays that they index are registers.
template <typename Act, int... kAt>
GCOMPUTE_INLINE inline void each_of(Act act, std::integer_sequence<int, kAt...>) {
  (act(std::integral_constant<int, kAt>()), ...);
}
template <int kNum, typename Act>
GCOMPUTE_INLINE inline void each(Act act) {
  each_of(act, std::make_integer_sequence<int, kNum>());
}

// Vectors of columns of a tile of so many rows: a whole panel where registers are left to take its words apart in.
constexpr int vectors_of(int rows) { return rows * kVectors < kMostRows * kTileVectors ? kVectors : kTileVectors; }

// float32 numbers.
struct Float32 {
  using Sum = float;
  using Sums = Floats;
  // Words of x that go with a word of the panel.
  static constexpr int kParts = 1;
  // Whether they are words as they lie in memory, several numbers each.
  static constexpr bool kFolded = false;

  template <int kPart>
  static Words part(Words w) { return w; }

  static Sums add(Sums sums, Words w, uint32_t x) { return sums + reinterpret_cast<Floats>(w) * as_float(x); }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using Sum = float;
  using Sums = Floats;
  static constexpr int kParts = 1;
  static constexpr bool kFolded = true;

  template <int kPart>
  static Words part(Words w) { return w; }

  static Sums add(Sums sums, Words w, uint32_t x) {
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(w),
                                                     reinterpret_cast<__m512bh>(_mm512_set1_epi32(x))));
  }
};
#else
struct Bfloat16 : Float32 {
  static constexpr int kParts = 2;

  template <int kPart>
  static Words part(Words w) { return kPart == 0 ? w << 16 : w & 0xffff0000u; }
};
#endif

struct Int8 {
  using Sum = int32_t;
  using Sums = Integers;
#if defined(__AVX512VNNI__)
  static constexpr int kParts = 1;
  static constexpr bool kFolded = true, kOffset = true;

  template <int kPart>
  static Words part(Words w) { return w; }

  static Sums add(Sums sums, Words w, uint32_t x) {
    // The instruction takes x without a sign: 128 is added to each, and `offset` takes it back.
    return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sums), _mm512_set1_epi32(x ^ 0x80808080u), reinterpret_cast<__m512i>(w)));
  }
#else
  static constexpr int kParts = 4;
  static constexpr bool kFolded = false, kOffset = false;

  template <int kPart>
  static Words part(Words w) {
    return reinterpret_cast<Words>(reinterpret_cast<Integers>(w << (24 - 8 * kPart)) >> 24);
  }

  static Sums add(Sums sums, Words w, uint32_t x) {
    return sums + reinterpret_cast<Integers>(w) * static_cast<int32_t>(x);
  }
#endif
};

#if defined(__clang__)
#elif defined(__FMA__)
#define GCOMPUTE_FMA(sums, w, x) asm("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(w), "v"(splat<Words>(x)))
#elif defined(__aarch64__)
#define GCOMPUTE_FMA(sums, w, x) asm("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(sums) : "w"(w), "w"(as_float(x)))
#endif

// The same as Kind::add, in the register of `sums`.
template <typename Kind>
GCOMPUTE_INLINE inline typename Kind::Sums add_in_place(typename Kind::Sums sums, Words w, uint32_t x) {
#if defined(GCOMPUTE_FMA)
  // By itself gcc adds to other registers in turn, runs out of them and keeps some sums in memory.
  if constexpr (std::is_base_of_v<Float32, Kind>) {
    GCOMPUTE_FMA(sums, w, x);
    return sums;
  }
#endif
  return Kind::add(sums, w, x);
}

template <typename Kind>
constexpr bool has_offset() {
  if constexpr (std::is_same_v<Kind, Int8>) return Int8::kOffset;
  return false;
}

// Rows of x: word `at` of row r lies at words[r * stride + at]; or, where the rows of a tile lie side by side, at
// words[at * number of rows + r].
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

// y = or, if `adds`, += kRows rows times `width` columns of one panel.
template <typename Kind, bool kFetches, bool kSideBySide, int kRows>
void tile(Rows x, const uint32_t* panel, int64_t num_words, typename Kind::Sum* y, int64_t stride, int64_t width,
          bool adds, Ahead ahead) {
  using Sums = typename Kind::Sums;
  constexpr int kParts = Kind::kParts, kVectors = vectors_of(kRows), kColumns = kVectors * kLanes;
  Sums sums[kRows][kVectors], offset[kVectors];
  typename Kind::Sum line[kColumns] = {};
  const bool whole = width == kColumns;
  // By the time the sums are there, so are the lines that they go to: stores wait for theirs one after another.
  if constexpr (kFetches)
    for (int row = 0; row < kRows; row++)
      for (int64_t i = 0; i < width; i += kLanes) __builtin_prefetch(y + row * stride + i, 1);
  each<kVectors>([&](auto v) GCOMPUTE_INLINE { offset[v] = Sums{}; });
  each<kRows>([&](auto row) GCOMPUTE_INLINE {
    if (adds && !whole) std::copy_n(y + row * stride, width, line);
    each<kVectors>([&](auto v) GCOMPUTE_INLINE {
      sums[row][v] = adds ? load<Sums>((whole ? y + row * stride : line) + v * kLanes) : Sums{};
    });
  });
  // The loop over words has no registers left to fetch with.
  for (int64_t word = 0, end; word < num_words; word = end) {
    end = kFetches ? std::min(num_words, word + kTogether) : num_words;
    if constexpr (kFetches) {
      for (int64_t line = 0; line < ahead.lines; line++, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 1);
      if (ahead.later) ahead.later->fetch_some();
    }
    for (int64_t at = word; at < end; at++, panel += kPanel) {
      if constexpr (has_offset<Kind>())
        // 128 times the sum of the weights: of a row of zeros, to which 128 is added as to any.
        each<kVectors>([&](auto v) GCOMPUTE_INLINE {
          offset[v] = Kind::add(offset[v], load<Words>(panel + v * kLanes), 0);
        });
      each<kParts>([&](auto part) GCOMPUTE_INLINE {
        Words w[kVectors];
        each<kVectors>([&](auto v) GCOMPUTE_INLINE {
          w[v] = Kind::template part<part>(load<Words>(panel + v * kLanes));
        });
        each<kRows>([&](auto row) GCOMPUTE_INLINE {
          const int64_t number = at * kParts + part;
          const uint32_t of_x = x.words[kSideBySide ? number * kRows + row : row * x.stride + number];
          each<kVectors>([&](auto v) GCOMPUTE_INLINE {
            sums[row][v] = add_in_place<Kind>(sums[row][v], w[v], of_x);
          });
        });
      });
    }
  }
  each<kRows>([&](auto row) GCOMPUTE_INLINE {
    each<kVectors>([&](auto v) GCOMPUTE_INLINE {
      const Sums total = sums[row][v] - offset[v];
      __builtin_memcpy((whole ? y + row * stride : line) + v * kLanes, &total, sizeof(total));
    });
    if (!whole) std::copy_n(line, width, y + row * stride);
  });
}

// kMostRows rows at most times `width` columns of a panel, some of them after others.
template <typename Kind, bool kFetches = false, bool kSideBySide = false, int kRows = kMostRows>
void multiply(int64_t rows, Rows x, const uint32_t* panel, int64_t num_words, typename Kind::Sum* y, int64_t stride,
              bool adds = false, int64_t width = kPanel, Ahead ahead = {}) {
  if constexpr (kRows > 0) {
    if (rows != kRows)
      return multiply<Kind, kFetches, kSideBySide, kRows - 1>(rows, x, panel, num_words, y, stride, adds, width, ahead);
    constexpr int64_t kColumns = vectors_of(kRows) * kLanes;
    for (int64_t at = 0; at < width; at += kColumns) {
      tile<Kind, kFetches, kSideBySide, kRows>(x, panel + at, num_words, y + at, stride, std::min(width - at, kColumns),
                                               adds, ahead);
      ahead.from += ahead.lines * 64 * (num_words / kTogether);
    }
  }
}

}  // namespace
