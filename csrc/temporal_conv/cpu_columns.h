// Square kernels over the grid. The sums of a few columns and of all rows that an input meets lie in registers: each weight is
// loaded once for the columns, each input once for all its sums. Included by cpu_kernels.h inside an instruction set's namespace.

// Columns at a time, in two sizes that cover a row of the grid with little overlap: what registers hold beside weights and input.
template <int K>
constexpr int wide_columns = I2V_ISA >= I2V_ISA_AVX512 ? (K == 3 ? 7 : 5) : (K == 3 ? 4 : 2);
template <int K>
constexpr int narrow_columns = I2V_ISA >= I2V_ISA_AVX512 ? 4 : 2;

// Whether the processor multiplies pairs and adds both products: here the pairs are a channel in two frames.
template <typename T>
constexpr bool pairs = false;
#if I2V_ISA == I2V_ISA_AVX512_BF16
template <>
inline constexpr bool pairs<bf16> = true;
#endif

// The channels at x; in pairs with those `next` elements on, or with zeros.
template <bool Two, typename T>
I2V_INLINE Vec<accumulate_t<T>> load_input(const T* x, int64_t next) {
#if I2V_ISA == I2V_ISA_AVX512_BF16
  if constexpr (Two) {
    const __m512i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
                                           0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + next));
    return (Vec<float>)_mm512_permutexvar_epi16(order, _mm512_inserti64x4(first, second, 1));
  } else if constexpr (pairs<T>) {
    return (Vec<float>)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
#endif
  if constexpr (!pairs<T>) return load(x);
}

template <typename T>
I2V_INLINE Vec<accumulate_t<T>> add_product(Vec<accumulate_t<T>> sum, Vec<accumulate_t<T>> weight, Vec<accumulate_t<T>> in) {
#if I2V_ISA == I2V_ISA_AVX512_BF16
  if constexpr (pairs<T>) return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)in, (__m512bh)weight);
#endif
  if constexpr (!pairs<T>) return sum + weight * in;
}

// Where the columns lie, and which of the K rows of outputs that a row of inputs meets are rows of the grid.
struct Edges {
  int64_t column, x0, width, low, high;
};

// sum[s][o] += what one row of inputs at x adds to column o of the s-th of the rows of outputs that it meets.
template <int K, int X, bool Two, typename T>
I2V_INLINE void add_row(Vec<accumulate_t<T>> (&sum)[K][X], const T* x, int64_t next, int64_t ahead, const accumulate_t<T>* weight,
                        const Edges& at) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>, half = K / 2;
  Vec<A> kept[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) kept[k] = load(weight + ((K - 1) * K + k) * W);
#pragma GCC unroll 16
  for (int q = -half; q < X + half; ++q) {
    // nothing, rather than zero times what may not be finite
    if ((q < 0 && at.x0 + q < 0) || (q >= X && at.x0 + q >= at.width)) continue;
    const Vec<A> in = load_input<Two>(x + q * at.column, next);
    if (ahead > 0) __builtin_prefetch(x + q * at.column + ahead);  // rows lie too far apart to be foreseen
    if (K > 3) asm volatile("" ::: "memory");  // more weights than registers: loaded where they are used, rather than spilled
#pragma GCC unroll 8
    for (int s = 0; s < K; ++s) {
      if ((s < half && s < at.low) || (s > half && s >= at.high)) continue;
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k)
        if (const int o = q + half - k; o >= 0 && o < X)
          sum[s][o] = add_product<T>(sum[s][o], s == 0 ? kept[k] : load(weight + ((K - 1 - s) * K + k) * W), in);
    }
  }
}

// One vector of channels of the outputs of one frame, and the taps in time that meet a frame.
template <typename T>
struct Plane {
  const Problem& p;
  int64_t b, t, c = 0, first = 0, last;
  const accumulate_t<T>* weight = nullptr;  // as arrange leaves it

  Plane(const Problem& problem, int64_t clip, int64_t frame) : p(problem), b(clip), t(frame), last(problem.kt) {
    while (t + (first - p.kt / 2) * p.dilation < 0) ++first;
    while (t + (last - 1 - p.kt / 2) * p.dilation >= p.frames) --last;
  }
};

// The columns [x0, x0 + X) of all rows: the sums of K rows roll through registers, so that each row of inputs is read once a tap
// in time, or once for two of them.
template <int K, int X, typename T>
I2V_INLINE void convolve_columns(const Plane<T>& at, int64_t x0) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>, half = K / 2;
  const Problem& p = at.p;
  const int64_t height = p.height, first = at.first, last = at.last, frame = p.dilation * p.x.stride[1];
  const int64_t row = p.width * p.x.stride[2], out_column = p.out.stride[2], out_row = p.width * out_column;
  const bool bare = p.with_extra == Extra::none && p.activation == Activation::none, past_cache = p.past_cache;
  const T* x = row_of<const T>(p.x, at.b, at.t - p.kt / 2 * p.dilation, p.prefix + x0) + at.c;
  const T* extra = p.with_extra != Extra::none ? row_of<const T>(p.extra, at.b, at.t, p.prefix + x0) + at.c : nullptr;
  T* out = row_of<T>(p.out, at.b, at.t, p.prefix + x0) + at.c;
  const A *two = at.weight, *one = at.weight + (pairs<T> ? p.kt * K * K * W : 0);
  const Vec<A> bias = p.bias ? load(static_cast<const A*>(p.bias) + at.c) : Vec<A>{};
  const int64_t ahead = at.c * sizeof(T) % 64 == 0 ? 2 * row : 0;  // two rows, asked for once a cache line
  Vec<A> sum[K][X];
#pragma GCC unroll 8
  for (int s = 0; s < K; ++s)
#pragma GCC unroll 8
    for (int o = 0; o < X; ++o) sum[s][o] = bias;
  for (int64_t y = 0; y < height + half; ++y) {
    if (y < height) {
      const Edges edges{p.x.stride[2], x0, p.width, half - y, height + half - y};
      int64_t i = first;
      if constexpr (pairs<T>)
        for (; i + 1 < last; i += 2) {
          const int64_t newest = ahead > 0 && i + 2 == last ? frame + ahead : 0;
          add_row<K, X, true, T>(sum, x + i * frame + y * row, frame, newest, two + i * K * K * W, edges);
        }
      for (; i < last; ++i)
        add_row<K, X, false, T>(sum, x + i * frame + y * row, 0, i + 1 == last ? ahead : 0, one + i * K * K * W, edges);
    }
    if (y >= half) {
      T* to = out + (y - half) * out_row;
      if (ahead > 0 && (sizeof(T) == 2 || !past_cache)) {  // not what is written around the cache
#pragma GCC unroll 8
        for (int o = 0; o < X; ++o) __builtin_prefetch(to + o * out_column + 2 * out_row, 1);
      }
      if (bare) {
#pragma GCC unroll 8
        for (int o = 0; o < X; ++o) store_or_stream(to + o * out_column, sum[0][o], past_cache);
      } else {
#pragma GCC unroll 8
        for (int o = 0; o < X; ++o) {
          const T* more = extra ? extra + ((y - half) * p.width + o) * p.extra.stride[2] : nullptr;
          store_or_stream(to + o * out_column, finish<false>(p, sum[0][o], more, W), past_cache);
        }
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < K; ++s)
#pragma GCC unroll 8
      for (int o = 0; o < X; ++o) sum[s][o] = s + 1 < K ? sum[s + 1][o] : bias;
  }
}

// How many wide blocks of columns begin a row, so that with narrow ones for the rest the fewest columns are computed twice.
template <int K>
I2V_INLINE int64_t wide_blocks(int64_t width) {
  constexpr int64_t wide = wide_columns<K>, narrow = narrow_columns<K>;
  int64_t best = 0, least = 2 * width;
  for (int64_t n = width < wide ? 0 : (width + wide - 1) / wide; n >= 0; --n) {
    const int64_t computed = n * wide + (std::max<int64_t>(width - n * wide, 0) + narrow - 1) / narrow * narrow;
    if (computed < least) best = n, least = computed;
  }
  return best;
}

template <typename T>
constexpr int vectors_per_tap = pairs<T> ? 2 : 1;

// The weights of one vector of channels, tap after tap; where products come in pairs, first each with that of the next frame,
// then each with zeros.
template <typename T>
I2V_INLINE void arrange(const Problem& p, int64_t c, accumulate_t<T>* to) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const View<5>& w = p.weight;
  const int64_t taps = p.kt * p.kh * p.kw, channel = w.stride[0], next = p.turned ? -w.stride[2] : w.stride[2];
  for (int64_t tap = 0; tap < taps; ++tap, to += W) {
    const int64_t at = p.turned ? taps - 1 - tap : tap, i = at / (p.kh * p.kw), j = at / p.kw % p.kh, k = at % p.kw;
    const T* from = reinterpret_cast<const T*>(w.data) + c * channel + i * w.stride[2] + j * w.stride[3] + k * w.stride[4];
    if constexpr (pairs<T>) {
      const bool is_last = tap >= taps - p.kh * p.kw;
      T *two = reinterpret_cast<T*>(to), *one = reinterpret_cast<T*>(to + taps * W);
      for (int l = 0; l < W; ++l, from += channel) {
        two[2 * l] = one[2 * l] = *from;
        two[2 * l + 1] = is_last ? T(0) : from[next];
        one[2 * l + 1] = T(0);
      }
    } else {
      for (int l = 0; l < W; ++l) to[l] = static_cast<A>(from[l * channel]);
    }
  }
}

// Items number (b, block of channels, t), t innermost, so that a worker finds its inputs in its own cache.
template <int K, typename T>
void convolve_blocks(const Problem& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>, wide = wide_columns<K>, narrow = narrow_columns<K>, line = 64 / sizeof(T);
  const int64_t blocks = channel_blocks<T>(p), size = vectors_per_tap<T> * p.kt * K * K * W, wides = wide_blocks<K>(p.width);
  const Scratch<A> weight(size * (2 * line / W));
  int64_t arranged = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / (blocks * p.frames), block = item / p.frames % blocks;
    const int64_t c0 = block * line, c1 = block + 1 < blocks ? c0 + line : p.channels;
    Plane<T> at(p, b, item % p.frames);
    const View<3>& from = p.with_extra == Extra::gradient ? p.extra : p.x;
    for (int64_t n = 0; block == 0 && n < p.prefix; ++n)
      prefix_row(p, row_of<const T>(from, b, at.t, n), row_of<T>(p.out, b, at.t, n));
    A* own = weight.data();
    for (int64_t c = c0; c < c1; c += W, own += size) {
      at.c = std::min(c, c1 - W);  // the last vector may overlap the one before: the same sums once more
      at.weight = own;
      if (arranged != block) arrange<T>(p, at.c, own);
      int64_t x0 = 0;
      for (int64_t n = 0; n < wides; ++n, x0 += wide) convolve_columns<K, wide, T>(at, std::min(x0, p.width - wide));
      for (; x0 < p.width; x0 += narrow) convolve_columns<K, narrow, T>(at, std::min(x0, p.width - narrow));
    }
    arranged = block;
  }
}

template <typename T>
void convolve_by_columns(const Problem& p, int64_t begin, int64_t end) {
  if (p.kh == 3) convolve_blocks<3, T>(p, begin, end);
  else convolve_blocks<5, T>(p, begin, end);
}
