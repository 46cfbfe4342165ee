// Copies: every output element is one input element (or zero), so the cost is the memory traffic, and output that will not
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

// to = the sum of the rows frame 0, 1, ... of `from` that read this frame.
template <typename T>
I2V_INLINE void sum_run(T* to, const T* from, int64_t stride, int64_t first, int64_t last, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  for (int64_t c = 0; c < count; c += W) {
    const int64_t left = count - c;
    Vec<A> sum = {};
    for (int64_t t = first; t < last; ++t) {
      const T* row = from + t * stride + c;
      sum += left >= W ? load(row) : load_part(row, left);
    }
    if (left >= W) store(to + c, sum);
    else store_part(to + c, sum, left);
  }
}

// Channels [first, first + count) of an output frame: the sum over the frames [from, to) of the input, none for zeros.
struct Run {
  int64_t first, count, from, to;
};

I2V_INLINE int64_t runs_of_frame(const Problem& p, int64_t t, Run* runs) {
  int64_t c = 0;
  for (int64_t g = 0; g < p.group_count; c = p.groups[g++].stop) {
    const int64_t offset = p.groups[g].offset;
    runs[g] = {c, p.groups[g].stop - c, 0, 0};
    if (p.adjoint && p.padding == shift::edge) {
      shift::edge_readers(t, offset, p.frames, runs[g].from, runs[g].to);
    } else {
      const int64_t from = shift::source_frame(t, p.adjoint ? -offset : offset, p.frames, p.padding);
      if (from >= 0) runs[g].from = from, runs[g].to = from + 1;
    }
  }
  runs[p.group_count] = {c, p.channels - c, t, t + 1};
  return p.group_count + 1;
}

// Rows (b, t, n): what depends on the frame alone is found once for the tokens of a frame.
template <typename T>
void shift_rows(const Problem& p, int64_t begin, int64_t end) {
  const int64_t stride = p.x.stride[1];
  Scratch<Run> runs(p.group_count + 1);
  for (int64_t row = begin; row < end;) {
    const int64_t first = row % p.tokens, t = row / p.tokens % p.frames, b = row / p.tokens / p.frames;
    const int64_t last = std::min(p.tokens, first + end - row), count = runs_of_frame(p, t, runs.data());
    for (int64_t n = first; n < last; ++n, ++row) {
      const T* clip = reinterpret_cast<const T*>(p.x.data) + b * p.x.stride[0] + n * p.x.stride[2];
      T* out = reinterpret_cast<T*>(p.out.data) + b * p.out.stride[0] + t * p.out.stride[1] + n * p.out.stride[2];
      if (n < p.start || n >= p.stop) {
        copy_run(out, clip + t * stride, p.channels, p.past_cache);
        continue;
      }
      for (const Run* run = runs.data(); run != runs.data() + count; ++run) {
        T* to = out + run->first;
        const T* from = clip + run->first;
        if (run->to - run->from == 1) copy_run(to, from + run->from * stride, run->count, p.past_cache);
        else sum_run(to, from, stride, run->from, run->to, run->count);
      }
    }
  }
}
