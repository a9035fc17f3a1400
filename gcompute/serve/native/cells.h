// Cells of one row of requests as the words that products take, wherever they lie and whatever they are kept as.

#pragma once

#include <cstring>

#include "panels.h"

namespace {

using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
using Bytes = int8_t __attribute__((vector_size(kLanes)));

inline int64_t rounded_up(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

// The nearest bfloat16, as float32.
inline Floats rounded(Floats numbers) {
  const Words bits = reinterpret_cast<Words>(numbers);
  return reinterpret_cast<Floats>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// The same, as its bits.
inline Halves bfloat16_bits(Floats numbers) {
  return __builtin_convertvector(reinterpret_cast<Words>(rounded(numbers)) >> 16, Halves);
}

// float32 numbers that are bfloat16's: what attention multiplies where the processor has no dot products of those.
struct Rounded : Float32 {};
using Narrow = std::conditional_t<Bfloat16::kFolded, Bfloat16, Rounded>;

template <typename Kind>
constexpr int kNumbers = std::is_same_v<Kind, Bfloat16> ? 2 : 1;

// The first numbers as float32; zeros where fewer than kLanes are left.
template <typename Number>
inline Floats floats_of(const Number* from, int64_t left) {
  using Narrow = std::conditional_t<sizeof(Number) == 2, Halves, Bytes>;
  using Vector = std::conditional_t<sizeof(Number) == 4, Floats, Narrow>;
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

// The first `left` numbers, or all of them, rounded to bfloat16's bits where those are wanted.
template <typename Number>
inline void store_some(Floats numbers, int64_t left, Number* to) {
  const auto store = [&](const auto& vector) {
    if (left >= kLanes)
      __builtin_memcpy(to, &vector, kLanes * sizeof(Number));
    else
      std::memcpy(to, &vector, left * sizeof(Number));
  };
  if constexpr (sizeof(Number) == 2)
    store(bfloat16_bits(numbers));
  else
    store(numbers);
}

// kLanes words of a cell from number `i` on, of float32, bfloat16's bits or int8 with a scale; zeros past its end, for
// which there is no need to look where kWhole says so.
template <typename Kind, bool kWhole, typename Number>
inline Words words_of(const Number* cell, int64_t i, int64_t size, float scale) {
  const auto floats = [&](int64_t from) {
    const Floats numbers = floats_of(cell + from, kWhole ? kLanes : size - from);
    return sizeof(Number) == 1 ? numbers * scale : numbers;
  };
  if constexpr (kNumbers<Kind> == 1) {
    return reinterpret_cast<Words>(std::is_same_v<Kind, Rounded> && sizeof(Number) != 2 ? rounded(floats(i)) : floats(i));
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

// Some heads of a row's cells, which lie in the pages that a table names.
struct RowOfCells {
  Pages pages;
  const int32_t* table;
  int64_t first_head, end_head;
};

// At most kBlock cells of a row that follow each other.
constexpr int kBlock = 32;
struct Block {
  RowOfCells row = {};
  int64_t num = 0;
  const char* cells[kBlock];
  const float* scales[kBlock];

  Block() = default;

  Block(const RowOfCells& row, int64_t first, int64_t num)
      : row(row), num(num) {
    const Pages& pages = row.pages;
    const int64_t head_bytes = pages.size * pages.number_bytes();
    for (int64_t cell = 0; cell < num;) {
      const int64_t inside = (first + cell) % pages.page, end = std::min(num, cell + pages.page - inside);
      const int64_t entry = std::clamp<int64_t>(row.table[(first + cell) / pages.page], 0, pages.num_pages - 1);
      for (int64_t at = entry * pages.page + inside; cell < end; cell++, at++) {
        cells[cell] = static_cast<const char*>(pages.cells) + (at * pages.heads + row.first_head) * head_bytes;
        if (pages.dtype == ffi::S8) scales[cell] = pages.scales + at * pages.heads + row.first_head;
      }
    }
  }

  int64_t heads() const { return row.end_head - row.first_head; }
};

// Tells the processor to fetch what a block has, in the order of memory: into the second cache, for the first
// has no room for it beside what is worked on.
struct Fetching {
  const Block& block;
  const int64_t cell_bytes = block.heads() * block.row.pages.size * block.row.pages.number_bytes();
  int64_t cell = 0, byte = 0;

  void operator()(int num_lines) {
    int64_t at = cell, offset = byte;
    for (; num_lines > 0 && at < block.num; num_lines--) {
      __builtin_prefetch(block.cells[at] + offset, 0, 1);
      offset += 64;
      if (offset >= cell_bytes) offset = 0, at++;
    }
    cell = at, byte = offset;
  }
};

// A block's cells as words: `cells` are where they begin, and `stride` words lie from head to head, of which those past
// a head's numbers are zero. Cells that there are not are zero.
struct Operands {
  const uint32_t* cells[kBlock];
  int64_t stride;
};

// Cells that are not words already are copied to `to`, [kBlock + 1, heads, stride].
template <typename Kind, typename Number>
Operands operands_of(const Block& block, int64_t stride, uint32_t* to) {
  const int64_t size = block.row.pages.size, heads = block.heads();
  constexpr bool kSame = !std::is_same_v<Number, int8_t> && sizeof(Number) * kNumbers<Kind> == sizeof(uint32_t) &&
                         !std::is_same_v<Kind, Rounded>;
  Operands found{{}, stride};
  for (int64_t cell = 0; cell < block.num; cell++) {
    const Number* from = reinterpret_cast<const Number*>(block.cells[cell]);
    uint32_t* copy = to + cell * heads * stride;
    found.cells[cell] = copy;
    if (kSame && size == stride * kNumbers<Kind>) {
      found.cells[cell] = reinterpret_cast<const uint32_t*>(from);
      continue;
    }
    for (int64_t head = 0; head < heads; head++)
      copy_cell<Kind>(from + head * size, size, sizeof(Number) == 1 ? block.scales[cell][head] : 1.0f, stride,
                      copy + head * stride);
  }
  uint32_t* zeros = to + kBlock * heads * stride;
  if (block.num < kBlock) std::fill(zeros, zeros + heads * stride, 0);
  std::fill(found.cells + block.num, found.cells + kBlock, zeros);
  return found;
}

template <typename Kind>
Operands operands_of(const Block& block, int64_t stride, uint32_t* to) {
  switch (block.row.pages.dtype) {
    case ffi::F32: return operands_of<Kind, float>(block, stride, to);
    case ffi::S8: return operands_of<Kind, int8_t>(block, stride, to);
    default: return operands_of<Kind, uint16_t>(block, stride, to);
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

// One head's keys as a panel with a column a cell: [stride, kPanel]. Calls fetch(lines) now and then.
template <typename Fetch>
void pack_keys(const Operands& keys, int64_t head, uint32_t* panel, Fetch& fetch) {
  static_assert(kBlock == kPanel);
  for (int64_t cell = 0; cell < kBlock; cell += kLanes)
    for (int64_t word = 0; word < keys.stride; word += kLanes) {
      Words rows[kLanes];
      for (int lane = 0; lane < kLanes; lane++)
        rows[lane] = load<Words>(keys.cells[cell + lane] + head * keys.stride + word);
      fetch(kLanes);
      transpose(rows);
      for (int lane = 0; lane < kLanes; lane++)
        __builtin_memcpy(panel + (word + lane) * kPanel + cell, &rows[lane], sizeof(Words));
    }
}

// One head's values as panels with a column a number: [H / kPanel, kBlock / kNumbers, kPanel]. A word of bfloat16 holds
// the same number of two cells, first those of even numbers: `unpack_sums` puts them in order.
template <typename Kind, typename Fetch>
void pack_values(const Operands& values, int64_t head, uint32_t* panels, Fetch& fetch) {
  constexpr int64_t kWords = kBlock / kNumbers<Kind>;
  for (int64_t word = 0; word < kWords; word++) {
    if (word % 4 == 0) fetch(4 * kPanel / kLanes * kNumbers<Kind>);
    for (int64_t at = 0; at < values.stride; at += kLanes) {
      const int64_t column = at * kNumbers<Kind>, from = head * values.stride + at;
      uint32_t* to = panels + (column / kPanel * kWords + word) * kPanel + column % kPanel;
      const Words first = load<Words>(values.cells[word * kNumbers<Kind>] + from);
      if constexpr (kNumbers<Kind> == 1) {
        __builtin_memcpy(to, &first, sizeof(Words));
      } else {
        const Words second = load<Words>(values.cells[word * 2 + 1] + from);
        const Words even = (first & 0xffffu) | (second << 16), odd = (first >> 16) | (second & 0xffff0000u);
        __builtin_memcpy(to, &even, sizeof(Words));
        __builtin_memcpy(to + kLanes, &odd, sizeof(Words));
      }
    }
  }
}

// The lanes of a and b in turn, from lane kFirst on.
template <int kFirst, size_t... kLane>
inline Words in_turn(Words a, Words b, std::index_sequence<kLane...>) {
  return GCOMPUTE_SHUFFLE(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes)...);
}

// Writes the sums of a head's panels in the order of its numbers.
template <typename Kind, typename Number>
inline void unpack_sums(const float* sums, int64_t size, Number* out) {
  const auto store = [&](Floats numbers, int64_t at) {
    if (at < size) store_some(numbers, size - at, out + at);
  };
  for (int64_t first = 0; first < size; first += 2 * kLanes) {
    const Words even = load<Words>(sums + first), odd = load<Words>(sums + first + kLanes);
    if constexpr (kNumbers<Kind> == 1) {
      store(reinterpret_cast<Floats>(even), first);
      store(reinterpret_cast<Floats>(odd), first + kLanes);
    } else {
      constexpr auto kAll = std::make_index_sequence<kLanes>();
      store(reinterpret_cast<Floats>(in_turn<0>(even, odd, kAll)), first);
      store(reinterpret_cast<Floats>(in_turn<kLanes / 2>(even, odd, kAll)), first + kLanes);
    }
  }
}

}  // namespace
