// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The inner loops of deform_conv2d for bfloat16 on processors that have register tiles for matrices (AMX).
//
// A register tile is 16 rows of 64 bytes. Both factors of a product are cut into panels of 32 columns. Of the left
// factor, 16 rows of a panel are a register tile. A panel of the right factor is two register tiles wide, and 32 of its
// rows are one register tile high: row r of the tile has 16 pairs, and pair n is column n of the panel's rows 2 r and 2
// r + 1. Sums are float32.
#pragma once

#include <cstdint>

#include "cpu/isa/kernels.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define DCN_WITH_AMX
#endif

namespace dcn::cpu {

using Bfloat16 = uint16_t;  // its bits: the upper half of a float's

constexpr int64_t kRegisterTileRows = 16;  // of all factors and of the product, and columns of the product
constexpr int64_t kPanelColumns = 32;      // of both factors, and rows of the right one that a register tile has
constexpr int64_t kRegisterTileValues = kRegisterTileRows * kPanelColumns;

// The channels of an image that a pass works on.
struct Bfloat16Channels {
  const Bfloat16* image;
  int64_t stride, channels;
  const Bfloat16* zeros;  // at least `channels` zeros, read in place of neighbours outside
};

// c = or += a @ b.
struct AmxProduct {
  const Bfloat16* a;
  int64_t a_panel;  // values from one panel to the next
  int64_t a_panels;
  const Bfloat16* b;
  int64_t b_panel;  // values from one panel to the next; the last one may be one register tile wide
  int64_t b_first;  // which rows of b belong to a's first panel, counted in kPanelColumns
  float* c;
  int64_t c_row;
  int64_t row_tiles, column_tiles;  // register tiles of c
  bool accumulate;
};

// What the backward pass does with the gradient columns of one tap. A row of gradients has, for every panel of
// channels, the 16 even ones and then the 16 odd ones.
struct Bfloat16Backward {
  const float* gradient;  // of sample p: at p * gradient_row. Null if neither pixels nor offsets want gradients
  int64_t gradient_row;
  float* grad_image;  // of pixel i: at i * grad_stride. Null if not wanted
  int64_t grad_stride;
  float* trash;         // written in place of neighbours outside, finite
  float* dots[4];       // dots[k][p] = <gradient column p, neighbour k of sample p>. dots[0] is null if not wanted
  Bfloat16* right;      // the samples as a right factor whose rows are positions. Null if not wanted
  int64_t right_panel;  // values from one panel of channels to the next
};

struct AmxKernels {
  // A thread calls begin before it multiplies, which sets up its register tiles, and end afterwards.
  void (*begin)();
  void (*end)();

  void (*multiply)(const AmxProduct& product);

  // Panel c of sample p is written to columns + c * panel_stride + p * kPanelColumns; a panel that the channels do not
  // fill ends with zeros.
  void (*gather)(const Bfloat16Channels& from, const TapSamples<float>& samples, Bfloat16* columns,
                 int64_t panel_stride);

  // Adds each gradient column to the pixels that it was read from, forms the dots, and gathers. Even positions are
  // written before odd ones, which share pairs with them; after an odd number of positions
  // the last pair ends with a zero.
  void (*backward)(const Bfloat16Channels& from, const TapSamples<float>& samples, const Bfloat16Backward& pass);

  // to[r * to_row + c] = from[r * from_row + c] + bias[c], rounded. `bias` may be null.
  void (*round_rows)(const float* from, int64_t from_row, const float* bias, int64_t rows, int64_t columns,
                     Bfloat16* to, int64_t to_row);

  // to[c * to_stride + r] = from[r * from_stride + c].
  void (*transpose)(const Bfloat16* from, int64_t from_stride, int64_t rows, int64_t columns, Bfloat16* to,
                    int64_t to_stride);

  // Forms `tiles` register tiles of a right factor from its kPanelColumns rows of tiles * kRegisterTileRows values.
  void (*pack_right)(const Bfloat16* const* rows, int64_t tiles, Bfloat16* to);

  // Transposes a square of kRegisterTileRows pairs; rows of `to` lie side by side.
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
