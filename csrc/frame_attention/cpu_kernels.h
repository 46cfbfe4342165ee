// What joins parts of an attention by their log-sum-exp, a block of query rows at a time: row i of the block is lane i of a
// vector. Included by for_each_isa.h inside the namespace of an instruction set.

// Lane r: <row r of a, row r of b>.
template <typename T>
I2V_INLINE Vec<accumulate_t<T>> products(const T* const* a, const T* const* b, int64_t channels) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  Vec<A> sums[W];
  for (int r = 0; r < W; ++r) {
    Vec<A> sum = {};
    int64_t c = 0;
    for (; c + W <= channels; c += W) sum += load(a[r] + c) * load(b[r] + c);
    if (c < channels) sum += load_part(a[r] + c, channels - c) * load_part(b[r] + c, channels - c);
    sums[r] = sum;
  }
  return sum_each<A>(sums);
}

constexpr int most = 16;  // keys at a time: their scores stay in the nearest cache

// Keys first, ... of a frame, of heads [head, head + heads): widened and padded to vectors, [count, heads, width].
template <typename T>
I2V_INLINE void widen(const View<4>& x, int64_t b, int64_t t, int64_t first, int64_t count, int64_t head, int64_t heads,
                      int64_t channels, int64_t width, accumulate_t<T>* to) {
  constexpr int W = lanes<accumulate_t<T>>;
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t h = 0; h < heads; ++h, to += width) {
      const T* row = reinterpret_cast<const T*>(x.data) + b * x.stride[0] + t * x.stride[1] + (first + m) * x.stride[2] +
                     (head + h) * x.stride[3];
      for (int64_t c = 0; c < channels; c += W)
        store(to + c, channels - c >= W ? load(row + c) : load_part(row + c, channels - c));
    }
  }
}

// score[m]: lane r is <row r, key m of its head>, of keys as `widen` leaves them, `step` apart.
template <typename T>
I2V_INLINE void scores_of(const T* const* rows, const int64_t* place, const accumulate_t<T>* keys, int64_t step, int64_t count,
                          int64_t channels, Vec<accumulate_t<T>>* score) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  Vec<A> sums[most][W];
  for (int r = 0; r < W; ++r) {
    for (int64_t m = 0; m < count; ++m) {
      const A* key = keys + m * step + place[r];
      Vec<A> sum = {};
      int64_t c = 0;
      for (; c + W <= channels; c += W) sum += load(rows[r] + c) * load(key + c);
      if (c < channels) sum += load_part(rows[r] + c, channels - c) * load(key + c);
      sums[m][r] = sum;
    }
  }
  for (int64_t m = 0; m < count; ++m) score[m] = sum_each<A>(sums[m]);
}

// y = y * scale + x * factor
template <typename T>
I2V_INLINE void scale_and_add(T* y, accumulate_t<T> scale, const T* x, accumulate_t<T> factor, int64_t channels) {
  constexpr int W = lanes<accumulate_t<T>>;
  int64_t c = 0;
  for (; c + W <= channels; c += W) store(y + c, load(y + c) * scale + load(x + c) * factor);
  const int64_t left = channels - c;
  if (left > 0) store_part(y + c, load_part(y + c, left) * scale + load_part(x + c, left) * factor, left);
}

// A vector's worth of rows: a row of a head is a lane, heads of a token beside each other as in memory; `count` of them,
// then the last one again.
template <typename A>
struct Rows {
  int64_t b, t, count, token[lanes<A>], head[lanes<A>];
};

template <typename A>
I2V_INLINE Rows<A> rows_from(int64_t b, int64_t t, int64_t first, int64_t end, int64_t head, int64_t heads) {
  Rows<A> x{b, t, std::min<int64_t>(lanes<A>, end - first)};
  int64_t token = first / heads, h = first % heads;
  for (int r = 0; r < lanes<A>; ++r) {
    x.token[r] = token, x.head[r] = head + h;
    if (r + 1 < x.count && ++h == heads) h = 0, ++token;
  }
  return x;
}

template <typename T, typename A>
I2V_INLINE void point(const View<4>& x, const Rows<A>& at, T** rows) {
  T* base = reinterpret_cast<T*>(x.data) + at.b * x.stride[0] + at.t * x.stride[1];
  for (int r = 0; r < lanes<A>; ++r) rows[r] = base + at.token[r] * x.stride[2] + at.head[r] * x.stride[3];
}

template <typename A>
I2V_INLINE Vec<A> sums_of(const View<4>& lse, const Rows<A>& at) {
  const A* rows[lanes<A>];
  point(lse, at, rows);
  Vec<A> x;
  for (int r = 0; r < lanes<A>; ++r) x[r] = *rows[r];
  return x;
}

template <typename A>
I2V_INLINE void put_sums(const View<4>& lse, const Rows<A>& at, Vec<A> x) {
  A* rows[lanes<A>];
  point(lse, at, rows);
  for (int r = 0; r < at.count; ++r) *rows[r] = x[r];
}

// Where rows have no key at all both are -inf, and what is subtracted must not be.
template <typename A>
I2V_INLINE Vec<A> finite_or_zero(Vec<A> x) {
  return x == -std::numeric_limits<A>::infinity() ? Vec<A>{} : x;
}

template <typename A>
I2V_INLINE Vec<A> logarithms(Vec<A> x) {
  for (int r = 0; r < lanes<A>; ++r) x[r] = std::log(x[r]);
  return x;
}

// Blocks of tokens [begin, end): attention to M more keys is joined to out and lse.
template <typename T>
void attend_extra(const Joining& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const int64_t width = (p.channels + W - 1) / W * W, step = p.heads * width;
  Scratch<A> wide(2 * most * step);
  A *wide_k = wide.data(), *wide_v = wide_k + most * step;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i % p.blocks * p.block, t = i / p.blocks % p.frames, b = i / p.blocks / p.frames;
    const int64_t stop = std::min(first + p.block, p.rows) * p.heads;
    for (int64_t m0 = 0; m0 < p.keys; m0 += most) {
      const int64_t keys = std::min<int64_t>(most, p.keys - m0);
      widen<T>(p.k, b, t, m0, keys, 0, p.heads, p.channels, width, wide_k);
      widen<T>(p.v, b, t, m0, keys, 0, p.heads, p.channels, width, wide_v);
      for (int64_t j = first * p.heads; j < stop; j += W) {
        const Rows<A> at = rows_from<A>(b, t, j, stop, 0, p.heads);
        const T* q[W];
        T* out[W];
        point(p.q, at, q);
        point(p.out, at, out);
        int64_t place[W];
        for (int r = 0; r < W; ++r) place[r] = at.head[r] * width;
        const Vec<A> lse = sums_of(p.lse, at);
        Vec<A> score[most + 1], top = lse;
        scores_of<T>(q, place, wide_k, step, keys, p.channels, score);
        for (int64_t m = 0; m < keys; ++m) top = max<A>(top, score[m] *= static_cast<A>(p.scale));
        const Vec<A> from = finite_or_zero<A>(top);
        Vec<A> sum = score[keys] = exp_nonpositive(lse - from);
        for (int64_t m = 0; m < keys; ++m) sum += score[m] = exp_nonpositive(score[m] - from);
        A weight[most + 1][W];
        for (int64_t m = 0; m <= keys; ++m) store(weight[m], score[m] / sum);
        for (int r = 0; r < at.count; ++r) {
          for (int64_t c = 0; c < p.channels; c += W) {
            const int64_t part = std::min<int64_t>(W, p.channels - c);
            Vec<A> y = (part == W ? load(out[r] + c) : load_part(out[r] + c, part)) * weight[keys][r];
            for (int64_t m = 0; m < keys; ++m) y += load(wide_v + m * step + place[r] + c) * weight[m][r];
            if (part == W) store(out[r] + c, y);
            else store_part(out[r] + c, y, part);
          }
        }
        put_sums(p.lse, at, from + logarithms<A>(sum));
      }
    }
  }
}

// Frames and groups of heads [begin, end): what M more keys add to dq, and their own gradients; out and lse are of the whole.
template <typename T>
void attend_extra_backward(const Joining& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const int64_t width = (p.channels + W - 1) / W * W, step = p.block * width;
  Scratch<A> wide(4 * most * step);
  A *wide_k = wide.data(), *wide_v = wide_k + most * step, *sum_k = wide_v + most * step, *sum_v = sum_k + most * step;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % p.blocks * p.block, t = i / p.blocks % p.frames, b = i / p.blocks / p.frames;
    const int64_t heads = std::min(p.block, p.heads - head), stop = p.rows * heads;
    for (int64_t m0 = 0; m0 < p.keys; m0 += most) {
      const int64_t keys = std::min<int64_t>(most, p.keys - m0);
      widen<T>(p.k, b, t, m0, keys, head, heads, p.channels, width, wide_k);
      widen<T>(p.v, b, t, m0, keys, head, heads, p.channels, width, wide_v);
      std::memset(static_cast<void*>(sum_k), 0, 2 * most * step * sizeof(A));
      for (int64_t j = 0; j < stop; j += W) {
        const Rows<A> at = rows_from<A>(b, t, j, stop, head, heads);
        const T *q[W], *g[W], *o[W];
        T* dq[W];
        point(p.q, at, q);
        point(p.grad, at, g);
        point(p.out, at, o);
        point(p.dq, at, dq);
        int64_t place[W];
        for (int r = 0; r < W; ++r) place[r] = (at.head[r] - head) * width;
        const Vec<A> lse = finite_or_zero<A>(sums_of(p.lse, at));
        const Vec<A> delta = products<T>(g, o, p.channels);
        Vec<A> score[most], dp[most];
        scores_of<T>(q, place, wide_k, heads * width, keys, p.channels, score);
        scores_of<T>(g, place, wide_v, heads * width, keys, p.channels, dp);
        A prob[most][W], ds[most][W];
        for (int64_t m = 0; m < keys; ++m) {
          const Vec<A> above = score[m] * static_cast<A>(p.scale) - lse;
          const Vec<A> found = exp_nonpositive(above > 0 ? Vec<A>{} : above);
          store(prob[m], found);
          store(ds[m], found * (dp[m] - delta) * static_cast<A>(p.scale));
        }
        for (int r = 0; r < at.count; ++r) {
          for (int64_t c = 0; c < p.channels; c += W) {
            const int64_t part = std::min<int64_t>(W, p.channels - c);
            const Vec<A> query = part == W ? load(q[r] + c) : load_part(q[r] + c, part);
            const Vec<A> grad = part == W ? load(g[r] + c) : load_part(g[r] + c, part);
            Vec<A> y = part == W ? load(dq[r] + c) : load_part(dq[r] + c, part);
            for (int64_t m = 0; m < keys; ++m) {
              const int64_t at_key = m * heads * width + place[r] + c;
              y += load(wide_k + at_key) * ds[m][r];
              store(sum_k + at_key, load(sum_k + at_key) + query * ds[m][r]);
              store(sum_v + at_key, load(sum_v + at_key) + grad * prob[m][r]);
            }
            if (part == W) store(dq[r] + c, y);
            else store_part(dq[r] + c, y, part);
          }
        }
      }
      for (int64_t m = 0; m < keys; ++m) {
        for (int64_t h = 0; h < heads; ++h) {
          T* dk = reinterpret_cast<T*>(p.dk.data) + b * p.dk.stride[0] + t * p.dk.stride[1] + (m0 + m) * p.dk.stride[2] +
                  (head + h) * p.dk.stride[3];
          T* dv = reinterpret_cast<T*>(p.dv.data) + b * p.dv.stride[0] + t * p.dv.stride[1] + (m0 + m) * p.dv.stride[2] +
                  (head + h) * p.dv.stride[3];
          for (int64_t c = 0; c < p.channels; c += W) {
            const int64_t part = std::min<int64_t>(W, p.channels - c), at_key = (m * heads + h) * width + c;
            store_part(dk + c, load(sum_k + at_key), part);
            store_part(dv + c, load(sum_v + at_key), part);
          }
        }
      }
    }
  }
}

// Blocks of tokens [begin, end): the attention `part`, with its log-sum-exp, is joined to out and lse.
template <typename T>
void join(const Joining& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i % p.blocks * p.block, t = i / p.blocks % p.frames, b = i / p.blocks / p.frames;
    const int64_t stop = std::min(first + p.block, p.rows) * p.heads;
    for (int64_t j = first * p.heads; j < stop; j += W) {
      const Rows<A> at = rows_from<A>(b, t, j, stop, 0, p.heads);
      const T* part[W];
      T* out[W];
      point(p.part, at, part);
      point(p.out, at, out);
      const Vec<A> mine = sums_of(p.lse, at), its = sums_of(p.part_lse, at);
      const Vec<A> from = finite_or_zero<A>(max<A>(mine, its));
      const Vec<A> old = exp_nonpositive(mine - from), add = exp_nonpositive(its - from), sum = old + add;
      const Vec<A> inverse = sum > 0 ? 1 / sum : sum;  // neither has a key: both are zeros
      for (int r = 0; r < at.count; ++r)
        scale_and_add<T>(out[r], old[r] * inverse[r], part[r], add[r] * inverse[r], p.channels);
      put_sums(p.lse, at, from + logarithms<A>(sum));
    }
  }
}
