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

template <typename T>
void shift_rows(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row % p.tokens, t = row / p.tokens % p.frames, b = row / p.tokens / p.frames;
    const T* clip = reinterpret_cast<const T*>(p.x.data) + b * p.x.stride[0] + n * p.x.stride[2];
    T* out = reinterpret_cast<T*>(p.out.data) + b * p.out.stride[0] + t * p.out.stride[1] + n * p.out.stride[2];
    const int64_t stride = p.x.stride[1];
    int64_t c = 0;
    for (int64_t g = 0; g < p.group_count && n >= p.start && n < p.stop; c = p.groups[g++].stop) {
      const int64_t count = p.groups[g].stop - c, offset = p.groups[g].offset;
      if (p.adjoint && p.padding == shift::edge) {
        int64_t first, last;
        shift::edge_readers(t, offset, p.frames, first, last);
        sum_run(out + c, clip + c, stride, first, last, count);
        continue;
      }
      const int64_t from = shift::source_frame(t, p.adjoint ? -offset : offset, p.frames, p.padding);
      if (from < 0) std::memset(static_cast<void*>(out + c), 0, count * sizeof(T));
      else copy_run(out + c, clip + from * stride + c, count, p.past_cache);
    }
    copy_run(out + c, clip + t * stride + c, p.channels - c, p.past_cache);
  }
}
