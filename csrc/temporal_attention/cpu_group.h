// What is computed of a group of sequences in the first-level cache. Included by cpu_kernels.h.

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

// Which queries of a vector of lanes see a key: `frame[lane]` is the query's frame among the keys, `valid[j]` masks what is
// read as key j.
template <typename A>
struct Sight {
  Vec<A> first, last;
  const bool* valid;
  int64_t offset, keys;

  I2V_INLINE Sight(const Problem& p, const Layout<A>& l, const A* lane_frame, const bool* valid, int64_t offset)
      : valid(valid), offset(offset), keys(l.keys) {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    const Vec<A> frame = load(lane_frame);
    first = frame - (p.left < 0 ? infinity : A(p.left)), last = frame + (p.right < 0 ? infinity : A(p.right));
  }
  I2V_INLINE typename VecOf<A>::index operator()(int64_t j) const {
    return (first <= A(j)) & (last >= A(j)) & (valid && !valid[source(j, offset, keys)] ? 0 : -1);
  }
};

// Scores to probabilities, in place. `bias[j][lane]` is added; `lse` receives each lane's logarithm of the sum if it is wanted.
template <typename A>
I2V_INLINE void softmax(const Problem& p, const Layout<A>& l, const A* lane_frame, const A* bias, const bool* valid,
                        int64_t offset, A* scores, A* lse) {
  constexpr int W = Layout<A>::W;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  const Vec<A> minus_infinity = broadcast(-infinity);
  const A scale = A(p.scale);
  for (int64_t lane = 0; lane < l.lane_count; lane += W) {
    const Sight<A> sight(p, l, lane_frame + lane, valid, offset);
    Vec<A> most = minus_infinity;
    typename VecOf<A>::index any = {};
    for (int64_t j = 0; j < l.keys; ++j) {
      A* at = scores + j * l.lane_count + lane;
      Vec<A> x = load(at) * scale;
      if (bias) x += load(bias + j * l.lane_count + lane);
      const auto seen = sight(j);
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

// dP to dS = P (dP - sum_j P dP), in place; the sum equals <dO, O>, so the output need not be read. Where a query sees no key
// dS is zero even if P and dP are not finite: a NaN must not get to frames that never met it.
template <typename A>
I2V_INLINE void score_gradients(const Problem& p, const Layout<A>& l, const A* lane_frame, const bool* valid, int64_t offset,
                                const A* probs, A* grads) {
  for (int64_t lane = 0; lane < l.lane_count; lane += Layout<A>::W) {
    const Sight<A> sight(p, l, lane_frame + lane, valid, offset);
    Vec<A> mean = {};
    for (int64_t j = 0; j < l.keys; ++j)
      mean += load(probs + j * l.lane_count + lane) * load(grads + j * l.lane_count + lane);
    for (int64_t j = 0; j < l.keys; ++j) {
      A* at = grads + j * l.lane_count + lane;
      const Vec<A> x = load(probs + j * l.lane_count + lane) * (load(at) - mean);
      store<A>(at, sight(j) ? x : Vec<A>{});
    }
  }
}

template <typename A>
I2V_INLINE void add_bias_gradient(const Layout<A>& l, const A* dscores, A* total) {
  for (int64_t i = 0; i < l.queries; ++i)
    for (int64_t j = 0; j < l.keys; ++j) total[i * l.keys + j] += dscores[j * l.lane_count + i];
}
