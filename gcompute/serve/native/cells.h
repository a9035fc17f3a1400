// Cells of one row of requests as the words that products take, wherever they lie and whatever they are kept as.

#pragma once

#include <cstring>
#include <type_traits>

#include "panels.h"

namespace {

using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
using Bytes = int8_t __attribute__((vector_size(kLanes)));

inline int64_t rounded_up(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

// The nearest bfloat16, as its bits.
inline Halves bfloat16_bits(Floats numbers) {
  const Words bits = reinterpret_cast<Words>(numbers);
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}

// The first numbers as float32; zeros where fewer than kLanes are left.
template <typename Number>
inline Floats floats_of(const Number* from, int64_t left) {
  using Vector = std::conditional_t<sizeof(Number) == 4, Floats, std::conditional_t<sizeof(Number) == 2, Halves, Bytes>>;
  Vector numbers = {};
  if (left >= kLanes)
    numbers = load<Vector>(from);
  else if (left > 0)
    std::memcpy(&numbers, from, left * sizeof(Number));
  if constexpr (sizeof(Number) == 2)
    return reinterpret_cast<Floats>(__builtin_convertvector(numbers, Words) << 16);
  else
    return __builtin_convertvector(numbers, Floats);
}

// kLanes words of a cell from number `i` on, of float32, bfloat16's bits or int8 with a scale; zeros past its end, unless
// it is known that there are as many.
template <typename Kind, bool kWhole, typename Number>
inline Words words_of(const Number* cell, int64_t i, int64_t size, float scale) {
  const auto floats = [&](int64_t from) {
    const Floats numbers = floats_of(cell + from, kWhole ? kLanes : size - from);
    return sizeof(Number) == 1 ? numbers * scale : numbers;
  };
  if constexpr (std::is_same_v<Kind, Float32>) {
    return reinterpret_cast<Words>(floats(i));
  } else if constexpr (sizeof(Number) == 2) {
    if (kWhole || i + 2 * kLanes <= size) return load<Words>(cell + i);
    Words words = {};
    if (i < size) std::memcpy(&words, cell + i, (size - i) * sizeof(Number));
    return words;
  } else {
    const Halves halves[2] = {bfloat16_bits(floats(i)), bfloat16_bits(floats(i + kLanes))};
    return load<Words>(halves);
  }
}

template <typename Kind>
constexpr int kNumbers = std::is_same_v<Kind, Float32> ? 1 : 2;

// A cell's numbers as `num_words` words.
template <typename Kind, typename Number>
inline void copy_cell(const Number* cell, int64_t size, float scale, int64_t num_words, uint32_t* to) {
  const auto copy = [=](auto whole) {
    for (int64_t word = 0; word < num_words; word += kLanes) {
      const Words words = words_of<Kind, whole>(cell, word * kNumbers<Kind>, size, scale);
      __builtin_memcpy(to + word, &words, sizeof(words));
    }
  };
  if (size == num_words * kNumbers<Kind>)
    copy(std::true_type());
  else
    copy(std::false_type());
}

// [P, S, K, H], and [P, S, K] of int8's scales.
struct Pages {
  const void* cells;
  const float* scales;
  ffi::DataType dtype;
  int64_t num_pages, page, heads, size;

  int64_t number_bytes() const { return dtype == ffi::F32 ? 4 : dtype == ffi::S8 ? 1 : 2; }
};

// Some heads of a row's cells: the first `start` lie in pages that a table names, those from there on in [K, C, H].
struct RowOfCells {
  Pages pages;
  const int32_t* table;
  int64_t start, num_new;
  const float* new_cells;
  int64_t first_head, end_head;
};

// At most kBlock cells of a row that follow each other.
constexpr int kBlock = 32;
struct Block {
  RowOfCells row;
  int64_t first, num = 0, num_old = 0;
  const char* old_cells[kBlock];
  const float* scales[kBlock];

  Block() = default;

  Block(const RowOfCells& row, int64_t first, int64_t num)
      : row(row), first(first), num(num), num_old(std::clamp<int64_t>(row.start - first, 0, num)) {
    const Pages& pages = row.pages;
    const int64_t head_bytes = pages.size * pages.number_bytes();
    for (int64_t cell = 0; cell < num_old;) {
      const int64_t inside = (first + cell) % pages.page, end = std::min(num_old, cell + pages.page - inside);
      const int64_t entry = std::clamp<int64_t>(row.table[(first + cell) / pages.page], 0, pages.num_pages - 1);
      for (int64_t at = entry * pages.page + inside; cell < end; cell++, at++) {
        old_cells[cell] = static_cast<const char*>(pages.cells) + (at * pages.heads + row.first_head) * head_bytes;
        scales[cell] = pages.scales + at * pages.heads + row.first_head;
      }
    }
  }

  int64_t cell_bytes() const { return (row.end_head - row.first_head) * row.pages.size * row.pages.number_bytes(); }
};

// Tells the processor to fetch what a block has in pages, a line at a time, in the order of memory.
struct Fetching {
  const Block& block;
  const int64_t cell_bytes = block.cell_bytes();
  int64_t cell = 0;
  const char *line = block.old_cells[0], *end = line + cell_bytes;

  void operator()() {
    if (cell >= block.num_old) return;
    __builtin_prefetch(line);
    line += 64;
    if (line < end) return;
    cell++;
    line = block.old_cells[std::min<int64_t>(cell, kBlock - 1)];
    end = line + cell_bytes;
  }
};

// Copies a block as [heads, kBlock, stride] words; zeros past a cell's numbers and where there is no cell.
template <typename Kind, typename Number>
void stage_of(const Block& block, int64_t stride, uint32_t* to) {
  const RowOfCells& row = block.row;
  const int64_t size = row.pages.size, heads = row.end_head - row.first_head;
  for (int64_t cell = 0; cell < block.num_old; cell++)
    for (int64_t head = 0; head < heads; head++)
      copy_cell<Kind>(reinterpret_cast<const Number*>(block.old_cells[cell]) + head * size, size,
                      sizeof(Number) == 1 ? block.scales[cell][head] : 1.0f, stride, to + (head * kBlock + cell) * stride);
  for (int64_t head = 0; head < heads; head++) {
    const float* cells = row.new_cells + ((row.first_head + head) * row.num_new + block.first - row.start) * size;
    for (int64_t cell = block.num_old; cell < block.num; cell++)
      copy_cell<Kind>(cells + cell * size, size, 1.0f, stride, to + (head * kBlock + cell) * stride);
    std::fill(to + (head * kBlock + block.num) * stride, to + (head + 1) * kBlock * stride, 0);
  }
}

template <typename Kind>
void stage(const Block& block, int64_t stride, uint32_t* to) {
  switch (block.row.pages.dtype) {
    case ffi::F32: return stage_of<Kind, float>(block, stride, to);
    case ffi::S8: return stage_of<Kind, int8_t>(block, stride, to);
    default: return stage_of<Kind, uint16_t>(block, stride, to);
  }
}

#if defined(__clang__)
#define GCOMPUTE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GCOMPUTE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// Swaps the blocks of kWidth lanes that lie across the diagonal of two vectors.
template <int kWidth, size_t... kLane>
inline void swap_across(Words& a, Words& b, std::index_sequence<kLane...>) {
  const Words first = GCOMPUTE_SHUFFLE(a, b, (kLane & kWidth ? kLanes + kLane - kWidth : kLane)...);
  b = GCOMPUTE_SHUFFLE(a, b, (kLane & kWidth ? kLanes + kLane : kLane + kWidth)...);
  a = first;
}

// Turns rows into columns.
template <int kWidth = kLanes / 2>
inline void transpose(Words* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++)
    if (!(i & kWidth)) swap_across<kWidth>(rows[i], rows[i + kWidth], std::make_index_sequence<kLanes>());
  if constexpr (kWidth > 1) transpose<kWidth / 2>(rows);
}

// One head's staged keys as a panel with a column a cell: [stride, kPanel]. Calls between() for every vector.
template <typename Between>
void pack_keys(const uint32_t* cells, int64_t stride, uint32_t* panel, Between& between) {
  static_assert(kBlock == kPanel);
  for (int64_t cell = 0; cell < kBlock; cell += kLanes)
    for (int64_t word = 0; word < stride; word += kLanes) {
      Words rows[kLanes];
      for (int lane = 0; lane < kLanes; lane++) rows[lane] = load<Words>(cells + (cell + lane) * stride + word);
      transpose(rows);
      for (int lane = 0; lane < kLanes; lane++) {
        __builtin_memcpy(panel + (word + lane) * kPanel + cell, &rows[lane], sizeof(Words));
        between();
      }
    }
}

// One head's staged values as panels with a column a number: [H / kPanel, kBlock / kNumbers, kPanel]. A word of bfloat16
// holds the same number of two cells, first those of even numbers: `unpack_sums` puts them in order.
template <typename Kind, typename Between>
void pack_values(const uint32_t* cells, int64_t stride, uint32_t* panels, Between& between) {
  constexpr int64_t kWords = kBlock / kNumbers<Kind>;
  for (int64_t word = 0; word < kWords; word++)
    for (int64_t at = 0; at < stride; at += kLanes) {
      const int64_t column = at * kNumbers<Kind>;
      uint32_t* to = panels + (column / kPanel * kWords + word) * kPanel + column % kPanel;
      const uint32_t* from = cells + word * kNumbers<Kind> * stride + at;
      const Words first = load<Words>(from);
      if constexpr (std::is_same_v<Kind, Float32>) {
        __builtin_memcpy(to, &first, sizeof(Words));
      } else {
        const Words second = load<Words>(from + stride);
        const Words even = (first & 0xffffu) | (second << 16), odd = (first >> 16) | (second & 0xffff0000u);
        __builtin_memcpy(to, &even, sizeof(Words));
        __builtin_memcpy(to + kLanes, &odd, sizeof(Words));
        between();
      }
      between();
    }
}

// Writes the sums of a head's panels in the order of its numbers.
template <typename Kind>
inline void unpack_sums(const float* sums, int64_t size, float* out) {
  if constexpr (std::is_same_v<Kind, Float32>) {
    std::copy(sums, sums + size, out);
  } else {
    for (int64_t first = 0; first < size; first += 2 * kLanes)
      for (int i = 0, num = std::min<int64_t>(size - first, 2 * kLanes); i < num; i++)
        out[first + i] = sums[first + (i & 1) * kLanes + (i >> 1)];
  }
}

}  // namespace
