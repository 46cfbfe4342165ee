// Vectors of I2V_VECTOR_BYTES bytes of float or double, on the compiler's vector extensions. Included once per instruction
// set by for_each_isa.h, inside its namespace: no include guard, no includes.

#define I2V_INLINE inline __attribute__((always_inline))

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(I2V_VECTOR_BYTES)));
  typedef int32_t index __attribute__((vector_size(I2V_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(I2V_VECTOR_BYTES)));
  typedef int64_t index __attribute__((vector_size(I2V_VECTOR_BYTES)));
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
constexpr int lanes = I2V_VECTOR_BYTES / sizeof(A);

typedef uint16_t Half16 __attribute__((vector_size(I2V_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(I2V_VECTOR_BYTES)));

template <typename A>
I2V_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};  // not {} + x: that would turn -0 into +0
}

I2V_INLINE Vec<float> load(const float* p) {
  Vec<float> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

I2V_INLINE Vec<double> load(const double* p) {
  Vec<double> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

I2V_INLINE Vec<float> load(const bf16* p) {
#if I2V_ISA >= I2V_ISA_AVX512  // GCC 12 widens half a vector at a time
  const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif I2V_ISA == I2V_ISA_AVX2
  const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  Half16 half;
  std::memcpy(&half, p, sizeof half);
  const Bits32 wide = __builtin_convertvector(half, Bits32) << 16;
#endif
  Vec<float> x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

I2V_INLINE Vec<float> load(const fp16* p) {
#if I2V_ISA >= I2V_ISA_AVX512
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif I2V_ISA == I2V_ISA_AVX2
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> x;
  for (int i = 0; i < lanes<float>; ++i) x[i] = static_cast<float>(p[i]);
  return x;
#endif
}

template <typename A>
I2V_INLINE void store(A* p, Vec<A> x) {
  std::memcpy(p, &x, sizeof x);
}

I2V_INLINE void store(bf16* p, Vec<float> x) {
#if I2V_ISA == I2V_ISA_AVX512_BF16
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
  Bits32 bits;
  std::memcpy(&bits, &x, sizeof x);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Bits32 quiet = Bits32{} + 0x7fc0;
  const Half16 half = __builtin_convertvector(x == x ? rounded : quiet, Half16);
#endif
  std::memcpy(static_cast<void*>(p), &half, sizeof half);
}

I2V_INLINE void store(fp16* p, Vec<float> x) {
#if I2V_ISA >= I2V_ISA_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif I2V_ISA == I2V_ISA_AVX2
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < lanes<float>; ++i) p[i] = fp16(x[i]);
#endif
}

// Around the cache where asked to and possible: no reading of what is overwritten, nothing pushed out.
template <typename T>
I2V_INLINE void store_or_stream(T* p, Vec<accumulate_t<T>> x, bool past_cache) {
#if I2V_ISA >= I2V_ISA_AVX512
  if constexpr (sizeof(T) >= 4) {
    if (past_cache && reinterpret_cast<uintptr_t>(p) % 64 == 0) {
      _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)x);
      return;
    }
  }
#endif
  store(p, x);
}

// The first `count` lanes, the others zero.
template <typename T>
I2V_INLINE Vec<accumulate_t<T>> load_part(const T* p, int64_t count) {
  T buffer[lanes<accumulate_t<T>>];
  std::memset(static_cast<void*>(buffer), 0, sizeof buffer);
  std::memcpy(static_cast<void*>(buffer), p, count * sizeof(T));
  return load(buffer);
}

template <typename T>
I2V_INLINE void store_part(T* p, Vec<accumulate_t<T>> x, int64_t count) {
  T buffer[lanes<accumulate_t<T>>];
  store(buffer, x);
  std::memcpy(static_cast<void*>(p), buffer, count * sizeof(T));
}

template <typename A>
I2V_INLINE Vec<A> max(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// exp(x) for x <= 0: 0 below the smallest normal number's logarithm, NaN for NaN. Error below 2 units in the last place.
I2V_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> clamped = x < -87.3f ? broadcast(-87.3f) : x;
  const Vec<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (clamped * 1.44269504088896341f + magic) - magic;
  const Vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec<float> y = broadcast(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const VecOf<float>::index power = (__builtin_convertvector(n, VecOf<float>::index) + 127) << 23;
  Vec<float> scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < -87.3f ? Vec<float>{} : y * scale;
}

I2V_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// (a0+a1, a2+a3, ..., b0+b1, b2+b3, ...)
template <typename A>
I2V_INLINE Vec<A> add_pairs(Vec<A> a, Vec<A> b) {
  typename VecOf<A>::index even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<A>; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Lane i of the result is the sum of the lanes of x[i].
template <typename A>
I2V_INLINE Vec<A> sum_each(Vec<A> (&x)[lanes<A>]) {
#pragma GCC unroll 8
  for (int width = lanes<A> / 2; width >= 1; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) x[i] = add_pairs<A>(x[2 * i], x[2 * i + 1]);
  }
  return x[0];
}

// Lane i of x[j] becomes lane j of x[i].
template <typename A>
I2V_INLINE void transpose(Vec<A> (&x)[lanes<A>]) {
  constexpr int W = lanes<A>;
#pragma GCC unroll 8
  for (int width = 1; width < W; width *= 2) {
    typename VecOf<A>::index low, high;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      low[i] = i & width ? W + i - width : i;
      high[i] = i & width ? W + i : i + width;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & width) continue;
      const Vec<A> a = x[i], b = x[i + width];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + width] = __builtin_shuffle(a, b, high);
    }
  }
}
