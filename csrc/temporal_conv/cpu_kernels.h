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
I2V_INLINE void store_row(const Problem& p, T* row, Vec<accumulate_t<T>> x, int64_t left) {
  if constexpr (Part) store_part(row, x, left);
  else store_or_stream(row, x, p.past_cache);
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
    store_or_stream(out + c + v * W, finish<false>(p, sum[v], extra ? extra + c + v * W : nullptr, W), p.past_cache);
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

// K neighbouring frames of one token that roll through registers, NV vectors of each: every frame is read once.
template <int K, int NV, bool Part, typename T>
struct Window {
  using A = accumulate_t<T>;
  const T* x;
  int64_t stride, frames, dilation, left;
  Vec<A> at[K][NV];

  // Frame number k of those around frame t; zeros where there is none.
  I2V_INLINE void load_frame(int k, int64_t t) {
    const int64_t from = t + (k - K / 2) * dilation;
    const bool inside = from >= 0 && from < frames;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) at[k][v] = inside ? load_row<Part>(x + from * stride + v * lanes<A>, left) : Vec<A>{};
  }

  // All but the last of the frames around t.
  I2V_INLINE void begin(int64_t t) {
#pragma GCC unroll 8
    for (int k = 0; k < K - 1; ++k) load_frame(k, t);
  }

  I2V_INLINE void roll() {
#pragma GCC unroll 8
    for (int k = 0; k < K - 1; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) at[k][v] = at[k + 1][v];
  }
};

// NV vectors of one token, in one pass over its frames.
template <int K, int NV, bool Part, typename T>
I2V_INLINE void roll_vectors(const Problem& p, int64_t b, int64_t n, int64_t c) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const int64_t left = p.channels - c;
  const A *taps = static_cast<const A*>(p.taps) + c, *bias = p.bias ? static_cast<const A*>(p.bias) + c : nullptr;
  const T* x = row_of<const T>(p.x, b, 0, n) + c;
  const T* extra = p.with_extra != Extra::none ? row_of<const T>(p.extra, b, 0, n) + c : nullptr;
  T* out = row_of<T>(p.out, b, 0, n) + c;
  Window<K, NV, Part, T> window{x, p.x.stride[1], p.frames, p.dilation, left};
  for (int64_t residue = 0; residue < p.dilation; ++residue) {
    window.begin(residue);
    for (int64_t t = residue; t < p.frames; t += p.dilation) {
      window.load_frame(K - 1, t);
      Vec<A> sum[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        sum[v] = bias ? load_row<Part>(bias + v * W, left) : Vec<A>{};
        // the next token's: too many rows at a time for the processor to foresee
        __builtin_prefetch(x + t * p.x.stride[1] + p.x.stride[2] + v * W);
      }
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const int64_t from = t + (k - K / 2) * p.dilation;
        if (from < 0 || from >= p.frames) continue;  // nothing, rather than zero times what may not be finite
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[v] += load_row<Part>(taps + k * p.channels + v * W, left) * window.at[k][v];
      }
      const T* more = extra ? extra + t * p.extra.stride[1] : nullptr;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        store_row<Part>(p, out + t * p.out.stride[1] + v * W, finish<Part>(p, sum[v], more ? more + v * W : nullptr, left), left);
      window.roll();
    }
  }
}

template <int K, typename T>
I2V_INLINE void roll_token(const Problem& p, int64_t b, int64_t n) {
  constexpr int W = lanes<accumulate_t<T>>, NV = K == 3 ? 4 : 2;  // what the registers hold
  int64_t c = 0;
  for (; c + NV * W <= p.channels; c += NV * W) roll_vectors<K, NV, false, T>(p, b, n, c);
  for (; c + W <= p.channels; c += W) roll_vectors<K, 1, false, T>(p, b, n, c);
  if (c < p.channels) roll_vectors<K, 1, true, T>(p, b, n, c);
}

// The tokens [begin, end) of all frames, for kernels of 3, 5 or 7 frames that do not reach over the grid.
template <typename T>
void convolve_tokens(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.tokens, n = item % p.tokens;
    const View<3>& from = p.with_extra == Extra::gradient ? p.extra : p.x;
    if (n < p.prefix)
      for (int64_t t = 0; t < p.frames; ++t) prefix_row(p, row_of<const T>(from, b, t, n), row_of<T>(p.out, b, t, n));
    else if (p.kt == 3) roll_token<3, T>(p, b, n);
    else if (p.kt == 5) roll_token<5, T>(p, b, n);
    else roll_token<7, T>(p, b, n);
  }
}

template <typename A>
I2V_INLINE void add_to(A* sums, Vec<A> x, int64_t count) {
  if (count >= lanes<A>) store<A>(sums, load(sums) + x);
  else store_part(sums, load_part(sums, count) + x, count);
}

// sums[i0 + i] += sum_t grad[t] * x[t + (i0 + i - kt / 2) * dilation], i < K, for one token of the gradient and one of the input.
template <int K, typename T>
I2V_INLINE void correlate(const Problem& p, const T* grad, const T* x, int64_t i0, accumulate_t<T>* sums, int64_t sums_stride) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  for (int64_t c = 0; c < p.channels; c += W) {
    const int64_t left = p.channels - c;
    Vec<A> sum[K] = {};  // of this token alone, then added: long sums lose fewer bits
    for (int64_t t = 0; t < p.frames; ++t) {
      const T* grad_row = grad + t * p.grad.stride[1] + c;
      const Vec<A> g = left >= W ? load(grad_row) : load_part(grad_row, left);
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i) {
        const int64_t from = t + (i0 + i - p.kt / 2) * p.dilation;
        if (from < 0 || from >= p.frames) continue;
        const T* row = x + from * p.x.stride[1] + c;
        sum[i] += g * (left >= W ? load(row) : load_part(row, left));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < K; ++i) {
      add_to(sums + i * sums_stride + c, sum[i], left);
    }
  }
}

// Adds the tokens [begin, end) of all frames to weight_sums [kt * kh * kw, C] and bias_sums [C]; either may be null.
template <typename T>
void weight_sums(const Problem& p, int64_t begin, int64_t end, void* weight_out, void* bias_out) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const int64_t patches = p.tokens - p.prefix, plane = p.kh * p.kw * p.channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / patches, patch = item % patches, y = patch / p.width, x = patch % p.width;
    const T* grad = row_of<const T>(p.grad, b, 0, p.prefix + patch);
    for (int64_t j = 0; weight_out && j < p.kh * p.kw; ++j) {
      const int64_t from_y = y + j / p.kw - p.kh / 2, from_x = x + j % p.kw - p.kw / 2;
      if (from_y < 0 || from_y >= p.height || from_x < 0 || from_x >= p.width) continue;
      const T* from = row_of<const T>(p.x, b, 0, p.prefix + from_y * p.width + from_x);
      for (int64_t i = 0; i < p.kt; i += 3) {
        A* sums = static_cast<A*>(weight_out) + i * plane + j * p.channels;
        if (p.kt - i >= 3) correlate<3>(p, grad, from, i, sums, plane);
        else if (p.kt - i == 2) correlate<2>(p, grad, from, i, sums, plane);
        else correlate<1>(p, grad, from, i, sums, plane);
      }
    }
    for (int64_t c = 0; bias_out && c < p.channels; c += W) {
      const int64_t left = p.channels - c;
      Vec<A> sum = {};
      for (int64_t t = 0; t < p.frames; ++t) {
        const T* row = grad + t * p.grad.stride[1] + c;
        sum += left >= W ? load(row) : load_part(row, left);
      }
      add_to(static_cast<A*>(bias_out) + c, sum, left);
    }
  }
}

// All gradients of NV vectors of one token, in one pass over its frames. The gradients of K neighbouring frames are in the window:
// with the turned kernel they give the gradient of the frame in their middle, with its input they add to the weight's.
template <int K, int NV, bool Part, typename T>
I2V_INLINE void backward_vectors(const Problem& p, int64_t b, int64_t n, int64_t c, accumulate_t<T>* weight_sums,
                                 accumulate_t<T>* bias_sums) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const int64_t left = p.channels - c;
  const A* taps = static_cast<const A*>(p.taps) + c;
  const T* grad = row_of<const T>(p.grad, b, 0, n) + c;
  const T* x = row_of<const T>(p.x, b, 0, n) + c;
  const T* extra = p.with_extra == Extra::add ? row_of<const T>(p.extra, b, 0, n) + c : nullptr;
  T* out = row_of<T>(p.out, b, 0, n) + c;
  Window<K, NV, Part, T> window{grad, p.grad.stride[1], p.frames, p.dilation, left};
  Vec<A> sum[K][NV] = {}, bias_sum[NV] = {};
  for (int64_t residue = 0; residue < p.dilation; ++residue) {
    window.begin(residue);
    for (int64_t t = residue; t < p.frames; t += p.dilation) {
      window.load_frame(K - 1, t);
      Vec<A> at[NV], result[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        at[v] = load_row<Part>(x + t * p.x.stride[1] + v * W, left);
        result[v] = extra ? load_row<Part>(extra + t * p.extra.stride[1] + v * W, left) : Vec<A>{};
        bias_sum[v] += window.at[K / 2][v];
        // the next token's: too many rows at a time for the processor to foresee
        __builtin_prefetch(grad + t * p.grad.stride[1] + p.grad.stride[2] + v * W);
        __builtin_prefetch(x + t * p.x.stride[1] + p.x.stride[2] + v * W);
      }
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const int64_t from = t + (k - K / 2) * p.dilation;
        if (from < 0 || from >= p.frames) continue;  // nothing, rather than zero times what may not be finite
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          result[v] += load_row<Part>(taps + k * p.channels + v * W, left) * window.at[k][v];
          sum[k][v] += at[v] * window.at[k][v];
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store_row<Part>(p, out + t * p.out.stride[1] + v * W, result[v], left);
      window.roll();
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    if (bias_sums) add_to(bias_sums + c + v * W, bias_sum[v], left - v * W);
#pragma GCC unroll 8
    for (int k = 0; weight_sums && k < K; ++k) add_to(weight_sums + (K - 1 - k) * p.channels + c + v * W, sum[k][v], left - v * W);
  }
}

template <int K, typename T>
I2V_INLINE void backward_token(const Problem& p, int64_t b, int64_t n, accumulate_t<T>* weight_sums, accumulate_t<T>* bias_sums) {
  constexpr int W = lanes<accumulate_t<T>>, NV = K == 3 ? 2 : 1;  // what the registers hold
  int64_t c = 0;
  for (; c + NV * W <= p.channels; c += NV * W) backward_vectors<K, NV, false, T>(p, b, n, c, weight_sums, bias_sums);
  for (; c + W <= p.channels; c += W) backward_vectors<K, 1, false, T>(p, b, n, c, weight_sums, bias_sums);
  if (c < p.channels) backward_vectors<K, 1, true, T>(p, b, n, c, weight_sums, bias_sums);
}

// p.out = the gradient of x for the tokens [begin, end) of all frames, and their share is added to the sums [kt, C] and [C]; for
// kernels of 3, 5 or 7 frames that do not reach over the grid.
template <typename T>
void backward_tokens(const Problem& p, int64_t begin, int64_t end, void* weight_out, void* bias_out) {
  using A = accumulate_t<T>;
  A *weight_sums = static_cast<A*>(weight_out), *bias_sums = static_cast<A*>(bias_out);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.tokens, n = item % p.tokens;
    if (n < p.prefix)
      for (int64_t t = 0; t < p.frames; ++t) prefix_row(p, row_of<const T>(p.grad, b, t, n), row_of<T>(p.out, b, t, n));
    else if (p.kt == 3) backward_token<3, T>(p, b, n, weight_sums, bias_sums);
    else if (p.kt == 5) backward_token<5, T>(p, b, n, weight_sums, bias_sums);
    else backward_token<7, T>(p, b, n, weight_sums, bias_sums);
  }
}
