// One (clip, token, head) is a sequence of T frames of D numbers. A worker copies G sequences into its first-level cache,
// computes their scores, queries by keys, and turns them with the frames of the queries in the vector's lanes: then softmax needs no
// sum across lanes, and short sequences fill a vector together (G * T lanes).
// Included by for_each_isa.h inside the namespace of an instruction set.

template <typename A>
struct Layout {
  static constexpr int W = lanes<A>;
  static constexpr int rows = W < 4 ? W : 4;  // a block of dot products: `rows` queries by `columns` keys fills one vector
  static constexpr int columns = W / rows;

  int64_t queries, keys, padded_queries, padded_keys, dim, padded_dim, group, lane_count;

  // With offsets each head has its own valid keys, so no two share a vector.
  explicit Layout(const Problem& p)
      : queries(p.queries),
        keys(p.keys),
        padded_queries((p.queries + 3) / 4 * 4),
        padded_keys((p.keys + 3) / 4 * 4),
        dim(p.dim),
        padded_dim((p.dim + W - 1) / W * W),
        group(p.offsets ? 1 : std::max<int64_t>(1, W / padded_queries)),
        lane_count((group * padded_queries + W - 1) / W * W) {}

  int64_t query_sequence() const { return padded_queries * padded_dim; }  // elements of one copied sequence
  int64_t key_sequence() const { return padded_keys * padded_dim; }
  int64_t square() const { return padded_keys * lane_count; }  // elements of the group's scores

  // Long sequences are worth turning before their dot products: then no sums across lanes are left.
  bool turns() const { return padded_queries >= W; }
  int64_t turned() const { return turns() ? padded_dim * lane_count : 0; }
};

// The frame that a head with this offset reads as its key `s`.
I2V_INLINE int64_t source(int64_t s, int64_t offset, int64_t frames) { return std::clamp<int64_t>(s + offset, 0, frames - 1); }

I2V_INLINE int64_t offset_of(const Problem& p, int64_t h) { return p.offsets ? p.offsets[h] : 0; }

// `ahead` elements further lies what the next call will copy: frames are too far apart for the hardware to foresee it.
template <typename T, typename A>
I2V_INLINE void copy_in(const Layout<A>& l, const T* frames, int64_t count, int64_t offset, int64_t stride, int64_t ahead,
                        A* target) {
  const int W = Layout<A>::W;
  for (int64_t t = 0; t < count; ++t) {
    const T* row = frames + source(t, offset, count) * stride;
    A* to = target + t * l.padded_dim;
    int64_t d = 0;
    for (int64_t line = 0; line < l.dim; line += 64 / sizeof(T)) __builtin_prefetch(row + ahead + line, 0, 2);
    for (; d + W <= l.dim; d += W) store<A>(to + d, load(row + d));
    if (d < l.dim) store<A>(to + d, load_part(row + d, l.dim - d));
  }
}

// Queries' rows of `words` numbers, `stride` apart, to [word][lane].
template <typename A>
I2V_INLINE void turn(const Layout<A>& l, const A* rows, int64_t words, int64_t stride, A* turned) {
  constexpr int W = Layout<A>::W;
  for (int64_t lane = 0; lane < l.lane_count; lane += W) {
    for (int64_t word = 0; word < words; word += W) {
      Vec<A> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = lane + i < l.padded_queries ? load(rows + (lane + i) * stride + word) : Vec<A>{};
      transpose<A>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store<A>(turned + (word + i) * l.lane_count + lane, x[i]);
    }
  }
}

// Runs block(keys, vectors, j, lane) over all scores, its first two arguments compile-time constants.
template <typename A, typename Block>
I2V_INLINE void for_blocks(const Layout<A>& l, const Block& block) {
  constexpr int W = Layout<A>::W, most = I2V_VECTOR_BYTES == 64 ? 8 : 4;  // 2 x most sums in registers
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  const std::integral_constant<int, 4> few;
  int64_t lane = 0;
  for (; lane + 2 * W <= l.lane_count; lane += 2 * W) {
    int64_t j = 0;
    for (; j + most <= l.padded_keys; j += most) block(std::integral_constant<int, most>(), two, j, lane);
    for (; j < l.padded_keys; j += 4) block(few, two, j, lane);
  }
  if (lane < l.lane_count) {
    int64_t j = 0;
    for (; j + 2 * most <= l.padded_keys; j += 2 * most) block(std::integral_constant<int, 2 * most>(), one, j, lane);
    for (; j < l.padded_keys; j += 4) block(few, one, j, lane);
  }
}

// The same as dot_products of turned queries.
template <typename A>
I2V_INLINE void dot_turned(const Layout<A>& l, const A* turned, const A* b, A* out) {
  for_blocks(l, [=](auto keys, auto vectors, int64_t j, int64_t lane) __attribute__((always_inline)) {
    constexpr int W = Layout<A>::W;
    Vec<A> sum[keys][vectors] = {};
    for (int64_t d = 0; d < l.dim; ++d) {
      Vec<A> query[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) query[v] = load(turned + d * l.lane_count + lane + v * W);
#pragma GCC unroll 16
      for (int c = 0; c < keys; ++c) {
        const Vec<A> key = broadcast(b[(j + c) * l.padded_dim + d]);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sum[c][v] += key * query[v];
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < keys; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) store<A>(out + (j + c) * l.lane_count + lane + v * W, sum[c][v]);
  });
}

// out[j][i] = <a_i, b_j>, i in lanes.
template <typename A>
I2V_INLINE void dot_products(const Layout<A>& l, const A* a, const A* b, A* turned, A* out) {
  if (l.turns()) {
    turn(l, a, l.padded_dim, l.padded_dim, turned);
    return dot_turned(l, turned, b, out);
  }
  constexpr int R = Layout<A>::rows, C = Layout<A>::columns, W = Layout<A>::W;
  for (int64_t i = 0; i < l.queries; i += R) {
    for (int64_t j = 0; j < l.keys; j += C) {
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

// Scores to probabilities, in place. `frame[lane]` is the query's frame among the keys, `bias[j][lane]` is added; `valid[j]`
// masks what is read as key j. `lse` receives each lane's logarithm of the sum if it is wanted.
template <typename A>
I2V_INLINE void softmax(const Problem& p, const Layout<A>& l, const A* lane_frame, const A* bias, const bool* valid,
                        int64_t offset, A* scores, A* lse) {
  constexpr int W = Layout<A>::W;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  const Vec<A> minus_infinity = broadcast(-infinity);
  const A scale = A(p.scale), left = p.left < 0 ? infinity : A(p.left), right = p.right < 0 ? infinity : A(p.right);
  for (int64_t lane = 0; lane < l.lane_count; lane += W) {
    const Vec<A> frame = load(lane_frame + lane), first = frame - left, last = frame + right;
    Vec<A> most = minus_infinity;
    typename VecOf<A>::index any = {};
    for (int64_t j = 0; j < l.keys; ++j) {
      A* at = scores + j * l.lane_count + lane;
      Vec<A> x = load(at) * scale;
      if (bias) x += load(bias + j * l.lane_count + lane);
      const auto seen = (first <= A(j)) & (last >= A(j)) & (valid && !valid[source(j, offset, l.keys)] ? 0 : -1);
      x = seen ? x : minus_infinity;
      any |= seen;
      most = x > most ? x : most;
      store<A>(at, x);
    }
    Vec<A> sum = {};
    for (int64_t j = 0; j < l.keys; ++j) {
      A* at = scores + j * l.lane_count + lane;
      const Vec<A> e = exp_nonpositive(load(at) - most);
      sum += e;
      store<A>(at, e);
    }
    if (lse)
      for (int i = 0; i < W; ++i)
        lse[lane + i] = !any[i] ? -infinity : most[i] == infinity ? infinity : most[i] + std::log(sum[i]);
    const Vec<A> inverse = A(1) / sum;
    for (int64_t j = 0; j < l.keys; ++j) {
      A* at = scores + j * l.lane_count + lane;
      const Vec<A> p = load(at) * inverse;
      store<A>(at, any ? p : Vec<A>{});  // a query that sees no frame gives zeros
    }
  }
}

// Weights of sums: weight[r * row_step + c * column_step] for output row r and input row c.
template <typename A>
struct Weights {
  const A* weight;
  int64_t row_step, column_step, rows, columns;
};

// Over keys, for each query; and over queries, for each key: `weight` points to the sequence's first lane.
template <typename A>
I2V_INLINE Weights<A> over_keys(const Layout<A>& l, const A* weight) {
  return {weight, 1, l.lane_count, l.queries, l.keys};
}
template <typename A>
I2V_INLINE Weights<A> over_queries(const Layout<A>& l, const A* weight) {
  return {weight, l.lane_count, 1, l.keys, l.queries};
}

// out[r] = scale * sum_c weight[r, c] * in[c], for NV vectors of the dimension from d on.
template <int NV, typename T, typename A>
I2V_INLINE void mix_columns(const Layout<A>& l, const Weights<A>& w, const A* in, A scale, T* out, int64_t out_stride,
                            int64_t d, bool past_cache) {
  constexpr int W = Layout<A>::W, R = 4;
  for (int64_t r0 = 0; r0 < w.rows; r0 += R) {
    Vec<A> sum[R][NV] = {};
    for (int64_t c = 0; c < w.columns; ++c) {
      Vec<A> x[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) x[v] = load(in + c * l.padded_dim + d + v * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> weight = broadcast(w.weight[(r0 + r) * w.row_step + c * w.column_step]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] += weight * x[v];
      }
    }
    for (int r = 0; r < R && r0 + r < w.rows; ++r) {
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
I2V_INLINE void mix(const Layout<A>& l, const Weights<A>& w, const A* in, A scale, T* out, int64_t out_stride,
                    bool past_cache) {
  constexpr int W = Layout<A>::W, most = I2V_VECTOR_BYTES == 64 ? 4 : 2;  // 4 x most sums in registers
  int64_t d = 0;
  for (; d + most * W <= l.padded_dim; d += most * W) mix_columns<most>(l, w, in, scale, out, out_stride, d, past_cache);
  for (; d < l.padded_dim; d += W) mix_columns<1>(l, w, in, scale, out, out_stride, d, past_cache);
}

// Gradients of the keys that a head with an offset saw, [keys][stride], to the frames they were read from: sums of several at
// the clip's ends, zeros where nobody looked.
template <typename T, typename S>
I2V_INLINE void to_frames(const S* seen, int64_t stride, int64_t keys, int64_t dim, int64_t offset, T* out,
                          int64_t out_stride) {
  for (int64_t frame = 0; frame < keys; ++frame)
    for (int64_t d = 0; d < dim; ++d) {
      accumulate_t<T> sum = 0;
      for (int64_t s = 0; s < keys; ++s)
        if (source(s, offset, keys) == frame) sum += static_cast<accumulate_t<T>>(seen[s * stride + d]);
      out[frame * out_stride + d] = static_cast<T>(sum);
    }
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
I2V_INLINE void expect_writes(const Problem& p, const View<4>& x, int64_t frames, int64_t b, int64_t n, int64_t h) {
  if (p.past_cache) return;
  for (int64_t t = 0; t < frames; ++t)
    for (int64_t d = 0; d < p.dim; d += 64 / sizeof(T)) __builtin_prefetch(at<T>(x, b, n, h) + t * x.stride[1] + d, 1, 3);
}

template <typename A>
I2V_INLINE const A* bias_of(const Problem& p, const Layout<A>& l, int64_t h) {
  return p.bias_lanes ? static_cast<const A*>(p.bias_lanes) + h / l.group * l.square() : nullptr;
}

template <typename A>
I2V_INLINE void fill_lane_frames(const Layout<A>& l, A* lane_frame) {
  for (int64_t lane = 0; lane < l.lane_count; ++lane) {
    const int64_t t = lane % l.padded_queries;
    const bool query = t < l.queries && lane < l.group * l.padded_queries;
    lane_frame[lane] = query ? A(t + l.keys - l.queries) : std::numeric_limits<A>::quiet_NaN();  // which sees no key
  }
}

// Probabilities of the heads [h, h + count) of one token, from memory.
template <typename T, typename A>
I2V_INLINE void probabilities(const Problem& p, const Layout<A>& l, int64_t b, int64_t n, int64_t h, int64_t count,
                              const A* lane_frame, A* q, A* k, A* turned, A* scores, A* lse) {
  const int64_t offset = offset_of(p, h);
  for (int64_t g = 0; g < count; ++g) {
    A *to_q = q + g * l.query_sequence(), *to_k = k + g * l.key_sequence();
    copy_in(l, at<T>(p.q, b, n, h + g), l.queries, 0, p.q.stride[1], next_group(p, l, p.q, h), to_q);
    copy_in(l, at<T>(p.k, b, n, h + g), l.keys, offset, p.k.stride[1], next_group(p, l, p.k, h), to_k);
    dot_products(l, to_q, to_k, turned, scores + g * l.padded_queries);
  }
  softmax(p, l, lane_frame, bias_of(p, l, h), p.mask ? p.mask + b * p.keys : nullptr, offset, scores, lse);
}

// The lanes' log-sum-exps to [B, Tq, N, H].
template <typename A>
I2V_INLINE void write_lse(const Problem& p, const Layout<A>& l, int64_t b, int64_t n, int64_t h, int64_t count, const A* lse) {
  for (int64_t g = 0; g < count; ++g)
    for (int64_t t = 0; t < l.queries; ++t)
      static_cast<A*>(p.lse)[((b * p.queries + t) * p.tokens + n) * p.heads + h + g] = lse[g * l.padded_queries + t];
}

// bias [H, Tq, Tk] into the order in which softmax reads it: [group][key frame][lane].
template <typename T>
void arrange_bias(const Problem& p, const void* bias, void* lanes_out) {
  using A = accumulate_t<T>;
  const Layout<A> l(p);
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.queries; ++i)
      for (int64_t j = 0; j < p.keys; ++j)
        static_cast<A*>(lanes_out)[h / l.group * l.square() + j * l.lane_count + h % l.group * l.padded_queries + i] =
            static_cast<const A*>(bias)[(h * p.queries + i) * p.keys + j];
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
    for (int64_t j = 0; j < l.keys; ++j)
      mean += load(probs + j * l.lane_count + lane) * load(grads + j * l.lane_count + lane);
    for (int64_t j = 0; j < l.keys; ++j) {
      A* at = grads + j * l.lane_count + lane;
      store<A>(at, load(probs + j * l.lane_count + lane) * (load(at) - mean));
    }
  }
}

template <typename A>
I2V_INLINE void add_bias_gradient(const Layout<A>& l, const A* dscores, A* total) {
  for (int64_t i = 0; i < l.queries; ++i)
    for (int64_t j = 0; j < l.keys; ++j) total[i * l.keys + j] += dscores[j * l.lane_count + i];
}

template <typename T>
I2V_INLINE void forward_of(const Problem& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Layout<A> l(p);
  Scratch<A> memory(l.group * (l.query_sequence() + 2 * l.key_sequence()) + l.square() + 2 * l.lane_count + l.turned());
  A *q = memory.data(), *k = q + l.group * l.query_sequence(), *v = k + l.group * l.key_sequence();
  A *scores = v + l.group * l.key_sequence(), *lane_frame = scores + l.square(), *lse = lane_frame + l.lane_count;
  A* turned = lse + l.lane_count;
  fill_lane_frames(l, lane_frame);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.tokens, n = token % p.tokens;
    for (int64_t h = 0; h < p.heads; h += l.group) {
      const int64_t count = std::min(l.group, p.heads - h);
      for (int64_t g = 0; g < count; ++g) expect_writes<T>(p, p.out, l.queries, b, n, h + g);
      probabilities<T>(p, l, b, n, h, count, lane_frame, q, k, turned, scores, p.lse ? lse : nullptr);
      if (p.lse) write_lse(p, l, b, n, h, count, lse);
      for (int64_t g = 0; g < count; ++g) {
        A* to = v + g * l.key_sequence();
        copy_in(l, at<T>(p.v, b, n, h + g), l.keys, offset_of(p, h), p.v.stride[1], next_group(p, l, p.v, h), to);
        mix(l, over_keys(l, scores + g * l.padded_queries), to, A(1), at<T>(p.out, b, n, h + g), p.out.stride[1],
            p.past_cache);
      }
    }
  }
}

template <typename T>
I2V_INLINE void backward_of(const Problem& p, int64_t begin, int64_t end, void* bias_grad) {
  using A = accumulate_t<T>;
  const Layout<A> l(p);
  const int64_t queries = l.group * l.query_sequence(), keys = l.group * l.key_sequence();
  Scratch<A> memory(2 * queries + 2 * keys + l.key_sequence() + 2 * l.square() + l.lane_count + l.turned());
  A *q = memory.data(), *grad = q + queries, *k = grad + queries, *v = k + keys, *seen = v + keys;
  A *probs = seen + l.key_sequence(), *dscores = probs + l.square(), *lane_frame = dscores + l.square();
  A* turned = lane_frame + l.lane_count;
  fill_lane_frames(l, lane_frame);
  // A gradient of keys or values, which a head with an offset saw elsewhere than they are.
  const auto mix_to_keys = [&](const A* weight, const A* in, A scale, const View<4>& to, int64_t b, int64_t n, int64_t h) {
    T* out = at<T>(to, b, n, h);
    if (offset_of(p, h) == 0) return mix(l, over_queries(l, weight), in, scale, out, to.stride[1], p.past_cache);
    mix(l, over_queries(l, weight), in, scale, seen, l.padded_dim, false);
    to_frames(seen, l.padded_dim, l.keys, l.dim, offset_of(p, h), out, to.stride[1]);
  };
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.tokens, n = token % p.tokens;
    for (int64_t h = 0; h < p.heads; h += l.group) {
      const int64_t count = std::min(l.group, p.heads - h), offset = offset_of(p, h);
      probabilities<T>(p, l, b, n, h, count, lane_frame, q, k, turned, probs, static_cast<A*>(nullptr));
      for (int64_t g = 0; g < count; ++g) {
        A *to_v = v + g * l.key_sequence(), *to_grad = grad + g * l.query_sequence();
        copy_in(l, at<T>(p.v, b, n, h + g), l.keys, offset, p.v.stride[1], next_group(p, l, p.v, h), to_v);
        copy_in(l, at<T>(p.grad, b, n, h + g), l.queries, 0, p.grad.stride[1], next_group(p, l, p.grad, h), to_grad);
        expect_writes<T>(p, p.dv, l.keys, b, n, h + g);
        dot_products(l, to_grad, to_v, turned, dscores + g * l.padded_queries);
      }
      score_gradients(l, probs, dscores);
      for (int64_t g = 0; g < count; ++g) {
        const A *pr = probs + g * l.padded_queries, *ds = dscores + g * l.padded_queries;
        expect_writes<T>(p, p.dk, l.keys, b, n, h + g);
        mix_to_keys(pr, grad + g * l.query_sequence(), A(1), p.dv, b, n, h + g);
        expect_writes<T>(p, p.dq, l.queries, b, n, h + g);
        mix_to_keys(ds, q + g * l.query_sequence(), A(p.scale), p.dk, b, n, h + g);
        mix(l, over_keys(l, ds), k + g * l.key_sequence(), A(p.scale), at<T>(p.dq, b, n, h + g), p.dq.stride[1], p.past_cache);
        if (bias_grad) add_bias_gradient(l, ds, static_cast<A*>(bias_grad) + (h + g) * p.queries * p.keys);
      }
    }
  }
}

#if I2V_ISA == I2V_ISA_AVX512_BF16
#include "cpu_bf16.h"
#endif

// The shapes of most models as constants: of what is inlined above, the loops of a few turns then disappear.
template <typename T, typename Run>
I2V_INLINE void for_shape(const Problem& p, const Run& run) {
  const auto fixed = [&](auto frames) __attribute__((always_inline)) {
    Problem known = p;
    known.queries = known.keys = frames, known.dim = 64;
    run(known);
  };
  if constexpr (sizeof(T) <= 4) {
    if (p.queries == p.keys && p.dim == 64) {
      if (p.keys == 4) return fixed(std::integral_constant<int64_t, 4>());
      if (p.keys == 8) return fixed(std::integral_constant<int64_t, 8>());
      if (p.keys == 16) return fixed(std::integral_constant<int64_t, 16>());
    }
  }
  run(p);
}

template <typename T>
void forward(const Problem& p, int64_t begin, int64_t end) {
  for_shape<T>(p, [=](const Problem& known) __attribute__((always_inline)) { forward_of<T>(known, begin, end); });
}

template <typename T>
void backward(const Problem& p, int64_t begin, int64_t end, void* bias_grad) {
  for_shape<T>(p, [=](const Problem& known) __attribute__((always_inline)) { backward_of<T>(known, begin, end, bias_grad); });
}
