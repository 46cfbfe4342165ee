// What joins parts of an attention by their log-sum-exp, a block of query rows at a time: row i of the block is lane i of a
// vector. Included by for_each_isa.h inside the namespace of an instruction set.

// Lane r: <rows r of a, b>; rows behind the last one repeat it.
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

// y = y * scale + x * factor
template <typename T, typename X>
I2V_INLINE void scale_and_add(T* y, accumulate_t<T> scale, const X* x, accumulate_t<T> factor, int64_t channels) {
  constexpr int W = lanes<accumulate_t<T>>;
  int64_t c = 0;
  for (; c + W <= channels; c += W) store(y + c, load(y + c) * scale + load(x + c) * factor);
  const int64_t left = channels - c;
  if (left > 0) store_part(y + c, load_part(y + c, left) * scale + load_part(x + c, left) * factor, left);
}

// Pointers to rows of a head, `count` of them from `first` on, then the last one again.
template <typename T>
I2V_INLINE void point(const View<4>& x, int64_t b, int64_t t, int64_t first, int64_t h, int64_t count, T** rows) {
  T* base = reinterpret_cast<T*>(x.data) + b * x.stride[0] + t * x.stride[1] + h * x.stride[3];
  for (int r = 0; r < lanes<accumulate_t<T>>; ++r) rows[r] = base + (first + (r < count ? r : count - 1)) * x.stride[2];
}

template <typename T>
I2V_INLINE void repeat(const View<4>& x, int64_t b, int64_t t, int64_t m, int64_t h, T** rows) {
  T* row = reinterpret_cast<T*>(x.data) + b * x.stride[0] + t * x.stride[1] + m * x.stride[2] + h * x.stride[3];
  for (int r = 0; r < lanes<accumulate_t<T>>; ++r) rows[r] = row;
}

template <typename A>
I2V_INLINE A* sum_of_row(const View<4>& lse, int64_t b, int64_t t, int64_t l, int64_t h) {
  return reinterpret_cast<A*>(lse.data) + b * lse.stride[0] + t * lse.stride[1] + l * lse.stride[2] + h * lse.stride[3];
}

template <typename A>
I2V_INLINE Vec<A> sums_of_rows(const View<4>& lse, int64_t b, int64_t t, int64_t first, int64_t h, int64_t count) {
  Vec<A> x = {};
  for (int r = 0; r < lanes<A>; ++r) x[r] = *sum_of_row<A>(lse, b, t, first + (r < count ? r : count - 1), h);
  return x;
}

// Where rows have no key at all both are -inf, and what is subtracted must not be.
template <typename A>
I2V_INLINE Vec<A> finite_or_zero(Vec<A> x) {
  return x == -std::numeric_limits<A>::infinity() ? Vec<A>{} : x;
}

// Blocks of rows [begin, end): attention to M more keys is joined to out and lse.
template <typename T>
void attend_extra(const Joining& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  constexpr int most = 16;  // keys at a time: their scores stay in the nearest cache
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i % p.blocks * W, t = i / p.blocks % p.frames, b = i / p.blocks / p.frames;
    const int64_t count = std::min<int64_t>(W, p.rows - first);
    for (int64_t h = 0; h < p.heads; ++h) {
      const T *q[W], *key[W];
      T* out[W];
      point(p.q, b, t, first, h, count, q);
      point(p.out, b, t, first, h, count, out);
      Vec<A> lse = sums_of_rows<A>(p.lse, b, t, first, h, count);
      for (int64_t m0 = 0; m0 < p.keys; m0 += most) {
        const int64_t keys = std::min<int64_t>(most, p.keys - m0);
        Vec<A> score[most], top = lse;
        for (int64_t m = 0; m < keys; ++m) {
          repeat(p.k, b, t, m0 + m, h, key);
          score[m] = products<T>(q, key, p.channels) * static_cast<A>(p.scale);
          top = max<A>(top, score[m]);
        }
        const Vec<A> from = finite_or_zero<A>(top);
        const Vec<A> old = exp_nonpositive(lse - from);
        Vec<A> sum = old;
        for (int64_t m = 0; m < keys; ++m) sum += score[m] = exp_nonpositive(score[m] - from);
        const Vec<A> inverse = 1 / sum;
        for (int r = 0; r < count; ++r) {
          for (int64_t c = 0; c < p.channels; c += W) {
            const int64_t part = std::min<int64_t>(W, p.channels - c);
            Vec<A> y = (part == W ? load(out[r] + c) : load_part(out[r] + c, part)) * (old[r] * inverse[r]);
            for (int64_t m = 0; m < keys; ++m) {
              const T* value = reinterpret_cast<const T*>(p.v.data) + b * p.v.stride[0] + t * p.v.stride[1] +
                               (m0 + m) * p.v.stride[2] + h * p.v.stride[3] + c;
              y += (part == W ? load(value) : load_part(value, part)) * (score[m][r] * inverse[r]);
            }
            if (part == W) store(out[r] + c, y);
            else store_part(out[r] + c, y, part);
          }
        }
        for (int r = 0; r < count; ++r) lse[r] = from[r] + std::log(sum[r]);
      }
      for (int r = 0; r < count; ++r) *sum_of_row<A>(p.lse, b, t, first + r, h) = lse[r];
    }
  }
}

// Frames and heads [begin, end): what M more keys add to dq, and their own gradients; out and lse are those of the whole.
template <typename T>
void attend_extra_backward(const Joining& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  Scratch<A> sums(2 * p.keys * p.channels);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t h = i % p.heads, t = i / p.heads % p.frames, b = i / p.heads / p.frames;
    std::memset(static_cast<void*>(sums.data()), 0, 2 * p.keys * p.channels * sizeof(A));
    for (int64_t first = 0; first < p.rows; first += W) {
      const int64_t count = std::min<int64_t>(W, p.rows - first);
      const T *q[W], *g[W], *o[W], *key[W], *value[W];
      T* dq[W];
      point(p.q, b, t, first, h, count, q);
      point(p.grad, b, t, first, h, count, g);
      point(p.out, b, t, first, h, count, o);
      point(p.dq, b, t, first, h, count, dq);
      const Vec<A> lse = finite_or_zero<A>(sums_of_rows<A>(p.lse, b, t, first, h, count));
      const Vec<A> delta = products<T>(g, o, p.channels);
      for (int64_t m = 0; m < p.keys; ++m) {
        repeat(p.k, b, t, m, h, key);
        repeat(p.v, b, t, m, h, value);
        const Vec<A> score = products<T>(q, key, p.channels) * static_cast<A>(p.scale) - lse;
        const Vec<A> prob = exp_nonpositive(score > 0 ? Vec<A>{} : score);
        const Vec<A> ds = prob * (products<T>(g, value, p.channels) - delta) * static_cast<A>(p.scale);
        A *dk = sums.data() + m * p.channels, *dv = dk + p.keys * p.channels;
        for (int r = 0; r < count; ++r) {
          scale_and_add<T>(dq[r], 1, key[r], ds[r], p.channels);
          scale_and_add<A>(dk, 1, q[r], ds[r], p.channels);
          scale_and_add<A>(dv, 1, g[r], prob[r], p.channels);
        }
      }
    }
    for (int64_t m = 0; m < p.keys; ++m) {
      T *dk[W], *dv[W];
      repeat(p.dk, b, t, m, h, dk);
      repeat(p.dv, b, t, m, h, dv);
      const A* sum = sums.data() + m * p.channels;
      for (int64_t c = 0; c < p.channels; c += W) {
        const int64_t part = std::min<int64_t>(W, p.channels - c);
        store_part(dk[0] + c, load_part(sum + c, part), part);
        store_part(dv[0] + c, load_part(sum + p.keys * p.channels + c, part), part);
      }
    }
  }
}

// Blocks of rows [begin, end): the attention `part`, with its log-sum-exp, is joined to out and lse.
template <typename T>
void join(const Joining& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i % p.blocks * W, t = i / p.blocks % p.frames, b = i / p.blocks / p.frames;
    const int64_t count = std::min<int64_t>(W, p.rows - first);
    for (int64_t h = 0; h < p.heads; ++h) {
      const T* part[W];
      T* out[W];
      point(p.part, b, t, first, h, count, part);
      point(p.out, b, t, first, h, count, out);
      const Vec<A> mine = sums_of_rows<A>(p.lse, b, t, first, h, count);
      const Vec<A> its = sums_of_rows<A>(p.part_lse, b, t, first, h, count);
      const Vec<A> from = finite_or_zero<A>(max<A>(mine, its));
      const Vec<A> old = exp_nonpositive(mine - from), add = exp_nonpositive(its - from), sum = old + add;
      const Vec<A> inverse = sum > 0 ? 1 / sum : sum;  // neither has a key: both are zeros
      for (int r = 0; r < count; ++r) {
        scale_and_add<T>(out[r], old[r] * inverse[r], part[r], add[r] * inverse[r], p.channels);
        *sum_of_row<A>(p.lse, b, t, first + r, h) = from[r] + std::log(sum[r]);
      }
    }
  }
}
