// The sums of the weight over the grid. Included by cpu_kernels.h inside the namespace of an instruction set.

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
