// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Vectors of an instruction set, for the other *_impl.h: loads, stores, sums, and transposition with them.

namespace dcn::cpu::DCN_ISA {
namespace {

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(DCN_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(DCN_VECTOR_BYTES)));
};
template <>
struct VectorOf<uint16_t> {
  typedef uint16_t type __attribute__((vector_size(DCN_VECTOR_BYTES)));
};
template <>
struct VectorOf<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(DCN_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

// As many integers of the same size, which comparisons give: -1 where true.
template <typename T>
using Integers = decltype(Vector<T>{} < Vector<T>{});

template <typename T>
constexpr int64_t kLanes = DCN_VECTOR_BYTES / sizeof(T);

// Memory need not be aligned, hence memcpy, which compiles to one instruction.
template <typename T>
[[gnu::always_inline]] inline Vector<T> load(const T* from) {
  Vector<T> vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <typename T>
[[gnu::always_inline]] inline void store(T* to, const Vector<T>& vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// Lane i of the result is lane i ^ kDistance of a.
template <typename T, int kDistance, size_t... kIndex>
[[gnu::always_inline]] inline Vector<T> exchange(const Vector<T>& a, std::index_sequence<kIndex...>) {
  return __builtin_shufflevector(a, a, (static_cast<int>(kIndex) ^ kDistance)...);
}

// The sum of a vector's values, by halves.
template <typename T, int kHalf = static_cast<int>(kLanes<T>) / 2>
[[gnu::always_inline]] inline T lane_sum(const Vector<T>& vector) {
  if constexpr (kHalf == 0) {
    return vector[0];
  } else {
    return lane_sum<T, kHalf / 2>(vector + exchange<T, kHalf>(vector, std::make_index_sequence<kLanes<T>>()));
  }
}

// Values of a and b alternately: those of their first halves (kHigh 0) or of their second ones (kHigh 1).
template <typename T, int kHigh, size_t... kIndex>
[[gnu::always_inline]] inline Vector<T> interleave(const Vector<T>& a, const Vector<T>& b,
                                                   std::index_sequence<kIndex...>) {
  constexpr int lanes = kLanes<T>;
  return __builtin_shufflevector(a, b, (static_cast<int>(kIndex / 2) + kHigh * lanes / 2 + (kIndex % 2) * lanes)...);
}

// Transposes a square of as many rows as a vector has lanes: every round of interleaving moves one bit of a value's row
// number to its column number. Column i goes to place(i).
template <typename T, typename Place>
[[gnu::always_inline]] inline void transpose_square(const T* from, int64_t from_stride, const Place& place) {
  constexpr int lanes = kLanes<T>;
  constexpr auto indices = std::make_index_sequence<lanes>();
  Vector<T> row[lanes], next[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) row[i] = load(from + i * from_stride);
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave<T, 0>(row[i], row[i + lanes / 2], indices);
      next[2 * i + 1] = interleave<T, 1>(row[i], row[i + lanes / 2], indices);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) row[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) store(place(i), row[i]);
}

#if DCN_VECTOR_BYTES == 64
// Of 16-bit values, first the squares of 8 within the vectors' quarters, then the quarters: that takes instructions
// which move within quarters or whole ones, and no slower ones.
template <int kHigh>
[[gnu::always_inline]] inline Vector<uint16_t> interleave_quarters(const Vector<uint16_t>& a,
                                                                   const Vector<uint16_t>& b) {
  constexpr int h = 4 * kHigh;
  return __builtin_shufflevector(a, b, h, h + 32, h + 1, h + 33, h + 2, h + 34, h + 3, h + 35, h + 8, h + 40, h + 9,
                                 h + 41, h + 10, h + 42, h + 11, h + 43, h + 16, h + 48, h + 17, h + 49, h + 18, h + 50,
                                 h + 19, h + 51, h + 24, h + 56, h + 25, h + 57, h + 26, h + 58, h + 27, h + 59);
}
// Quarters kFirst and kFirst + kStep of a, then those of b.
template <int kFirst, int kStep>
[[gnu::always_inline]] inline Vector<uint16_t> join_quarters(const Vector<uint16_t>& a, const Vector<uint16_t>& b) {
  typedef uint64_t Eighths __attribute__((vector_size(64)));
  constexpr int f = 2 * kFirst, g = 2 * (kFirst + kStep);
  return __builtin_bit_cast(Vector<uint16_t>,
                            __builtin_shufflevector(__builtin_bit_cast(Eighths, a), __builtin_bit_cast(Eighths, b), f,
                                                    f + 1, g, g + 1, f + 8, f + 9, g + 8, g + 9));
}
template <typename Place>
[[gnu::always_inline]] inline void transpose_square(const uint16_t* from, int64_t from_stride, const Place& place) {
  Vector<uint16_t> squares[4][8];  // of 8 rows: row j, quarter q holds their column 8 q + j
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    Vector<uint16_t> row[8], next[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) row[i] = load(from + (8 * g + i) * from_stride);
#pragma GCC unroll 3
    for (int round = 0; round < 3; ++round) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        next[2 * i] = interleave_quarters<0>(row[i], row[i + 4]);
        next[2 * i + 1] = interleave_quarters<1>(row[i], row[i + 4]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) row[i] = next[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) squares[g][i] = row[i];
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const auto low = join_quarters<0, 1>(squares[0][j], squares[1][j]);
    const auto high = join_quarters<2, 1>(squares[0][j], squares[1][j]);
    const auto low_2 = join_quarters<0, 1>(squares[2][j], squares[3][j]);
    const auto high_2 = join_quarters<2, 1>(squares[2][j], squares[3][j]);
    store(place(j), join_quarters<0, 2>(low, low_2));
    store(place(8 + j), join_quarters<1, 2>(low, low_2));
    store(place(16 + j), join_quarters<0, 2>(high, high_2));
    store(place(24 + j), join_quarters<1, 2>(high, high_2));
  }
}
#endif

// Row r of column c goes to place(c)[r].
template <typename T, typename Place>
[[gnu::always_inline]] inline void transpose_all(const T* from, int64_t from_stride, int64_t rows, int64_t columns,
                                                 const Place& place) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t whole_rows = rows / lanes * lanes, whole_columns = columns / lanes * lanes;
  for (int64_t c = 0; c < whole_columns; c += lanes) {
    for (int64_t r = 0; r < whole_rows; r += lanes) {
      transpose_square(from + r * from_stride + c, from_stride, [&](int64_t i) { return place(c + i) + r; });
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r) place(c)[r] = from[r * from_stride + c];
  }
}

template <typename T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  transpose_all(from, from_stride, rows, columns, [=](int64_t c) { return to + c * to_stride; });
}

template <typename T>
void transpose_to_places(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                         const int64_t* places) {
  transpose_all(from, from_stride, rows, columns, [=](int64_t c) { return to + places[c]; });
}

}  // namespace
}  // namespace dcn::cpu::DCN_ISA
