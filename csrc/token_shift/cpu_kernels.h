// Copies: without a residual every output element is one input element (or zero), so the cost is the memory traffic, and output that will not
// fit the cache is written past it. Included by for_each_isa.h inside the namespace of an instruction set.

template <typename T>
I2V_INLINE void copy_run(T* to, const T* from, int64_t count, bool past_cache) {
#if I2V_ISA >= I2V_ISA_AVX512
  if (past_cache) {
    while (count > 0 && reinterpret_cast<uintptr_t>(to) % 64 != 0) *to++ = *from++, --count;
    constexpr int64_t step = 64 / sizeof(T);
    for (; count >= step; count -= step, to += step, from += step)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
#elif I2V_ISA == I2V_ISA_AVX2
  if (past_cache) {
    while (count > 0 && reinterpret_cast<uintptr_t>(to) % 32 != 0) *to++ = *from++, --count;
    constexpr int64_t step = 32 / sizeof(T);
    for (; count >= step; count -= step, to += step, from += step)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
#endif
  constexpr int64_t step = I2V_VECTOR_BYTES / sizeof(T);
  if (count >= step) {  // inline: groups are short, and a call of memcpy costs as much as copying one
    int64_t i = 0;
    for (; i + step <= count; i += step) std::memcpy(static_cast<void*>(to + i), from + i, I2V_VECTOR_BYTES);
    if (i < count) std::memcpy(static_cast<void*>(to + count - step), from + count - step, I2V_VECTOR_BYTES);
  } else {
    std::memcpy(static_cast<void*>(to), from, count * sizeof(T));
  }
}

// to = the sum of `frames` frames of `from`, of those that read this one, and of `more` if it is given.
template <typename T>
I2V_INLINE void sum_run(T* to, const T* from, int64_t stride, int64_t frames, const T* more, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  for (int64_t c = 0; c < count; c += W) {
    const int64_t left = count - c;
    Vec<A> sum = more == nullptr ? Vec<A>{} : left >= W ? load(more + c) : load_part(more + c, left);
    for (int64_t t = 0; t < frames; ++t) {
      const T* row = from + t * stride + c;
      sum += left >= W ? load(row) : load_part(row, left);
    }
    if (left >= W) store(to + c, sum);
    else store_part(to + c, sum, left);
  }
}

template <typename T>
I2V_INLINE void shift_row(const Problem& p, int64_t b, int64_t t, int64_t n, bool past_cache) {
  T* out = row_of<T>(p.out, b, t, n);
  const T* own = row_of<const T>(p.x, b, t, n);
  if (n < p.start || n >= p.stop || (p.step > 1 && (n - p.start) % p.step != 0)) {
    if (p.residual) sum_run(out, own, 0, 1, own, p.channels);
    else copy_run(out, own, p.channels, past_cache);
    return;
  }
  for (const Run* run = p.runs + t * p.run_count; run != p.runs + (t + 1) * p.run_count; ++run) {
    const T* from = row_of<const T>(p.x, b, run->from, n) + run->first;
    if (run->frames == 1 && !p.residual) copy_run(out + run->first, from, run->count, past_cache);
    else sum_run(out + run->first, from, p.x.stride[1], run->frames, p.residual ? own + run->first : nullptr, run->count);
  }
}

// Rows (b, t, n) as they lie in memory: what a cache serves best.
template <typename T>
void shift_rows(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end;) {
    const int64_t b = row / p.tokens / p.frames, t = row / p.tokens % p.frames, first = row % p.tokens;
    const int64_t last = std::min(p.tokens, first + end - row);
    for (int64_t n = first; n < last; ++n, ++row) shift_row<T>(p, b, t, n, false);
  }
}

template <typename T>
I2V_INLINE void fetch_row(const Problem& p, int64_t b, int64_t t, int64_t n) {
  const T* row = row_of<const T>(p.x, b, t, n);
  for (int64_t c = 0; c < p.channels; c += 64 / sizeof(T)) __builtin_prefetch(row + c);
}

// Few tokens through all frames, each row asked for two frames before its turn: runs that come from several frames are too
// short for the processor to foresee, and what it reads beyond their ends is needed soon.
template <typename T>
void shift_blocks(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / p.blocks, block = i % p.blocks;
    const int64_t first = p.tokens * block / p.blocks, last = p.tokens * (block + 1) / p.blocks;
    for (int64_t t = 0; t < std::min<int64_t>(2, p.frames); ++t)
      for (int64_t n = first; n < last; ++n) fetch_row<T>(p, b, t, n);
    for (int64_t t = 0; t < p.frames; ++t) {
      for (int64_t n = first; n < last; ++n) {
        if (t + 2 < p.frames) fetch_row<T>(p, b, t + 2, n);
        shift_row<T>(p, b, t, n, i % 16 >= p.kept);
      }
    }
  }
}

template <typename T>
I2V_INLINE void move_run(const Problem& p, int64_t b, int64_t n, int64_t to, int64_t from, int64_t first, int64_t count) {
  T* out = row_of<T>(p.out, b, to, n) + first;
  if (from < 0) std::memset(static_cast<void*>(out), 0, count * sizeof(T));
  else if (from != to) std::memcpy(static_cast<void*>(out), row_of<const T>(p.out, b, from, n) + first, count * sizeof(T));
}

// In place: the shifted tokens number [begin, end), all frames of each, walked so that none is written before it was read.
template <typename T>
void shift_in_place(const Problem& p, int64_t begin, int64_t end) {
  const int64_t tokens = (p.stop - p.start + p.step - 1) / p.step, frames = p.frames;
  std::vector<char> saved(p.padding == shift::wrap ? p.channels * sizeof(T) : 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / tokens, n = p.start + i % tokens * p.step;
    for (int64_t g = 0; g + 1 < p.run_count; ++g) {
      const int64_t first = p.runs[g].first, count = p.runs[g].count, offset = p.offsets[g];
      if (offset == 0 || count == 0) continue;
      if (p.padding != shift::wrap) {
        for (int64_t s = 0; s < frames; ++s) {
          const int64_t t = offset > 0 ? frames - 1 - s : s;
          move_run<T>(p, b, n, t, shift::source_frame(t, offset, frames, p.padding), first, count);
        }
        continue;
      }
      // A rotation: frame t takes that of t - offset, and the one that a cycle began with is kept for its end.
      for (int64_t start = 0; start < std::gcd(offset, frames); ++start) {
        std::memcpy(saved.data(), row_of<const T>(p.out, b, start, n) + first, count * sizeof(T));
        int64_t t = start;
        for (int64_t from; (from = shift::source_frame(t, offset, frames, p.padding)) != start; t = from)
          move_run<T>(p, b, n, t, from, first, count);
        std::memcpy(static_cast<void*>(row_of<T>(p.out, b, t, n) + first), saved.data(), count * sizeof(T));
      }
    }
  }
}
