// The launch of temporal_attention's CUDA kernels, and what each warp of it works on.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/warp.h"
#include "problem.h"

namespace i2v::attention {

constexpr int warps_per_block = 4;
constexpr int most_heads = 256;  // that offsets are held for
constexpr int chunk = 32;        // channels that the four lanes of a row load at once
constexpr float log2_e = 1.4426950408889634f;

// Strides are bytes, of clip, frame, token and head.
struct Operand {
  char* data;
  int64_t stride[4];
};

struct Launch {
  Operand q, k, v, out, grad, dq, dk, dv;
  const float* bias;  // [H, Tq, Tk]
  const bool* mask;   // [B, Tk]
  float* lse;         // [B, Tq, N, H]
  float* bias_sums;   // [shares, H, Tq, Tk]
  float scale;
  int queries, keys, left, right, dim, tokens, heads;
  int groups;         // of tokens that a warp takes together, in a clip
  int units, shares;  // groups in all; a warp takes every shares-th of one head
  int warps;
  int8_t offset[most_heads];
};

template <int Frames>
struct Shape {
  static constexpr bool pair = Frames == 8;              // the strips are two sequences, not parts of one
  static constexpr int strips = Frames == 32 ? 4 : 2;    // of 8 frames
  static constexpr int seen = pair ? 1 : strips;         // strips of keys that a strip of queries looks at

  static I2V_WARP int frame(int strip, int row) { return (pair ? 0 : 8 * strip) + row; }
  static I2V_WARP int token(int strip) { return pair ? strip : 0; }
};

// f(i) for each strip, with i a constant once unrolled.
template <int Frames, typename F>
I2V_WARP void for_strips(const F& f) {
#pragma unroll
  for (int i = 0; i < Shape<Frames>::strips; ++i) f(i);
}

// f(i, j) for each strip of queries and each strip of keys that it sees.
template <int Frames, typename F>
I2V_WARP void for_squares(const F& f) {
  for_strips<Frames>([&](int i) {
#pragma unroll
    for (int j = 0; j < Shape<Frames>::seen; ++j) f(i, j);
  });
}

// f(i, j, e) for each number that a lane has of scores.
template <int Frames, typename F>
I2V_WARP void for_scores(const F& f) {
  for_squares<Frames>([&](int i, int j) { f(i, j, 0), f(i, j, 1); });
}

// What a warp works on at a time: one head of one or two neighbouring tokens.
struct Place {
  int clip, token, head, offset;
};

template <int Frames>
I2V_WARP Place place_of(const Launch& p, int unit, int head) {
  return {unit / p.groups, unit % p.groups * (Shape<Frames>::pair ? 2 : 1), head, p.offset[head]};
}

// The frame that a head with this offset reads as its key `s`.
I2V_WARP int source(int s, int offset, int frames) {
  const int from = s + offset;
  return from < 0 ? 0 : from >= frames ? frames - 1 : from;
}

template <int Frames>
I2V_WARP char* row_of(const Place& at, const Operand& x, int strip, int frame) {
  return x.data + at.clip * x.stride[0] + frame * x.stride[1] + (at.token + Shape<Frames>::token(strip)) * x.stride[2] +
         at.head * x.stride[3];
}

template <int Frames>
I2V_WARP bool exists(const Launch& p, const Place& at, int strip, int frame, int frames) {
  return frame < frames && at.token + Shape<Frames>::token(strip) < p.tokens;
}

// A tensor of `frames` frames. Rows begin at multiples of 16 bytes, so that 16 may be loaded at once.
inline Operand operand(const Problem& problem, const View<4>& x, int64_t frames, const char* name) {
  const int64_t sizes[] = {problem.batch, frames, problem.tokens, problem.heads};
  Operand o{x.data, {}};
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] > 1) o.stride[i] = x.stride[i] * 2;
    aligned &= o.stride[i] % 16 == 0;
  }
  STD_TORCH_CHECK(aligned, "temporal_attention: the CUDA kernels need rows of ", name, " to begin at multiples of 16 bytes");
  return o;
}

// The launch for this problem; what it writes is still to be set.
inline Launch describe_launch(const Problem& problem, const Tensor& q, const std::optional<Tensor>& bias) {
  const Problem& x = problem;
  STD_TORCH_CHECK(q.element_size() == 2, "temporal_attention: the CUDA kernels take float16 and bfloat16");
  STD_TORCH_CHECK(x.queries >= 1 && x.keys >= 1 && x.queries <= 32 && x.keys <= 32 && x.dim % 8 == 0 && x.dim <= 256,
                  "temporal_attention: T=", x.queries, ", Tk=", x.keys, ", D=", x.dim,
                  ": the CUDA kernels take 1 to 32 frames and multiples of 8 channels up to 256");
  STD_TORCH_CHECK(x.heads <= most_heads, "temporal_attention: ", x.heads, " heads, at most ", most_heads, " fit");
  Launch p{};
  p.q = operand(x, x.q, x.queries, "q"), p.k = operand(x, x.k, x.keys, "k"), p.v = operand(x, x.v, x.keys, "v");
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.mask = x.mask;
  p.scale = static_cast<float>(x.scale);
  p.queries = static_cast<int>(x.queries), p.keys = static_cast<int>(x.keys), p.dim = static_cast<int>(x.dim);
  const auto limit = [](int64_t frames) { return static_cast<int>(frames > 64 ? -1 : frames); };  // beyond: no limit
  p.left = limit(x.left), p.right = limit(x.right);
  const int64_t groups = x.keys <= 8 && x.queries <= 8 ? (x.tokens + 1) / 2 : x.tokens, warps = x.batch * groups * x.heads;
  STD_TORCH_CHECK(warps <= std::numeric_limits<int32_t>::max() - warps_per_block && x.tokens < (1 << 30),
                  "temporal_attention: ", warps, " warps are too many");
  p.tokens = static_cast<int>(x.tokens), p.heads = static_cast<int>(x.heads), p.groups = static_cast<int>(groups);
  p.units = p.shares = static_cast<int>(x.batch * groups);
  p.warps = static_cast<int>(warps);
  for (int64_t h = 0; x.offsets && h < x.heads; ++h)
    p.offset[h] = static_cast<int8_t>(std::clamp<int64_t>(x.offsets[h], -x.keys, x.keys));
  return p;
}

}  // namespace i2v::attention
