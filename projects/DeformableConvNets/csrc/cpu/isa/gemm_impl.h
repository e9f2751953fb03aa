// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Matrix products of a tile, for all_impl.h. The right factor is packed into panels of a few vectors' width, so
// that a cache block of it stays in the first-level cache while all rows of the left factor go past it.

#include "cpu/isa/vectors_impl.h"

namespace dcn::cpu::DCN_ISA {
namespace {

// Rows of the left factor that a micro-kernel holds in registers: with 4 vectors of columns, they and the factors fill
// the register file of the instruction set.
constexpr int kRows = DCN_ROWS;

// What a micro-kernel fetches for those after it: `next` moves on by `step` values with every row of b.
template <typename T>
struct Ahead {
  const T* next;
  int64_t step;
};

// c (kR x kV vectors) = or += a @ b. a(i, chunk * depth + k) is a[i * a_row + chunk * a_chunk + k], or
// a[k * a_row + i] where kTransposed (one chunk only); b's rows are kV vectors long, one after the other. b comes from
// the second-level cache, early enough; c is fetched while the sums are formed.
template <typename T, int kR, int kV, bool kTransposed>
[[gnu::always_inline]] inline void micro_kernel(const T* a, int64_t a_row, int64_t a_chunk, int64_t chunks,
                                                int64_t depth, const T* b, T* c, int64_t c_row, bool accumulate,
                                                Ahead<T> ahead) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr int64_t kLine = 64 / sizeof(T);  // values of a cache line
  Vector<T> sum[kR][kV] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kV * lanes; j += kLine) __builtin_prefetch(c + i * c_row + j, 1);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk, a += a_chunk) {
    for (int64_t k = 0; k < depth; ++k, b += kV * lanes, ahead.next += ahead.step) {
      Vector<T> right[kV];
#pragma GCC unroll 4
      for (int j = 0; j < kV; ++j) right[j] = load(b + j * lanes);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kV * lanes; j += kLine) __builtin_prefetch(b + 8 * kV * lanes + j);
      __builtin_prefetch(ahead.next, 0, 2);
#pragma GCC unroll 16
      for (int i = 0; i < kR; ++i) {
        const T left = kTransposed ? a[k * a_row + i] : a[i * a_row + k];
#pragma GCC unroll 4
        for (int j = 0; j < kV; ++j) sum[i][j] += left * right[j];
      }
    }
  }
  if (accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kV; ++j) sum[i][j] += load(c + i * c_row + j * lanes);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kV; ++j) store(c + i * c_row + j * lanes, sum[i][j]);
  }
}

// As micro_kernel, for up to kRows rows and some of the panel's columns.
template <typename T, int kV, bool kTransposed>
void edge_kernel(const T* a, int64_t a_row, int64_t a_chunk, int64_t chunks, int64_t depth, const T* b, T* c,
                 int64_t c_row, bool accumulate, Ahead<T> ahead, int64_t rows, int64_t columns) {
  constexpr int64_t width = kV * kLanes<T>;
  T sums[kRows * width];
  if (rows == kRows) {
    micro_kernel<T, kRows, kV, kTransposed>(a, a_row, a_chunk, chunks, depth, b, sums, width, false, ahead);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      micro_kernel<T, 1, kV, kTransposed>(kTransposed ? a + i : a + i * a_row, a_row, a_chunk, chunks, depth, b,
                                          sums + i * width, width, false, ahead);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      c[i * c_row + j] = accumulate ? c[i * c_row + j] + sums[i * width + j] : sums[i * width + j];
    }
  }
}

template <typename T, int kV, bool kTransposed>
void multiply_panels(const TileProduct<T>& p) {
  constexpr int64_t width = kV * kLanes<T>;
  // Rows of a panel that are used at a time, a cache block. This one and the next take a fraction of the second-level
  // cache. More rows would not fit there; with fewer, sums would be added to c more often.
  constexpr int64_t kCacheBlockRows = (int64_t{160} << 10) / (width * int64_t{sizeof(T)});
  const int64_t chunks_at_once = std::max<int64_t>(kCacheBlockRows / p.depth, 1);
  const int64_t depth_at_once = std::min(p.depth, kCacheBlockRows);
  const int64_t micro_rows = (p.rows + kRows - 1) / kRows;
  const int64_t step = (width + micro_rows - 1) / micro_rows;
  for (int64_t chunk = 0; chunk < p.chunks; chunk += chunks_at_once) {
    const int64_t chunks = std::min(chunks_at_once, p.chunks - chunk);
    for (int64_t k = 0; k < p.depth; k += depth_at_once) {
      const int64_t depth = std::min(depth_at_once, p.depth - k);
      const bool accumulate = p.accumulate || chunk > 0 || k > 0;
      const T* a = p.a + (kTransposed ? k * p.a_row : chunk * p.a_chunk + k);
      const T* b = p.b + (chunk * p.depth + k) * width;
      for (int64_t column = 0; column < p.columns; column += width, b += p.b_panel) {
        const int64_t columns = std::min(width, p.columns - column);
        // The cache block that follows: of the next panel, or else further down in the first one.
        const T* next =
            column + width < p.columns ? b + p.b_panel : p.b + (chunk * p.depth + k + chunks * depth) * width;
        for (int64_t row = 0; row < p.rows; row += kRows, next += chunks * depth * step) {
          const T* left = kTransposed ? a + row : a + row * p.a_row;
          T* c = p.c + row * p.c_row + column;
          if (columns == width && p.rows - row >= kRows) {
            micro_kernel<T, kRows, kV, kTransposed>(left, p.a_row, p.a_chunk, chunks, depth, b, c, p.c_row, accumulate,
                                                    {next, step});
          } else {
            edge_kernel<T, kV, kTransposed>(left, p.a_row, p.a_chunk, chunks, depth, b, c, p.c_row, accumulate,
                                            {next, step}, std::min<int64_t>(kRows, p.rows - row), columns);
          }
        }
      }
    }
  }
}

template <typename T>
void multiply(const TileProduct<T>& p) {
  if (p.transposed) {
    if (p.panel_vectors == 4) return multiply_panels<T, 4, true>(p);
    if (p.panel_vectors == 2) return multiply_panels<T, 2, true>(p);
    return multiply_panels<T, 1, true>(p);
  }
  if (p.panel_vectors == 4) return multiply_panels<T, 4, false>(p);
  if (p.panel_vectors == 2) return multiply_panels<T, 2, false>(p);
  return multiply_panels<T, 1, false>(p);
}

}  // namespace
}  // namespace dcn::cpu::DCN_ISA
