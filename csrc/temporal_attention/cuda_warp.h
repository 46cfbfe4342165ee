// What one warp of the CUDA kernels does, for clips of up to 32 frames in 16 bits; README.md of the op explains it. No CUDA
// header is needed, so that emulated.cpp runs the same code on the CPU.
//
// A warp takes two sequences of up to 8 frames (two neighbouring tokens), or one of up to 32. Frames are held in strips of 8:
// lane i has row i / 4 of each strip. Of 32 channels it loads the 16 bytes at 16 * (i % 4), four words. Each word of a strip is a
// fragment of 8 rows by 8 columns whose columns are not neighbours in memory; where channels are summed over, any order is
// good, and where they are the columns of a result, its lanes end with the same 16 bytes and store them as one.
#pragma once

#include "cuda_scores.h"

namespace i2v::attention {

template <int Frames>
struct ForwardLane : Lane<Frames> {
  static constexpr int wide = Frames == 32 ? 1 : 2;  // chunks held at once
  Words q[wide][Shape<Frames>::strips], k[wide][Shape<Frames>::strips], v[wide][Shape<Frames>::strips];
};

template <typename T, int Frames, typename Warp>
I2V_WARP void forward(const Launch& p, Warp& warp, int index) {
  using S = Shape<Frames>;
  constexpr int wide = ForwardLane<Frames>::wide;
  const Place at = place_of<Frames>(p, index / p.heads, index % p.heads);
  const auto scores = [](auto& lane) -> auto& { return lane.scores; };
  const auto weights = [](auto& lane) -> auto& { return lane.weights; };
  const auto out = [](auto& lane) -> auto& { return lane.out; };
  warp.each([&](auto& lane) { set_zero<Frames>(lane.scores); });
  for (int from = 0; from < p.dim; from += wide * chunk) {
    warp.each([&](auto& lane) {
      load<Frames, wide>(p, at, p.q, p.queries, 0, from, lane.id, lane.q);
      load<Frames, wide>(p, at, p.k, p.keys, at.offset, from, lane.id, lane.k);
      if (from == 0) load<Frames, wide>(p, at, p.v, p.keys, at.offset, 0, lane.id, lane.v);  // under way meanwhile
    });
#pragma unroll
    for (int c = 0; c < wide; ++c)
      dot_rows<T, Frames>(
          warp, [=](auto& lane) -> auto& { return lane.q[c]; }, [=](auto& lane) -> auto& { return lane.k[c]; }, scores);
  }
  softmax<Frames>(p, at, warp);
  warp.each([&](auto& lane) {
    pack_square<T, Frames>(lane.scores, lane.weights);
    if (p.lse) write_lse<Frames>(p, at, lane.id, lane.rows);
  });
  for (int from = 0; from < p.dim; from += wide * chunk) {
    if (from > 0)
      warp.each([&](auto& lane) { load<Frames, wide>(p, at, p.v, p.keys, at.offset, from, lane.id, lane.v); });
#pragma unroll
    for (int c = 0; c < wide; ++c) {
      const auto v = [=](auto& lane) -> auto& { return lane.v[c]; };
      turn_rows<Frames>(warp, v);
      mix_rows<T, Frames>(warp, weights, v, out);
      warp.each([&](auto& lane) { store<T, Frames>(p, at, p.out, p.queries, from + c * chunk, lane.id, lane.out); });
    }
  }
}

template <int Frames, bool Bias>
struct BackwardLane : Lane<Frames> {
  static constexpr int wide = Frames == 32 ? 1 : 2;
  Words q[wide][Shape<Frames>::strips], k[wide][Shape<Frames>::strips], v[wide][Shape<Frames>::strips],
      g[wide][Shape<Frames>::strips];
  Square<Frames> dscores;
  Fragments<Frames> probs_turned, dscores_turned;  // [strip of keys][strip of queries]
  Square<Bias ? Frames : 8> bias;                  // what this warp has summed
};

// Whether frame f is read as key s by a head with this offset: 1 or 0 in T, of a fragment's two neighbouring keys.
template <typename T, int Frames>
I2V_WARP uint32_t reads(const Launch& p, const Place& at, int id, int strip_f, int strip_s) {
  const int f = Shape<Frames>::frame(strip_f, id / 4), s = Shape<Frames>::frame(strip_s, id % 4 * 2);
  const auto read = [&](int key) { return key < p.keys && source(key, at.offset, p.keys) == f ? 1.f : 0.f; };
  return pack<T>(read(s), read(s + 1));
}

// Fragments, queries by keys, to their transpose, the weights of sums over queries. Where a head has an offset, a frame's weight is
// the sum over the keys that were read from it: a product with the matrix of ones where frame f is read as key s.
template <typename T, int Frames, typename Warp, typename F, typename W>
I2V_WARP void turn_weights(const Launch& p, const Place& at, Warp& warp, const F& fragments, const W& turned) {
  using S = Shape<Frames>;
#pragma unroll
  for (int i = 0; i < S::strips; ++i)
#pragma unroll
    for (int m = 0; m < S::strips; m += 2) {
      if (at.offset == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (S::pair && half != i) continue;
          const auto word = [=](auto& lane) -> uint32_t& { return turned(lane)[m + half][S::pair ? 0 : i]; };
          warp.each([&](auto& lane) { word(lane) = fragments(lane)[i][S::pair ? 0 : m + half]; });
          warp.transpose(word);
        }
        continue;
      }
      warp.each([&](auto& lane) { lane.out[0][0][0] = lane.out[0][0][1] = lane.out[1][0][0] = lane.out[1][0][1] = 0; });
      if constexpr (S::pair) {
        warp.template multiply<T>([&](auto& lane) {
          const uint32_t read = reads<T, Frames>(p, at, lane.id, 0, 0);
          return Product<8>{lane.out[0][0], lane.out[1][0], {read, read}, {fragments(lane)[i][0]}};
        });
      } else {
#pragma unroll
        for (int s = 0; s < S::strips; s += 2)
          warp.template multiply<T>([&](auto& lane) {
            const auto read = [&](int f, int s) { return reads<T, Frames>(p, at, lane.id, f, s); };
            return Product<16>{lane.out[0][0], lane.out[1][0],
                               {read(m, s), read(m + 1, s), read(m, s + 1), read(m + 1, s + 1)},
                               {fragments(lane)[i][s], fragments(lane)[i][s + 1]}};
          });
      }
      warp.each([&](auto& lane) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (S::pair && half != i) continue;
          turned(lane)[m + half][S::pair ? 0 : i] = pack<T>(lane.out[half][0][0], lane.out[half][0][1]);
        }
      });
    }
}

// A gradient of keys or values. Frames that no key was read from get zeros, whatever zero times the rows may be.
template <typename T, int Frames, typename Lane>
I2V_WARP void store_of_keys(const Launch& p, const Place& at, const Operand& x, int from, Lane& lane) {
  for_strips<Frames>([&](int i) {
    const int f = Shape<Frames>::frame(i, lane.id / 4);
    if (f >= source(0, at.offset, p.keys) && f <= source(p.keys - 1, at.offset, p.keys)) return;
#pragma unroll
    for (auto& pair : lane.out[i]) pair[0] = pair[1] = 0;
  });
  store<T, Frames>(p, at, x, p.keys, from, lane.id, lane.out);
}

template <typename T, int Frames, bool Bias, typename Warp>
I2V_WARP void backward_of(const Launch& p, Warp& warp, const Place& at) {
  using S = Shape<Frames>;
  constexpr int wide = BackwardLane<Frames, Bias>::wide;
  const auto scores = [](auto& lane) -> auto& { return lane.scores; };
  const auto dscores = [](auto& lane) -> auto& { return lane.dscores; };
  const auto weights = [](auto& lane) -> auto& { return lane.weights; };
  const auto probs_turned = [](auto& lane) -> auto& { return lane.probs_turned; };
  const auto dscores_turned = [](auto& lane) -> auto& { return lane.dscores_turned; };
  const auto out = [](auto& lane) -> auto& { return lane.out; };
  warp.each([&](auto& lane) { set_zero<Frames>(lane.scores), set_zero<Frames>(lane.dscores); });
  const int last = (p.dim - 1) / (wide * chunk) * (wide * chunk);
  for (int from = 0; from <= last; from += wide * chunk) {
    warp.each([&](auto& lane) {
      load<Frames, wide>(p, at, p.q, p.queries, 0, from, lane.id, lane.q);
      load<Frames, wide>(p, at, p.k, p.keys, at.offset, from, lane.id, lane.k);
      load<Frames, wide>(p, at, p.grad, p.queries, 0, from, lane.id, lane.g);
      load<Frames, wide>(p, at, p.v, p.keys, at.offset, from, lane.id, lane.v);
    });
#pragma unroll
    for (int c = 0; c < wide; ++c) {
      const auto q = [=](auto& lane) -> auto& { return lane.q[c]; };
      const auto k = [=](auto& lane) -> auto& { return lane.k[c]; };
      const auto g = [=](auto& lane) -> auto& { return lane.g[c]; };
      const auto v = [=](auto& lane) -> auto& { return lane.v[c]; };
      dot_rows<T, Frames>(warp, q, k, scores);
      dot_rows<T, Frames>(warp, g, v, dscores);
    }
  }
  softmax<Frames>(p, at, warp);
  score_gradients<Frames>(warp);
  warp.each([&](auto& lane) {
    pack_square<T, Frames>(lane.scores, lane.weights);
    if constexpr (Bias) add_bias<Frames>(lane.dscores, lane.bias);
  });
  turn_weights<T, Frames>(p, at, warp, weights, probs_turned);
  warp.each([&](auto& lane) {
    for_scores<Frames>([&](int i, int j, int e) { lane.dscores[i][j][e] *= p.scale; });
    pack_square<T, Frames>(lane.dscores, lane.weights);
  });
  turn_weights<T, Frames>(p, at, warp, weights, dscores_turned);
  for (int from = last; from >= 0; from -= wide * chunk) {  // the last ones are still there
    if (from < last)
      warp.each([&](auto& lane) {
        load<Frames, wide>(p, at, p.q, p.queries, 0, from, lane.id, lane.q);
        load<Frames, wide>(p, at, p.k, p.keys, at.offset, from, lane.id, lane.k);
        load<Frames, wide>(p, at, p.grad, p.queries, 0, from, lane.id, lane.g);
      });
#pragma unroll
    for (int c = 0; c < wide; ++c) {
      const auto q = [=](auto& lane) -> auto& { return lane.q[c]; };
      const auto k = [=](auto& lane) -> auto& { return lane.k[c]; };
      const auto g = [=](auto& lane) -> auto& { return lane.g[c]; };
      turn_rows<Frames>(warp, g);
      mix_rows<T, Frames>(warp, probs_turned, g, out);
      warp.each([&](auto& lane) { store_of_keys<T, Frames>(p, at, p.dv, from + c * chunk, lane); });
      turn_rows<Frames>(warp, q);
      mix_rows<T, Frames>(warp, dscores_turned, q, out);
      warp.each([&](auto& lane) { store_of_keys<T, Frames>(p, at, p.dk, from + c * chunk, lane); });
      turn_rows<Frames>(warp, k);
      mix_rows<T, Frames>(warp, weights, k, out);
      warp.each([&](auto& lane) { store<T, Frames>(p, at, p.dq, p.queries, from + c * chunk, lane.id, lane.out); });
    }
  }
}

template <typename T, int Frames, bool Bias, typename Warp>
I2V_WARP void backward(const Launch& p, Warp& warp, int index) {
  const int share = index / p.heads, head = index % p.heads;
  if constexpr (!Bias) {
    backward_of<T, Frames, Bias>(p, warp, place_of<Frames>(p, share, head));
  } else {
    warp.each([&](auto& lane) { set_zero<Frames>(lane.bias); });
    for (int unit = share; unit < p.units; unit += p.shares)
      backward_of<T, Frames, Bias>(p, warp, place_of<Frames>(p, unit, head));
    warp.each([&](auto& lane) { write_bias<Frames>(p, share, head, lane.id, lane.bias); });
  }
}

}  // namespace i2v::attention
