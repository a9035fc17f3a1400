// Products with the cells of a block for the few rows of a single query: nothing is packed into panels, but taken out
// of the cells in registers. Every sum runs in the order that it has with panels, so that its bits are the same.

#pragma once

#include "cells.h"

namespace {

// Rows at most: more have panels.
constexpr int kFewRows = 4;

// scores[row][cell] = q[row] . keys[cell] for the kBlock cells of a block; `num_words` of a key, whole vectors.
template <typename Kind, int kRows, typename Fetch>
void score(Rows q, const Operands& keys, int64_t head, int64_t num_words, float* scores, int64_t stride, Fetch& fetch) {
  for (int64_t cell = 0; cell < kBlock; cell += kLanes) {
    typename Kind::Sums sums[kRows] = {};
    for (int64_t word = 0; word < num_words; word += kLanes) {
      Words columns[kLanes];
      for (int lane = 0; lane < kLanes; lane++)
        columns[lane] = load<Words>(keys.cells[cell + lane] + head * keys.stride + word);
      fetch(kLanes);
      transpose(columns);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; lane++)
        for (int row = 0; row < kRows; row++)
          sums[row] = Kind::add(sums[row], columns[lane], q.words[row * q.stride + word + lane]);
    }
    for (int row = 0; row < kRows; row++) __builtin_memcpy(scores + row * stride + cell, &sums[row], sizeof(Floats));
  }
}

// sums[row] += weights[row] . values, in the order of `unpack_sums`, for kVectors vectors of each cell's words.
template <typename Kind, int kRows, int kVectors, typename Fetch>
void add_columns(Rows weights, const Operands& values, int64_t from, float* sums, int64_t stride, Fetch& fetch) {
  constexpr int kEach = kNumbers<Kind>, kColumns = kVectors * kEach;
  typename Kind::Sums totals[kRows][kColumns];
  for (int row = 0; row < kRows; row++)
    for (int column = 0; column < kColumns; column++)
      totals[row][column] = load<Floats>(sums + row * stride + column * kLanes);
  for (int64_t word = 0; word < kBlock / kEach; word++) {
    if (word % 4 == 0) fetch(kColumns * 4 * kLanes / 16);
    Words columns[kColumns];
    for (int vector = 0; vector < kVectors; vector++) {
      const auto of_cell = [&](int64_t cell) { return load<Words>(values.cells[cell] + from + vector * kLanes); };
      const Words first = of_cell(word * kEach);
      if constexpr (kEach == 1) {
        columns[vector] = first;
      } else {
        const Words second = of_cell(word * kEach + 1);
        columns[2 * vector] = (first & 0xffffu) | (second << 16);
        columns[2 * vector + 1] = (first >> 16) | (second & 0xffff0000u);
      }
    }
    for (int row = 0; row < kRows; row++)
      for (int column = 0; column < kColumns; column++)
        totals[row][column] =
            Kind::add(totals[row][column], columns[column], weights.words[row * weights.stride + word]);
  }
  for (int row = 0; row < kRows; row++)
    for (int column = 0; column < kColumns; column++)
      __builtin_memcpy(sums + row * stride + column * kLanes, &totals[row][column], sizeof(Floats));
}

// The same for all the words of a value: whole vectors.
template <typename Kind, int kRows, typename Fetch>
void add_values(Rows weights, const Operands& values, int64_t head, float* sums, int64_t stride, Fetch& fetch) {
  int64_t at = 0;
  for (; at + 2 * kLanes <= values.stride; at += 2 * kLanes)
    add_columns<Kind, kRows, 2>(weights, values, head * values.stride + at, sums + at * kNumbers<Kind>, stride, fetch);
  if (at < values.stride)
    add_columns<Kind, kRows, 1>(weights, values, head * values.stride + at, sums + at * kNumbers<Kind>, stride, fetch);
}

// Calls act(number of rows, as a constant).
template <int kRows = kFewRows, typename Act>
void with_rows(int64_t rows, Act act) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return act(std::integral_constant<int, kRows>());
    with_rows<kRows - 1>(rows, act);
  }
}

}  // namespace
