// Depthwise: channels lie in the vector's lanes, and each weight is a vector loaded beside the tokens it meets.
// Included by for_each_isa.h inside the namespace of an instruction set.
#include "../common/vec_activation.h"

// The inputs of one output row: pointers to rows of x and of the weights.
template <typename T>
struct Taps {
  std::vector<const T*> x;
  std::vector<const accumulate_t<T>*> weight;
  int64_t count = 0;

  explicit Taps(const Problem& p) : x(p.kt * p.kh * p.kw), weight(x.size()) {}
};

template <typename T>
I2V_INLINE void gather(const Problem& p, int64_t b, int64_t t, int64_t n, Taps<T>& taps) {
  const int64_t patch = n - p.prefix, y = patch / p.width, x = patch % p.width;
  const auto* weight = static_cast<const accumulate_t<T>*>(p.taps);
  taps.count = 0;
  for (int64_t i = 0; i < p.kt; ++i) {
    const int64_t from_t = t + (i - p.kt / 2) * p.dilation;
    if (from_t < 0 || from_t >= p.frames) continue;
    for (int64_t j = 0; j < p.kh; ++j) {
      const int64_t from_y = y + j - p.kh / 2;
      if (from_y < 0 || from_y >= p.height) continue;
      for (int64_t k = 0; k < p.kw; ++k) {
        const int64_t from_x = x + k - p.kw / 2;
        if (from_x < 0 || from_x >= p.width) continue;
        taps.x[taps.count] = row_of<const T>(p.x, b, from_t, p.prefix + from_y * p.width + from_x);
        taps.weight[taps.count++] = weight + ((i * p.kh + j) * p.kw + k) * p.channels;
      }
    }
  }
}

template <bool Part, typename T>
I2V_INLINE Vec<accumulate_t<T>> load_row(const T* row, int64_t left) {
  if constexpr (Part) return load_part(row, left);
  else return load(row);
}

template <bool Part, typename T>
I2V_INLINE void store_row(T* row, Vec<accumulate_t<T>> x, int64_t left, bool past_cache) {
  if constexpr (Part) store_part(row, x, left);
  else store_or_stream(row, x, past_cache);
}

// Apart from its callers, which are short without it.
template <typename A>
__attribute__((noinline)) Vec<A> through_activation(const Problem& p, Vec<A> sum, Vec<A> extra) {
  if (p.with_extra == Extra::gradient) return activation_gradient<A>(extra, sum, p.activation);
  return activate<A>(sum, p.activation) + extra;
}

// From the sums of a few channels to their output; extra, which may be null, holds the same channels.
template <bool Part, typename T>
I2V_INLINE Vec<accumulate_t<T>> finish(const Problem& p, Vec<accumulate_t<T>> sum, const T* extra, int64_t left) {
  if (!extra && p.activation == Activation::none) return sum;
  const Vec<accumulate_t<T>> more = extra ? load_row<Part>(extra, left) : Vec<accumulate_t<T>>{};
  return p.activation == Activation::none ? sum + more : through_activation<accumulate_t<T>>(p, sum, more);
}

template <int NV, typename T>
I2V_INLINE void convolve_vectors(const Problem& p, const Taps<T>& taps, const accumulate_t<T>* bias, const T* extra, T* out,
                                 int64_t c) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  Vec<A> sum[NV] = {};
  if (bias)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[v] = load(bias + c + v * W);
  for (int64_t i = 0; i < taps.count; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[v] += load(taps.weight[i] + c + v * W) * load(taps.x[i] + c + v * W);
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v)
    store_row<false>(out + c + v * W, finish<false>(p, sum[v], extra ? extra + c + v * W : nullptr, W), W, p.past_cache);
}

template <typename T>
I2V_INLINE void convolve_row(const Problem& p, const Taps<T>& taps, const T* extra, T* out) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const A* bias = static_cast<const A*>(p.bias);
  int64_t c = 0;
  for (; c + 4 * W <= p.channels; c += 4 * W) convolve_vectors<4>(p, taps, bias, extra, out, c);
  for (; c + W <= p.channels; c += W) convolve_vectors<1>(p, taps, bias, extra, out, c);
  if (const int64_t left = p.channels - c; left > 0) {
    Vec<A> sum = bias ? load_part(bias + c, left) : Vec<A>{};
    for (int64_t i = 0; i < taps.count; ++i) sum += load_part(taps.weight[i] + c, left) * load_part(taps.x[i] + c, left);
    store_part(out + c, finish<true>(p, sum, extra ? extra + c : nullptr, left), left);
  }
}

template <typename T>
I2V_INLINE void prefix_row(const Problem& p, const T* from, T* out) {
  if (p.copy_prefix) std::memcpy(static_cast<void*>(out), from, p.channels * sizeof(T));
  else std::memset(static_cast<void*>(out), 0, p.channels * sizeof(T));
}

// Outputs number (b, n, t), or (b, t, n) where the kernel reaches over the grid, so that neighbours come soon after.
template <typename T>
void convolve(const Problem& p, int64_t begin, int64_t end) {
  const bool over_grid = p.kh * p.kw > 1;
  Taps<T> taps(p);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / (p.tokens * p.frames), rest = i % (p.tokens * p.frames);
    const int64_t n = over_grid ? rest % p.tokens : rest / p.frames, t = over_grid ? rest / p.tokens : rest % p.frames;
    T* out = row_of<T>(p.out, b, t, n);
    if (n >= p.prefix) {
      gather(p, b, t, n, taps);
      convolve_row(p, taps, p.with_extra != Extra::none ? row_of<const T>(p.extra, b, t, n) : nullptr, out);
    } else {
      prefix_row(p, row_of<const T>(p.with_extra == Extra::gradient ? p.extra : p.x, b, t, n), out);
    }
  }
}

template <typename A>
I2V_INLINE void add_to(A* sums, Vec<A> x, int64_t count) {
  if (count >= lanes<A>) store<A>(sums, load(sums) + x);
  else store_part(sums, load_part(sums, count) + x, count);
}

#include "cpu_columns.h"
#include "cpu_frames.h"
#include "cpu_weight.h"
