// One (clip, token, head) is a sequence of T frames of D numbers. A worker copies G sequences into its first-level cache,
// computes their T x T scores, and turns them with the frames of the queries in the vector's lanes: then softmax needs no
// sum across lanes, and short sequences fill a vector together (G * T lanes).
// Included by for_each_isa.h inside the namespace of an instruction set.

template <typename A>
struct Layout {
  static constexpr int W = lanes<A>;
  static constexpr int rows = W < 4 ? W : 4;  // a block of dot products: `rows` queries by `columns` keys fills one vector
  static constexpr int columns = W / rows;

  int64_t frames, padded_frames, dim, padded_dim, group, lane_count;

  explicit Layout(const Problem& p)
      : frames(p.frames),
        padded_frames((p.frames + 3) / 4 * 4),
        dim(p.dim),
        padded_dim((p.dim + W - 1) / W * W),
        group(std::max<int64_t>(1, W / padded_frames)),
        lane_count((group * padded_frames + W - 1) / W * W) {}

  int64_t sequence() const { return padded_frames * padded_dim; }  // elements of one copied sequence
  int64_t square() const { return padded_frames * lane_count; }    // elements of the group's scores
};

// `ahead` elements further lies what the next call will copy: frames are too far apart for the hardware to foresee it.
template <typename T, typename A>
I2V_INLINE void copy_in(const Layout<A>& l, const T* source, int64_t stride, int64_t ahead, A* target) {
  const int W = Layout<A>::W;
  for (int64_t t = 0; t < l.frames; ++t) {
    const T* row = source + t * stride;
    A* to = target + t * l.padded_dim;
    int64_t d = 0;
    for (int64_t line = 0; line < l.dim; line += 64 / sizeof(T)) __builtin_prefetch(row + ahead + line, 0, 2);
    for (; d + W <= l.dim; d += W) store<A>(to + d, load(row + d));
    if (d < l.dim) store<A>(to + d, load_part(row + d, l.dim - d));
  }
}

// out[j][i] = <a_i, b_j>, i in lanes.
template <typename A>
I2V_INLINE void dot_products(const Layout<A>& l, const A* a, const A* b, A* out) {
  constexpr int R = Layout<A>::rows, C = Layout<A>::columns, W = Layout<A>::W;
  for (int64_t i = 0; i < l.frames; i += R) {
    for (int64_t j = 0; j < l.frames; j += C) {
      Vec<A> sum[W] = {};
      for (int64_t d = 0; d < l.padded_dim; d += W) {
        Vec<A> rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) rows[r] = load(a + (i + r) * l.padded_dim + d);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const Vec<A> column = load(b + (j + c) * l.padded_dim + d);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[c * R + r] += rows[r] * column;
        }
      }
      A block[W];
      store<A>(block, sum_each<A>(sum));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) std::memcpy(out + (j + c) * l.lane_count + i, block + c * R, R * sizeof(A));
    }
  }
}

// Scores to probabilities, in place. `lane_frame[lane]` is the query's frame, `bias[j][lane]` is added, `valid[j]` masks.
template <typename A>
I2V_INLINE void softmax(const Layout<A>& l, const A* lane_frame, A scale, const A* bias, const bool* valid, bool causal,
                        A* scores) {
  constexpr int W = Layout<A>::W;
  const Vec<A> minus_infinity = broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t lane = 0; lane < l.lane_count; lane += W) {
    const Vec<A> frame = load(lane_frame + lane);
    Vec<A> most = minus_infinity;
    typename VecOf<A>::index any = {};
    for (int64_t j = 0; j < l.frames; ++j) {
      A* at = scores + j * l.lane_count + lane;
      Vec<A> x = load(at) * scale;
      if (bias) x += load(bias + j * l.lane_count + lane);
      const auto seen = (frame >= (causal ? A(j) : A(-1))) & (valid && !valid[j] ? 0 : -1);
      x = seen ? x : minus_infinity;
      any |= seen;
      most = x > most ? x : most;
      store<A>(at, x);
    }
    Vec<A> sum = {};
    for (int64_t j = 0; j < l.frames; ++j) {
      A* at = scores + j * l.lane_count + lane;
      const Vec<A> e = exp_nonpositive(load(at) - most);
      sum += e;
      store<A>(at, e);
    }
    const Vec<A> inverse = A(1) / sum;
    for (int64_t j = 0; j < l.frames; ++j) {
      A* at = scores + j * l.lane_count + lane;
      const Vec<A> p = load(at) * inverse;
      store<A>(at, any ? p : Vec<A>{});  // a query that sees no frame gives zeros
    }
  }
}

// out[r] = scale * sum_c weight[r * row_step + c * column_step] * in[c], for NV vectors of the dimension from d on.
template <int NV, typename T, typename A>
I2V_INLINE void mix_columns(const Layout<A>& l, const A* weight, int64_t row_step, int64_t column_step, const A* in, A scale,
                            T* out, int64_t out_stride, int64_t d, bool past_cache) {
  constexpr int W = Layout<A>::W, R = 4;
  for (int64_t r0 = 0; r0 < l.frames; r0 += R) {
    Vec<A> sum[R][NV] = {};
    for (int64_t c = 0; c < l.frames; ++c) {
      Vec<A> x[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) x[v] = load(in + c * l.padded_dim + d + v * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> w = broadcast(weight[(r0 + r) * row_step + c * column_step]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] += w * x[v];
      }
    }
    for (int r = 0; r < R && r0 + r < l.frames; ++r) {
      T* row = out + (r0 + r) * out_stride + d;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t left = l.dim - d - v * W;
        if (left >= W) store_or_stream(row + v * W, sum[r][v] * scale, past_cache);
        else if (left > 0) store_part(row + v * W, sum[r][v] * scale, left);
      }
    }
  }
}

template <typename T, typename A>
I2V_INLINE void mix(const Layout<A>& l, const A* weight, int64_t row_step, int64_t column_step, const A* in, A scale, T* out,
                    int64_t out_stride, bool past_cache) {
  constexpr int W = Layout<A>::W, most = I2V_VECTOR_BYTES == 64 ? 4 : 2;  // 4 x most sums in registers
  int64_t d = 0;
  for (; d + most * W <= l.padded_dim; d += most * W)
    mix_columns<most>(l, weight, row_step, column_step, in, scale, out, out_stride, d, past_cache);
  for (; d < l.padded_dim; d += W) mix_columns<1>(l, weight, row_step, column_step, in, scale, out, out_stride, d, past_cache);
}

template <typename T>
I2V_INLINE T* at(const View<4>& x, int64_t b, int64_t n, int64_t h) {
  return reinterpret_cast<T*>(x.data) + b * x.stride[0] + n * x.stride[2] + h * x.stride[3];
}

// From head h of a token to the group of heads that comes next, in the same token or at the start of the following one.
template <typename A>
I2V_INLINE int64_t next_group(const Problem& p, const Layout<A>& l, const View<4>& x, int64_t h) {
  return h + l.group < p.heads ? l.group * x.stride[3] : x.stride[2] - h * x.stride[3];
}

// Lines that are soon to be written: their old contents come while other work goes on.
template <typename T>
I2V_INLINE void expect_writes(const Problem& p, const View<4>& x, int64_t b, int64_t n, int64_t h) {
  if (p.past_cache) return;
  for (int64_t t = 0; t < p.frames; ++t)
    for (int64_t d = 0; d < p.dim; d += 64 / sizeof(T)) __builtin_prefetch(at<T>(x, b, n, h) + t * x.stride[1] + d, 1, 3);
}

template <typename A>
I2V_INLINE const A* bias_of(const Problem& p, const Layout<A>& l, int64_t h) {
  return p.bias_lanes ? static_cast<const A*>(p.bias_lanes) + h / l.group * l.square() : nullptr;
}

template <typename A>
I2V_INLINE void fill_lane_frames(const Layout<A>& l, A* lane_frame) {
  for (int64_t lane = 0; lane < l.lane_count; ++lane) {
    const int64_t frame = lane % l.padded_frames;
    lane_frame[lane] = frame < l.frames && lane < l.group * l.padded_frames ? A(frame) : A(-2);  // -2 sees no key
  }
}

// Probabilities of the heads [h, h + count) of one token, from memory.
template <typename T, typename A>
I2V_INLINE void probabilities(const Problem& p, const Layout<A>& l, int64_t b, int64_t n, int64_t h, int64_t count,
                              const A* lane_frame, A* q, A* k, A* scores) {
  for (int64_t g = 0; g < count; ++g) {
    copy_in(l, at<T>(p.q, b, n, h + g), p.q.stride[1], next_group(p, l, p.q, h), q + g * l.sequence());
    copy_in(l, at<T>(p.k, b, n, h + g), p.k.stride[1], next_group(p, l, p.k, h), k + g * l.sequence());
    dot_products(l, q + g * l.sequence(), k + g * l.sequence(), scores + g * l.padded_frames);
  }
  softmax(l, lane_frame, A(p.scale), bias_of(p, l, h), p.mask ? p.mask + b * p.frames : nullptr, p.causal, scores);
}

// bias [H, T, T] into the order in which softmax reads it: [group][key frame][lane].
template <typename T>
void arrange_bias(const Problem& p, const void* bias, void* lanes_out) {
  using A = accumulate_t<T>;
  const Layout<A> l(p);
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.frames; ++i)
      for (int64_t j = 0; j < p.frames; ++j)
        static_cast<A*>(lanes_out)[h / l.group * l.square() + j * l.lane_count + h % l.group * l.padded_frames + i] =
            static_cast<const A*>(bias)[(h * p.frames + i) * p.frames + j];
}

template <typename T>
int64_t bias_lanes_size(const Problem& p) {
  const Layout<accumulate_t<T>> l(p);
  return (p.heads + l.group - 1) / l.group * l.square();
}

// dP to dS = P (dP - sum_j P dP), in place; the sum equals <dO, O>, so the output need not be read.
template <typename A>
I2V_INLINE void score_gradients(const Layout<A>& l, const A* probs, A* grads) {
  for (int64_t lane = 0; lane < l.lane_count; lane += Layout<A>::W) {
    Vec<A> mean = {};
    for (int64_t j = 0; j < l.frames; ++j)
      mean += load(probs + j * l.lane_count + lane) * load(grads + j * l.lane_count + lane);
    for (int64_t j = 0; j < l.frames; ++j) {
      A* at = grads + j * l.lane_count + lane;
      store<A>(at, load(probs + j * l.lane_count + lane) * (load(at) - mean));
    }
  }
}

template <typename A>
I2V_INLINE void add_bias_gradient(const Layout<A>& l, const A* dscores, A* total) {
  for (int64_t i = 0; i < l.frames; ++i)
    for (int64_t j = 0; j < l.frames; ++j) total[i * l.frames + j] += dscores[j * l.lane_count + i];
}

template <typename T>
void forward(const Problem& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Layout<A> l(p);
  const int64_t all = l.group * l.sequence();
  Scratch<A> memory(3 * all + l.square() + l.lane_count);
  A *q = memory.data(), *k = q + all, *v = k + all, *scores = v + all, *lane_frame = scores + l.square();
  fill_lane_frames(l, lane_frame);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.tokens, n = token % p.tokens;
    for (int64_t h = 0; h < p.heads; h += l.group) {
      const int64_t count = std::min(l.group, p.heads - h);
      for (int64_t g = 0; g < count; ++g) expect_writes<T>(p, p.out, b, n, h + g);
      probabilities<T>(p, l, b, n, h, count, lane_frame, q, k, scores);
      for (int64_t g = 0; g < count; ++g) {
        copy_in(l, at<T>(p.v, b, n, h + g), p.v.stride[1], next_group(p, l, p.v, h), v + g * l.sequence());
        mix(l, scores + g * l.padded_frames, 1, l.lane_count, v + g * l.sequence(), A(1), at<T>(p.out, b, n, h + g),
            p.out.stride[1], p.past_cache);
      }
    }
  }
}

template <typename T>
void backward(const Problem& p, int64_t begin, int64_t end, void* bias_grad) {
  using A = accumulate_t<T>;
  const Layout<A> l(p);
  const int64_t all = l.group * l.sequence();
  Scratch<A> memory(4 * all + 2 * l.square() + l.lane_count);
  A *q = memory.data(), *k = q + all, *v = k + all, *grad = v + all;
  A *probs = grad + all, *dscores = probs + l.square(), *lane_frame = dscores + l.square();
  fill_lane_frames(l, lane_frame);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.tokens, n = token % p.tokens;
    for (int64_t h = 0; h < p.heads; h += l.group) {
      const int64_t count = std::min(l.group, p.heads - h);
      probabilities<T>(p, l, b, n, h, count, lane_frame, q, k, probs);
      for (int64_t g = 0; g < count; ++g) {
        copy_in(l, at<T>(p.v, b, n, h + g), p.v.stride[1], next_group(p, l, p.v, h), v + g * l.sequence());
        copy_in(l, at<T>(p.grad, b, n, h + g), p.grad.stride[1], next_group(p, l, p.grad, h), grad + g * l.sequence());
        expect_writes<T>(p, p.dv, b, n, h + g);
        dot_products(l, grad + g * l.sequence(), v + g * l.sequence(), dscores + g * l.padded_frames);
      }
      score_gradients(l, probs, dscores);
      for (int64_t g = 0; g < count; ++g) {
        const A *pr = probs + g * l.padded_frames, *ds = dscores + g * l.padded_frames;
        const int64_t s = g * l.sequence(), step = l.lane_count;
        expect_writes<T>(p, p.dk, b, n, h + g);
        mix(l, pr, step, 1, grad + s, A(1), at<T>(p.dv, b, n, h + g), p.dv.stride[1], p.past_cache);
        expect_writes<T>(p, p.dq, b, n, h + g);
        mix(l, ds, step, 1, q + s, A(p.scale), at<T>(p.dk, b, n, h + g), p.dk.stride[1], p.past_cache);
        mix(l, ds, 1, step, k + s, A(p.scale), at<T>(p.dq, b, n, h + g), p.dq.stride[1], p.past_cache);
        if (bias_grad) add_bias_gradient(l, ds, static_cast<A*>(bias_grad) + (h + g) * p.frames * p.frames);
      }
    }
  }
}

#if I2V_ISA == I2V_ISA_AVX512_BF16
#include "cpu_bf16.h"
#endif
