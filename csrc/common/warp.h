// A warp as an object. What a lane holds in registers is a struct, `Lane`, whose member `id` is its number; `each(f)` runs f on
// it, and what the lanes do together, matrix products and exchanges, are members too. Each takes a function from a lane to its
// operand. A program written so runs on a GPU (DeviceWarp: one lane a thread) and, lane after lane, on a CPU (HostWarp).
//
// Fragments are those of PTX for 16-bit operands. A fragment of 8 rows by 8 columns is one word a lane: lane i holds columns
// 2 * (i % 4) and the next of row i / 4, the first one in the low half.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "host_device.h"

#if defined(__CUDACC__)
#define I2V_WARP __device__ __forceinline__
#else
#define I2V_WARP inline
#endif

namespace i2v {

// upper (rows 0 to 7) and lower (rows 8 to 15) += a * b, of 8 columns; sums that are null are not wanted. K = 8 or 16 is what is
// summed over. a: the fragments of the upper and the lower rows, for the first 8 of K, then for the next; b: transposed ones.
template <int K>
struct Product {
  static constexpr int depth = K;
  float *upper, *lower;
  uint32_t a[K / 4], b[K / 8];
};

// Two numbers as a word of T, which is BFloat16 or Half.
template <typename T>
I2V_WARP uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
#endif
}

#if defined(__CUDACC__)

template <typename Lane>
class DeviceWarp {
 public:
  __device__ __forceinline__ DeviceWarp() { lane_.id = threadIdx.x % 32; }

  template <typename F>
  __device__ __forceinline__ void each(const F& f) { f(lane_); }

  template <typename T, typename F>
  __device__ __forceinline__ void multiply(const F& operands) {
    auto x = operands(lane_);
    constexpr bool wide = decltype(x)::depth == 16, bf16 = std::is_same_v<T, torch::headeronly::BFloat16>;
    float c[4] = {x.upper ? x.upper[0] : 0, x.upper ? x.upper[1] : 0, x.lower ? x.lower[0] : 0, x.lower ? x.lower[1] : 0};
#define I2V_MMA(shape, type, operands, ...)                                                                        \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, " operands          \
               ", {%0, %1, %2, %3};"                                                                               \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                    \
               : __VA_ARGS__)
#define I2V_WIDE(type)                                                                                             \
  I2V_MMA("m16n8k16", type, "{%4, %5, %6, %7}, {%8, %9}", "r"(x.a[0]), "r"(x.a[1]), "r"(x.a[2]), "r"(x.a[3]),        \
          "r"(x.b[0]), "r"(x.b[1]))
#define I2V_NARROW(type) I2V_MMA("m16n8k8", type, "{%4, %5}, {%6}", "r"(x.a[0]), "r"(x.a[1]), "r"(x.b[0]))
    if constexpr (wide && bf16) I2V_WIDE("bf16");
    if constexpr (wide && !bf16) I2V_WIDE("f16");
    if constexpr (!wide && bf16) I2V_NARROW("bf16");
    if constexpr (!wide && !bf16) I2V_NARROW("f16");
#undef I2V_NARROW
#undef I2V_WIDE
#undef I2V_MMA
    if (x.upper) x.upper[0] = c[0], x.upper[1] = c[1];
    if (x.lower) x.lower[0] = c[2], x.lower[1] = c[3];
  }

  // Turns a fragment, in place.
  template <typename F>
  __device__ __forceinline__ void transpose(const F& fragment) {
    uint32_t& word = fragment(lane_);
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(word));
  }

  // The sum, or the largest, of the four lanes that hold one row, to each of them. NaN is not the largest.
  template <typename F>
  __device__ __forceinline__ void row_sum(const F& number) {
    float& x = number(lane_);
    for (int step = 1; step < 4; step *= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  }
  template <typename F>
  __device__ __forceinline__ void row_max(const F& number) {
    float& x = number(lane_);
    for (int step = 1; step < 4; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
  }

 private:
  Lane lane_;
};

#else

template <typename Lane>
class HostWarp {
 public:
  HostWarp() {
    std::memset(lanes_, 0xff, sizeof lanes_);  // NaN: what is used before it is set shows
    for (int i = 0; i < 32; ++i) lanes_[i].id = i;
  }

  template <typename F>
  void each(const F& f) {
    for (Lane& lane : lanes_) f(lane);
  }

  template <typename T, typename F>
  void multiply(const F& operands) {
    constexpr int K = decltype(operands(lanes_[0]))::depth;
    float a[16][K], b[K][8];
    for (int i = 0; i < 32; ++i) {
      const auto x = operands(lanes_[i]);
      const int row = i / 4, column = i % 4 * 2;
      for (int word = 0; word < K / 4; ++word) {
        const int k = word / 2 * 8 + column;
        unpack<T>(x.a[word], a[word % 2 * 8 + row][k], a[word % 2 * 8 + row][k + 1]);
        if (word % 2 == 0) unpack<T>(x.b[word / 2], b[k][row], b[k + 1][row]);
      }
    }
    for (int i = 0; i < 32; ++i) {
      const auto x = operands(lanes_[i]);
      float* const sums[] = {x.upper, x.lower};
      for (int half = 0; half < 2; ++half)
        for (int j = 0; j < 2; ++j)
          for (int k = 0; sums[half] && k < K; ++k) sums[half][j] += a[half * 8 + i / 4][k] * b[k][i % 4 * 2 + j];
    }
  }

  template <typename F>
  void transpose(const F& fragment) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 32; ++i) std::memcpy(&matrix[i / 4][i % 4 * 2], &fragment(lanes_[i]), 4);
    for (int i = 0; i < 32; ++i)
      fragment(lanes_[i]) = matrix[i % 4 * 2][i / 4] | static_cast<uint32_t>(matrix[i % 4 * 2 + 1][i / 4]) << 16;
  }

  template <typename F>
  void row_sum(const F& number) {
    reduce(number, [](float x, float y) { return x + y; });
  }
  template <typename F>
  void row_max(const F& number) {
    reduce(number, [](float x, float y) { return std::fmax(x, y); });
  }

 private:
  template <typename T>
  static void unpack(uint32_t word, float& low, float& high) {
    T pair[2];
    std::memcpy(pair, &word, 4);
    low = pair[0], high = pair[1];
  }

  template <typename F, typename Join>
  void reduce(const F& number, const Join& join) {
    for (int i = 0; i < 32; i += 4) {
      float all = number(lanes_[i]);
      for (int j = 1; j < 4; ++j) all = join(all, number(lanes_[i + j]));
      for (int j = 0; j < 4; ++j) number(lanes_[i + j]) = all;
    }
  }

  Lane lanes_[32];
};

#endif

}  // namespace i2v
