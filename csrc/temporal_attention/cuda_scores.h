// Scores in the registers of a warp: masks, softmax, gradients.
#pragma once

#include "cuda_rows.h"

namespace i2v::attention {

// One instruction on a GPU, within 2^-22 of the result. What is below 2^-126 becomes zero.
I2V_WARP float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return std::exp2(x);
#endif
}

template <int Frames>
I2V_WARP uint32_t bit_of(int i, int j, int e) {
  return 1u << ((i * Shape<Frames>::seen + j) * 2 + e);
}

template <int Frames>
I2V_WARP void set_zero(Square<Frames>& square) {
  for_scores<Frames>([&](int i, int j, int e) { square[i][j][e] = 0; });
}

template <typename T, int Frames>
I2V_WARP void pack_square(const Square<Frames>& square, Fragments<Frames>& fragments) {
  for_squares<Frames>([&](int i, int j) { fragments[i][j] = pack<T>(square[i][j][0], square[i][j][1]); });
}

// The two sequences of a pair share a bias.
template <int Frames>
I2V_WARP void add_bias(const Square<Frames>& square, Square<Frames>& sums) {
  for_scores<Frames>([&](int i, int j, int e) { sums[Shape<Frames>::pair ? 0 : i][j][e] += square[i][j][e]; });
}

// A lane's scores to scores in powers of two, -inf where the query may not look; returns a bit for each that it may look at.
template <int Frames>
I2V_WARP uint32_t mask_scores(const Launch& p, const Place& at, int id, Square<Frames>& scores) {
  using S = Shape<Frames>;
  bool valid[S::seen][2];
#pragma unroll
  for (int j = 0; j < S::seen; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = S::frame(j, id % 4 * 2 + e);
      const bool* mask = p.mask + static_cast<int64_t>(at.clip) * p.keys;
      valid[j][e] = key < p.keys && (!p.mask || mask[source(key, at.offset, p.keys)]);
    }
  uint32_t looks = 0;
  for_scores<Frames>([&](int i, int j, int e) {
    const int key = S::frame(j, id % 4 * 2 + e), query = S::frame(i, id / 4), step = key - query - (p.keys - p.queries);
    float& x = scores[i][j][e];
    x *= p.scale * log2_e;
    if (p.bias && key < p.keys && query < p.queries)
      x += p.bias[(static_cast<int64_t>(at.head) * p.queries + query) * p.keys + key] * log2_e;
    if (valid[j][e] && query < p.queries && (p.left < 0 || step >= -p.left) && (p.right < 0 || step <= p.right))
      looks |= bit_of<Frames>(i, j, e);
    else
      x = -std::numeric_limits<float>::infinity();
  });
  return looks;
}

// What a lane knows of the rows of its scores.
template <int Frames>
struct Rows {
  float most[Shape<Frames>::strips], sum[Shape<Frames>::strips], any[Shape<Frames>::strips];
};

// Scores to probabilities, in place.
template <int Frames, typename Warp>
I2V_WARP void softmax(const Launch& p, const Place& at, Warp& warp) {
  warp.each([&](auto& lane) {
    lane.looks = mask_scores<Frames>(p, at, lane.id, lane.scores);
    for_strips<Frames>([&](int i) { lane.rows.most[i] = lane.scores[i][0][0], lane.rows.any[i] = 0; });
    for_scores<Frames>([&](int i, int j, int e) {
      lane.rows.most[i] = fmaxf(lane.rows.most[i], lane.scores[i][j][e]);
      if (lane.looks & bit_of<Frames>(i, j, e)) lane.rows.any[i] = 1;
    });
  });
  for_strips<Frames>([&](int i) {
    warp.row_max([=](auto& lane) -> float& { return lane.rows.most[i]; });
    warp.row_max([=](auto& lane) -> float& { return lane.rows.any[i]; });
  });
  warp.each([&](auto& lane) {
    for_strips<Frames>([&](int i) { lane.rows.sum[i] = 0; });
    for_scores<Frames>([&](int i, int j, int e) {
      lane.scores[i][j][e] = fast_exp2(lane.scores[i][j][e] - lane.rows.most[i]);
      lane.rows.sum[i] += lane.scores[i][j][e];
    });
  });
  for_strips<Frames>([&](int i) { warp.row_sum([=](auto& lane) -> float& { return lane.rows.sum[i]; }); });
  warp.each([&](auto& lane) {
    float inverse[Shape<Frames>::strips];
    for_strips<Frames>([&](int i) { inverse[i] = 1 / lane.rows.sum[i]; });
    for_scores<Frames>([&](int i, int j, int e) {  // a query that sees no frame gives zeros, and so does one that is not there
      lane.scores[i][j][e] = lane.rows.any[i] > 0 ? lane.scores[i][j][e] * inverse[i] : 0;
    });
  });
}

// dP to dS = P (dP - sum P dP), in place; the sum comes and goes in rows.sum.
template <int Frames, typename Warp>
I2V_WARP void score_gradients(Warp& warp) {
  warp.each([&](auto& lane) {
    for_strips<Frames>([&](int i) { lane.rows.sum[i] = 0; });
    for_scores<Frames>([&](int i, int j, int e) { lane.rows.sum[i] += lane.scores[i][j][e] * lane.dscores[i][j][e]; });
  });
  for_strips<Frames>([&](int i) { warp.row_sum([=](auto& lane) -> float& { return lane.rows.sum[i]; }); });
  warp.each([&](auto& lane) {
    for_scores<Frames>([&](int i, int j, int e) {
      float& x = lane.dscores[i][j][e];
      x = lane.looks & bit_of<Frames>(i, j, e) ? lane.scores[i][j][e] * (x - lane.rows.sum[i]) : 0;
    });
  });
}

template <int Frames>
I2V_WARP void write_lse(const Launch& p, const Place& at, int id, const Rows<Frames>& rows) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for_strips<Frames>([&](int i) {
    const int query = Shape<Frames>::frame(i, id / 4), token = at.token + Shape<Frames>::token(i);
    if (id % 4 > 0 || !exists<Frames>(p, at, i, query, p.queries)) return;
    const float lse = (rows.most[i] + log2f(rows.sum[i])) / log2_e;
    p.lse[((static_cast<int64_t>(at.clip) * p.queries + query) * p.tokens + token) * p.heads + at.head] =
        rows.any[i] == 0 ? -infinity : rows.most[i] == infinity ? infinity : lse;
  });
}

// A warp's sums over its share of the tokens.
template <int Frames>
I2V_WARP void write_bias(const Launch& p, int share, int head, int id, const Square<Frames>& sums) {
  for_scores<Frames>([&](int i, int j, int e) {
    const int query = Shape<Frames>::frame(i, id / 4), key = Shape<Frames>::frame(j, id % 4 * 2 + e);
    if (query < p.queries && key < p.keys && (i == 0 || !Shape<Frames>::pair))
      p.bias_sums[((static_cast<int64_t>(share) * p.heads + head) * p.queries + query) * p.keys + key] = sums[i][j][e];
  });
}

// What every warp has of its rows and scores.
template <int Frames>
struct Lane {
  using S = Shape<Frames>;
  int id;
  uint32_t looks;  // see mask_scores
  Rows<Frames> rows;
  Square<Frames> scores;
  Fragments<Frames> weights;
  float out[S::strips][4][2];  // of one chunk
};

}  // namespace i2v::attention
