// Frames' rows in the registers of a warp: loads, stores, and products in which they are summed over or summed.
#pragma once

#include "cuda_launch.h"

namespace i2v::attention {

using Words = Vector<uint32_t, 16>;

// `Wide` chunks from channel `from` on; what lies beyond the tensor is zero.
template <int Frames, int Wide>
I2V_WARP void load(const Launch& p, const Place& at, const Operand& x, int frames, int offset, int from, int lane,
                   Words (&to)[Wide][Shape<Frames>::strips]) {
  for_strips<Frames>([&](int i) {
    const int frame = Shape<Frames>::frame(i, lane / 4);
    const bool real = exists<Frames>(p, at, i, frame, frames);
    const char* row = row_of<Frames>(at, x, i, source(frame, offset, frames));
#pragma unroll
    for (int c = 0; c < Wide; ++c) {
      const int channel = from + c * chunk + lane % 4 * 8;
      to[c][i] = real && channel < p.dim ? *reinterpret_cast<const Words*>(row + channel * 2) : Words{};
    }
  });
}

template <typename T, int Frames>
I2V_WARP void store(const Launch& p, const Place& at, const Operand& x, int frames, int from, int lane,
                    const float (&sum)[Shape<Frames>::strips][4][2]) {
  const int channel = from + lane % 4 * 8;
  for_strips<Frames>([&](int i) {
    const int frame = Shape<Frames>::frame(i, lane / 4);
    Words words;
#pragma unroll
    for (int word = 0; word < 4; ++word) words.value[word] = pack<T>(sum[i][word][0], sum[i][word][1]);
    if (exists<Frames>(p, at, i, frame, frames) && channel < p.dim)
      *reinterpret_cast<Words*>(row_of<Frames>(at, x, i, frame) + channel * 2) = words;
  });
}

// Scores, probabilities and their gradients: [strip of queries][strip of keys that it sees][two neighbouring keys].
template <int Frames>
using Square = float[Shape<Frames>::strips][Shape<Frames>::seen][2];

// The same in 16 bits: fragments.
template <int Frames>
using Fragments = uint32_t[Shape<Frames>::strips][Shape<Frames>::seen];

// square(lane)[i][j] += the products of rows of a(lane) and b(lane), two chunks' words of each strip.
template <typename T, int Frames, typename Warp, typename A, typename B, typename C>
I2V_WARP void dot_rows(Warp& warp, const A& a, const B& b, const C& square) {
  using S = Shape<Frames>;
#pragma unroll
  for (int m = 0; m < S::strips; m += 2)
#pragma unroll
    for (int j = 0; j < S::strips; ++j)
#pragma unroll
      for (int word = 0; word < 4; word += 2)
        warp.template multiply<T>([&](auto& lane) {
          const Words &upper = a(lane)[m], &lower = a(lane)[m + 1], &other = b(lane)[j];
          auto& sum = square(lane);
          return Product<16>{S::pair && j == 1 ? nullptr : sum[m][S::pair ? 0 : j],
                             S::pair && j == 0 ? nullptr : sum[m + 1][S::pair ? 0 : j],
                             {upper.value[word], lower.value[word], upper.value[word + 1], lower.value[word + 1]},
                             {other.value[word], other.value[word + 1]}};
        });
}

// sum(lane)[i][word] = weights(lane)[i][j] times the rows of strip j, whose words are turned fragments.
template <typename T, int Frames, typename Warp, typename W, typename X, typename C>
I2V_WARP void mix_rows(Warp& warp, const W& weights, const X& turned, const C& sum) {
  using S = Shape<Frames>;
  warp.each([&](auto& lane) {
    for_strips<Frames>([&](int i) {
#pragma unroll
      for (int word = 0; word < 4; ++word) sum(lane)[i][word][0] = sum(lane)[i][word][1] = 0;
    });
  });
#pragma unroll
  for (int word = 0; word < 4; ++word)
#pragma unroll
    for (int m = 0; m < S::strips; m += 2) {
      if constexpr (S::pair) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          warp.template multiply<T>([&](auto& lane) {
            auto& w = weights(lane);
            return Product<8>{j == 0 ? sum(lane)[0][word] : nullptr, j == 1 ? sum(lane)[1][word] : nullptr,
                              {w[0][0], w[1][0]}, {turned(lane)[j].value[word]}};
          });
      } else {
#pragma unroll
        for (int j = 0; j < S::strips; j += 2)
          warp.template multiply<T>([&](auto& lane) {
            auto& w = weights(lane);
            return Product<16>{sum(lane)[m][word], sum(lane)[m + 1][word],
                               {w[m][j], w[m + 1][j], w[m][j + 1], w[m + 1][j + 1]},
                               {turned(lane)[j].value[word], turned(lane)[j + 1].value[word]}};
          });
      }
    }
}

template <int Frames, typename Warp, typename X>
I2V_WARP void turn_rows(Warp& warp, const X& rows) {
  for_strips<Frames>([&](int i) {
#pragma unroll
    for (int word = 0; word < 4; ++word)
      warp.transpose([&](auto& lane) -> uint32_t& { return rows(lane)[i].value[word]; });
  });
}

}  // namespace i2v::attention
