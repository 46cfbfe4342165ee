// Kernels of 3, 5 or 7 frames that do not reach over the grid: the sums of a few frames of one token lie in registers; for the
// gradients its frames roll through them. Included by cpu_kernels.h inside the namespace of an instruction set.

// One token in the frames from t on, `dilation` apart.
template <typename T>
struct Frames {
  const T *x, *extra;  // of frame t; extra may be null
  T* out;
  int64_t x_step, extra_step, out_step;  // to the next of them
  int64_t before, after;                 // how many there are before t, and from it on
};

// NV vectors in up to R frames: each input is read, and widened, once for all their sums, and all are read before the first is written.
template <int K, int R, int NV, bool Part, typename T>
I2V_INLINE void convolve_frames(const Problem& p, const Frames<T>& at, int64_t c, bool bare, bool past_cache) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>, half = K / 2;
  const int64_t left = p.channels - c;
  const A *taps = static_cast<const A*>(p.taps) + c, *bias = static_cast<const A*>(p.bias);
  Vec<A> weight[K][NV], sum[R][NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) weight[k][v] = load_row<Part>(taps + k * p.channels + v * W, left);
    const Vec<A> start = bias ? load_row<Part>(bias + c + v * W, left) : Vec<A>{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r][v] = start;
  }
  const T* x = at.x + c - half * at.x_step;
#pragma GCC unroll 16
  for (int q = -half; q < R + half; ++q, x += at.x_step) {
    if (q < -at.before || q >= at.after) continue;  // nothing, rather than zero times what may not be finite
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const Vec<A> in = load_row<Part>(x + v * W, left);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k)
        if (const int r = q + half - k; r >= 0 && r < R) sum[r][v] += weight[k][v] * in;
    }
  }
  T* out = at.out + c;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r, out += at.out_step) {
    if (r >= at.after) return;
    const T* extra = at.extra ? at.extra + r * at.extra_step + c : nullptr;
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      if (!bare) sum[r][v] = finish<Part>(p, sum[r][v], extra ? extra + v * W : nullptr, left);
      store_row<Part>(out + v * W, sum[r][v], left, past_cache);
    }
  }
}

// The tokens [first, last) of one clip: a few frames of all of them, then the next frames, which find what they share in the cache.
template <int K, typename T>
I2V_INLINE void convolve_run(const Problem& p, int64_t b, int64_t first, int64_t last) {
  constexpr int W = lanes<accumulate_t<T>>, R = 4;
  const int64_t d = p.dilation, channels = p.channels;
  const bool has_extra = p.with_extra != Extra::none, bare = !has_extra && p.activation == Activation::none, past_cache = p.past_cache;
  for (int64_t residue = 0; residue < std::min(d, p.frames); ++residue) {
    const int64_t count = (p.frames - residue + d - 1) / d;
    for (int64_t i = 0; i < count; i += R) {
      const int64_t t = residue + i * d;
      for (int64_t n = first; n < last; ++n) {
        const Frames<T> at{row_of<const T>(p.x, b, t, n), has_extra ? row_of<const T>(p.extra, b, t, n) : nullptr,
                           row_of<T>(p.out, b, t, n),     d * p.x.stride[1],
                           d * p.extra.stride[1],         d * p.out.stride[1],
                           i,                             count - i};
        int64_t c = 0;
        for (; c + 2 * W <= channels; c += 2 * W) convolve_frames<K, R, 2, false, T>(p, at, c, bare, past_cache);
        for (; c + W <= channels; c += W) convolve_frames<K, R, 1, false, T>(p, at, c, bare, past_cache);
        if (c < channels) convolve_frames<K, R, 1, true, T>(p, at, c, bare, past_cache);
      }
    }
  }
}

// The tokens [begin, end) of all clips, for kernels of 3, 5 or 7 frames that do not reach over the grid.
template <typename T>
void convolve_tokens(const Problem& p, int64_t begin, int64_t end) {
  // of a run, 4 KiB of a frame: what its frames share stays in the first-level cache
  const int64_t most = std::max<int64_t>((4 << 10) / std::max<int64_t>(p.channels * sizeof(T), 1), 1);
  for (int64_t item = begin, next; item < end; item = next) {
    const int64_t b = item / p.tokens, n = item % p.tokens;
    const View<3>& from = p.with_extra == Extra::gradient ? p.extra : p.x;
    next = item + 1;
    if (n < p.prefix) {
      for (int64_t t = 0; t < p.frames; ++t) prefix_row(p, row_of<const T>(from, b, t, n), row_of<T>(p.out, b, t, n));
      continue;
    }
    const int64_t count = std::min({most, p.tokens - n, end - item});
    next = item + count;
    if (p.kt == 3) convolve_run<3, T>(p, b, n, n + count);
    else if (p.kt == 5) convolve_run<5, T>(p, b, n, n + count);
    else convolve_run<7, T>(p, b, n, n + count);
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

// All gradients of NV vectors of one token, in one pass over its frames. The gradients of K neighbouring frames are in the window:
// with the turned kernel they give the gradient of the frame in their middle, with its input they add to the weight's.
template <int K, int NV, bool Part, typename T>
I2V_INLINE void backward_vectors(const Problem& p, int64_t b, int64_t n, int64_t c, accumulate_t<T>* weight_sums,
                                 accumulate_t<T>* bias_sums) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const int64_t left = p.channels - c, frames = p.frames, dilation = p.dilation, reach = K / 2 * dilation;
  const int64_t x_frame = p.x.stride[1], grad_frame = p.grad.stride[1], next_x = p.x.stride[2], next_grad = p.grad.stride[2];
  const int64_t out_frame = p.out.stride[1], extra_frame = p.extra.stride[1];
  const bool past_cache = p.past_cache;
  const T* grad = row_of<const T>(p.grad, b, 0, n) + c;
  const T* x = row_of<const T>(p.x, b, 0, n) + c;
  const T* extra = p.with_extra == Extra::add ? row_of<const T>(p.extra, b, 0, n) + c : nullptr;
  T* out = row_of<T>(p.out, b, 0, n) + c;
  Vec<A> weight[K][NV], sum[K][NV] = {}, bias_sum[NV] = {};
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) weight[k][v] = load_row<Part>(static_cast<const A*>(p.taps) + k * p.channels + c + v * W, left);
  Window<K, NV, Part, T> window{grad, grad_frame, frames, dilation, left};
  for (int64_t residue = 0; residue < dilation; ++residue) {
    window.begin(residue);
    for (int64_t t = residue; t < frames; t += dilation) {
      window.load_frame(K - 1, t);
      Vec<A> at[NV], result[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        at[v] = load_row<Part>(x + t * x_frame + v * W, left);
        result[v] = extra ? load_row<Part>(extra + t * extra_frame + v * W, left) : Vec<A>{};
        bias_sum[v] += window.at[K / 2][v];
        if (v * W * sizeof(T) % 64 == 0) {  // the next token's: too many rows at a time for the processor to foresee
          __builtin_prefetch(grad + t * grad_frame + next_grad + v * W);
          __builtin_prefetch(x + t * x_frame + next_x + v * W);
        }
      }
      const bool inside = t >= reach && t + reach < frames;
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const int64_t from = t + (k - K / 2) * dilation;
        if (!inside && (from < 0 || from >= frames)) continue;  // nothing, rather than zero times what may not be finite
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          result[v] += weight[k][v] * window.at[k][v];
          sum[k][v] += at[v] * window.at[k][v];
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store_row<Part>(out + t * out_frame + v * W, result[v], left, past_cache);
      window.roll();
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    if (bias_sums) add_to(bias_sums + c + v * W, bias_sum[v], left - v * W);
    if (!weight_sums) continue;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) add_to(weight_sums + (K - 1 - k) * p.channels + c + v * W, sum[k][v], left - v * W);
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
