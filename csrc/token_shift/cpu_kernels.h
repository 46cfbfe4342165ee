// Copies: every output element is one input element (or zero), so the cost is the memory traffic, and output that will not
// fit the cache is written past it. `residual` adds the element's own value: kernels of their own, whose runs are all sums.
// Included by for_each_isa.h inside the namespace of an instruction set.

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

// to = the sum of `frames` frames of `from`, of those that read this one; and of `own` if there is a residual.
template <typename T, bool residual>
I2V_INLINE void sum_run(T* to, const T* own, const T* from, int64_t stride, int64_t frames, int64_t count, bool past_cache) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  int64_t c = 0;
  if (residual && frames == 1)  // nearly all of them: no loop within the loop
    for (; c + W <= count; c += W) store_or_stream(to + c, load(own + c) + load(from + c), past_cache);
  for (; c < count; c += W) {
    const int64_t left = count - c;
    Vec<A> sum = {};
    if constexpr (residual) sum = left >= W ? load(own + c) : load_part(own + c, left);
    for (int64_t t = 0; t < frames; ++t) {
      const T* row = from + t * stride + c;
      sum += left >= W ? load(row) : load_part(row, left);
    }
    if (left >= W) store_or_stream(to + c, sum, residual && past_cache);
    else store_part(to + c, sum, left);
  }
}

I2V_INLINE bool stays(const Problem& p, int64_t n) {
  return n < p.start || n >= p.stop || (p.step > 1 && (n - p.start) % p.step != 0);
}

// The channels of one run, of a token that is shifted.
template <typename T, bool residual>
I2V_INLINE void shift_run(const Problem& p, const Run& run, T* out, const T* own, int64_t b, int64_t n, bool past_cache) {
  const T* from = row_of<const T>(p.x, b, run.from, n) + run.first;
  if (!residual && run.frames == 1) copy_run(out + run.first, from, run.count, past_cache);
  else sum_run<T, residual>(out + run.first, own + run.first, from, p.x.stride[1], run.frames, run.count, past_cache);
}

// Channels of a token that stays.
template <typename T, bool residual>
I2V_INLINE void keep_run(T* out, const T* own, int64_t count, bool past_cache) {
  if constexpr (residual) sum_run<T, true>(out, own, own, 0, 1, count, past_cache);
  else copy_run(out, own, count, past_cache);
}

template <typename T, bool residual>
I2V_INLINE void shift_row(const Problem& p, int64_t b, int64_t t, int64_t n, bool past_cache) {
  T* out = row_of<T>(p.out, b, t, n);
  const T* own = row_of<const T>(p.x, b, t, n);
  if (stays(p, n)) return keep_run<T, residual>(out, own, p.channels, past_cache);
  for (const Run* run = p.runs + t * p.run_count; run != p.runs + (t + 1) * p.run_count; ++run)
    shift_run<T, residual>(p, *run, out, own, b, n, past_cache);
}

// Rows (b, t, n) as they lie in memory: what a cache serves best.
template <typename T, bool residual>
void shift_rows(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end;) {
    const int64_t b = row / p.tokens / p.frames, t = row / p.tokens % p.frames, first = row % p.tokens;
    const int64_t last = std::min(p.tokens, first + end - row);
    for (int64_t n = first; n < last; ++n, ++row) shift_row<T, residual>(p, b, t, n, false);
  }
}

template <typename T>
I2V_INLINE void fetch_row(const Problem& p, int64_t b, int64_t t, int64_t n) {
  const T* row = row_of<const T>(p.x, b, t, n);
  for (int64_t c = 0; c < p.channels; c += 64 / sizeof(T)) __builtin_prefetch(row + c);
}

// Few tokens through all frames, each row asked for two frames before its turn: runs that come from several frames are too
// short for the processor to foresee, and what it reads beyond their ends is needed soon.
template <typename T, bool residual>
void shift_blocks(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / p.blocks, block = i % p.blocks;
    const int64_t first = p.tokens * block / p.blocks, last = p.tokens * (block + 1) / p.blocks;
    for (int64_t t = 0; t < std::min<int64_t>(2, p.frames); ++t)
      for (int64_t n = first; n < last; ++n) fetch_row<T>(p, b, t, n);
    for (int64_t t = 0; t < p.frames; ++t) {
      for (int64_t n = first; n < last; ++n) {
        if (t + 2 < p.frames) fetch_row<T>(p, b, t + 2, n);
        shift_row<T, residual>(p, b, t, n, i % 16 >= p.kept);
      }
    }
  }
}

// Rows as long as a frame of a network's planes: run by run, each through all frames.
template <typename T, bool residual>
void shift_long_rows(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = i % p.run_count, n = i / p.run_count % p.tokens, b = i / p.run_count / p.tokens;
    const bool past_cache = p.past_cache && i % 16 >= p.kept;
    for (int64_t t = 0; t < p.frames; ++t) {
      const Run& run = p.runs[t * p.run_count + r];
      T* out = row_of<T>(p.out, b, t, n);
      const T* own = row_of<const T>(p.x, b, t, n);
      if (stays(p, n)) keep_run<T, residual>(out + run.first, own + run.first, run.count, past_cache);
      else shift_run<T, residual>(p, run, out, own, b, n, past_cache);
    }
  }
}

// A group's channels [first, first + count) of one token, turned round the clip in cycles: one row of each waits aside.
template <typename T>
I2V_INLINE void rotate_frames(const InPlace& p, int64_t b, int64_t n, int64_t first, int64_t count, int64_t offset) {
  constexpr int64_t room = 1024 / sizeof(T);
  T aside[room];
  const int64_t cycles = std::gcd(p.frames, offset);
  for (int64_t c = first; c < first + count; c += room) {
    const int64_t width = std::min(room, first + count - c);
    for (int64_t cycle = 0; cycle < cycles; ++cycle) {
      copy_run(aside, row_of<const T>(p.x, b, cycle, n) + c, width, false);
      int64_t t = cycle;
      for (;;) {
        const int64_t from = shift::source_frame(t, offset, p.frames, shift::wrap);
        if (from == cycle) break;
        copy_run(row_of<T>(p.x, b, t, n) + c, row_of<const T>(p.x, b, from, n) + c, width, false);
        t = from;
      }
      copy_run(row_of<T>(p.x, b, t, n) + c, aside, width, false);
    }
  }
}

// Few tokens at a time, group by group. What is not "wrap" walks against the offset: no frame is written before it is read.
template <typename T>
void shift_in_place(const InPlace& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / p.blocks, block = i % p.blocks;
    const int64_t from_token = p.start + p.step * (p.tokens * block / p.blocks);
    const int64_t to_token = p.start + p.step * (p.tokens * (block + 1) / p.blocks);
    int64_t first = 0;
    for (const shift::Group* group = p.groups; group != p.groups + p.group_count; first = group++->stop) {
      const int64_t count = group->stop - first, offset = group->offset;
      if (offset == 0) continue;
      if (p.padding == shift::wrap) {
        for (int64_t n = from_token; n < to_token; n += p.step) rotate_frames<T>(p, b, n, first, count, offset);
        continue;
      }
      for (int64_t k = 0; k < p.frames; ++k) {
        const int64_t t = offset > 0 ? p.frames - 1 - k : k;
        const int64_t from = shift::source_frame(t, offset, p.frames, p.padding);
        if (from == t) continue;
        for (int64_t n = from_token; n < to_token; n += p.step) {
          T* to = row_of<T>(p.x, b, t, n) + first;
          if (from < 0) std::memset(static_cast<void*>(to), 0, count * sizeof(T));
          else copy_run(to, row_of<const T>(p.x, b, from, n) + first, count, false);
        }
      }
    }
  }
}
