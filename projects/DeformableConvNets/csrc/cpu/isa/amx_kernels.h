// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The inner loops of deform_conv2d for bfloat16 on processors that have matrix tiles (AMX).
//
// A tile is 16 rows of 64 bytes. A product's left factor is cut into blocks of 32 columns: a block has 32 values of
// every row, so that 16 rows of it are a tile. Its right factor is cut into panels of two tiles' width, and a tile of
// it has pairs: row r, pair n are rows 2 r and 2 r + 1 of column n. Sums are float32.
#pragma once

#include <cstdint>

#include "cpu/isa/kernels.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define DCN_WITH_AMX
#endif

namespace dcn::cpu {

using Bfloat16 = uint16_t;  // its bits: the upper half of a float's

constexpr int64_t kTileRows = 16;      // of all factors and of the product, and columns of the product
constexpr int64_t kBlockColumns = 32;  // columns of the left factor's tile, rows of the right factor's
constexpr int64_t kTileValues = kTileRows * kBlockColumns;

// The channels of an image that a pass works on.
struct Bfloat16Channels {
  const Bfloat16* image;
  int64_t stride, channels;
  const Bfloat16* zeros;  // at least `channels` zeros, read in place of neighbours outside
};

// c = or += a @ b.
struct AmxProduct {
  const Bfloat16* a;
  int64_t a_block;  // values from one block to the next
  int64_t blocks;
  const Bfloat16* b;
  int64_t b_panel;  // values from one panel of two tiles to the next; the last one may have one tile only
  int64_t b_first;  // the block of b that belongs to a's first one
  float* c;
  int64_t c_row;
  int64_t row_tiles, column_tiles;
  bool accumulate;
};

// What the backward pass does with the gradient columns of one tap. A row of gradients has, for every block of
// channels, the 16 even ones and then the 16 odd ones.
struct Bfloat16Backward {
  const float* gradient;  // of sample p: at p * gradient_row. Null if neither pixels nor offsets want gradients
  int64_t gradient_row;
  float* grad_image;  // of pixel i: at i * grad_stride. Null if not wanted
  int64_t grad_stride;
  float* trash;     // written in place of neighbours outside, finite
  float* dots[4];   // dots[k][p] = <gradient column p, neighbour k of sample p>. dots[0] is null if not wanted
  Bfloat16* right;  // the samples as a right factor whose rows are positions. Null if not wanted
  int64_t panel;    // values from one block of channels to the next
};

struct AmxKernels {
  // A thread that multiplies has its tiles set up before and given back afterwards.
  void (*begin)();
  void (*end)();

  void (*multiply)(const AmxProduct& product);

  // Sample p of block b is written to columns + b * block_stride + p * kBlockColumns; what lacks to a whole block is
  // zeros.
  void (*gather)(const Bfloat16Channels& from, const TapSamples<float>& samples, Bfloat16* columns,
                 int64_t block_stride);

  // Adds each gradient column to the pixels that it was read from, forms the dots, and gathers. Even positions are
  // written before odd ones, which share pairs with them; what lacks to a whole pair is zeros.
  void (*backward)(const Bfloat16Channels& from, const TapSamples<float>& samples, const Bfloat16Backward& pass);

  // to[r * to_row + c] = from[r * from_row + c] + bias[c], rounded. `bias` may be null.
  void (*round_rows)(const float* from, int64_t from_row, const float* bias, int64_t rows, int64_t columns,
                     Bfloat16* to, int64_t to_row);

  // to[c * to_stride + r] = from[r * from_stride + c].
  void (*transpose)(const Bfloat16* from, int64_t from_stride, int64_t rows, int64_t columns, Bfloat16* to,
                    int64_t to_stride);

  // Forms `tiles` tiles of a right factor from its kBlockColumns rows of tiles * kTileRows values.
  void (*pack_right)(const Bfloat16* const* rows, int64_t tiles, Bfloat16* to);

  // Transposes a square of kTileRows pairs; rows of `to` lie side by side.
  void (*transpose_pairs)(const Bfloat16* from, int64_t from_stride, Bfloat16* to);

  // Rounds a row of gradients in the order of Bfloat16Backward to `channels` channels in theirs.
  void (*round_gradients)(const float* from, int64_t channels, Bfloat16* to);
};

// Null where the processor has no matrix tiles, or DCN_CPU_CAPABILITY forbids them.
const AmxKernels* amx_kernels();

#if defined(DCN_WITH_AMX)
namespace amx {
extern const AmxKernels kernels;
}
#endif

}  // namespace dcn::cpu
