// From tensors to a launch of cuda_thread.h, for cuda.cu and emulated.cpp alike.
#pragma once

#include "cuda_thread.h"

namespace i2v::conv {

inline Tokens tokens_of(const Tensor& t) {
  const int64_t size = t.element_size();
  return {static_cast<char*>(t.data_ptr()), {t.stride(0) * size, t.stride(1) * size, t.stride(2) * size}};
}

// What both launches share; `tensors` are all that are read or written in vectors.
inline Launch describe(const Tensor& x, const std::vector<int64_t>& kernel, int64_t height, int64_t width, int64_t prefix,
                       int64_t dilation, const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(x.dim() == 4, "temporal_conv: x must be [B, T, N, C]");
  STD_TORCH_CHECK(kernel.size() == 3, "temporal_conv: a kernel has three sizes");
  for (const int64_t size : kernel) STD_TORCH_CHECK(size >= 1 && size % 2 == 1, "temporal_conv: kernel size ", size, " is even");
  STD_TORCH_CHECK(kernel[0] <= 7, "temporal_conv: the CUDA kernels reach over at most 7 frames, not ", kernel[0]);
  STD_TORCH_CHECK(prefix >= 0 && prefix + height * width == x.size(2), "temporal_conv: prefix + H * W is not N");
  STD_TORCH_CHECK(dilation >= 1, "temporal_conv: dilation ", dilation, " is below 1");
  Launch p{};
  p.clips = x.size(0), p.frames = x.size(1), p.tokens = x.size(2), p.channels = x.size(3);
  p.kt = static_cast<int>(kernel[0]), p.kh = static_cast<int>(kernel[1]), p.kw = static_cast<int>(kernel[2]);
  p.height = height, p.width = width, p.prefix = prefix;
  p.dilation = dilation < p.frames ? dilation : p.frames > 0 ? p.frames : 1;
  p.vector_bytes = widest;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.device() == x.device(), "temporal_conv: all of one dtype and device");
    STD_TORCH_CHECK(t.dim() != 4 || t.size(3) <= 1 || t.stride(3) == 1, "temporal_conv: the last stride must be 1");
    p.vector_bytes = common_width(t, p.vector_bytes);
  }
  if (p.vector_bytes < widest) p.vector_bytes = static_cast<int>(x.element_size());  // rare: no kernels of its own
  p.vectors = p.channels * x.element_size() / p.vector_bytes;
  p.x = tokens_of(x);
  return p;
}

inline void set_threads(Launch& p, int64_t threads) {
  p.threads = threads;
  p.blocks = (threads + threads_per_block - 1) / threads_per_block;
  STD_TORCH_CHECK(p.blocks <= INT32_MAX, "temporal_conv: ", p.blocks, " blocks are too many");
}

// body(Thread{}), where Thread::run is what a thread does: one table for the GPU and the emulation.
template <template <typename, int, int> class Thread, typename T, int Bytes, typename Body>
void for_frames(const Launch& p, const Body& body) {
  switch (p.kt) {
    case 1: return body(Thread<T, Bytes, 1>{});
    case 3: return body(Thread<T, Bytes, 3>{});
    case 5: return body(Thread<T, Bytes, 5>{});
    default: return body(Thread<T, Bytes, 7>{});
  }
}

template <template <typename, int, int> class Thread, typename Body>
void for_thread(const Launch& p, ScalarType dtype, const Body& body) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const bool wide = p.vector_bytes == widest;
  switch (dtype) {
    case ScalarType::Float: return wide ? for_frames<Thread, float, 16>(p, body) : for_frames<Thread, float, 4>(p, body);
    case ScalarType::BFloat16:
      return wide ? for_frames<Thread, BFloat16, 16>(p, body) : for_frames<Thread, BFloat16, 2>(p, body);
    case ScalarType::Half: return wide ? for_frames<Thread, Half, 16>(p, body) : for_frames<Thread, Half, 2>(p, body);
    default: STD_TORCH_CHECK(false, "temporal_conv: the CUDA kernels take float32, bfloat16 and float16");
  }
}

// Run::launch(p, thread) runs the launch.
template <typename Run>
void convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor> bias, const std::optional<Tensor> extra,
              Tensor out, const std::vector<int64_t> kernel, int64_t height, int64_t width, int64_t prefix, bool copy_prefix,
              int64_t dilation, const std::string activation, bool gradient) {
  std::vector<Tensor> tensors{x, weight, out};
  if (bias) tensors.push_back(*bias);
  if (extra) tensors.push_back(*extra);
  Launch p = describe(x, kernel, height, width, prefix, dilation, tensors);
  check_like(out, x, "out");
  if (extra) check_like(*extra, x, "extra");
  check_contiguous(weight, kernel[0] * kernel[1] * kernel[2] * p.channels, x.scalar_type(), "weight");
  if (bias) check_contiguous(*bias, p.channels, x.scalar_type(), "bias");
  STD_TORCH_CHECK(extra || !gradient, "temporal_conv: no gradient is given");
  p.out = tokens_of(out);
  if (extra) p.extra = tokens_of(*extra);
  p.weight = static_cast<const char*>(weight.data_ptr());
  p.bias = bias ? static_cast<const char*>(bias->data_ptr()) : nullptr;
  p.activation = activation_of(activation);
  p.copy_prefix = copy_prefix, p.gradient = gradient;
  const int64_t steps = (p.frames + p.dilation - 1) / p.dilation;
  const int frames = frames_per_thread(lanes_of(p.vector_bytes, x.element_size()));
  p.chunks = (steps + frames - 1) / frames;
  set_threads(p, p.clips * p.dilation * p.chunks * p.tokens * p.vectors);
  if (p.threads == 0) return;
  const auto run = [&](auto thread) { Run::launch(p, thread); };
  if (extra || p.activation != Activation::none) for_thread<ConvolveAndFinish>(p, x.scalar_type(), run);
  else for_thread<Convolve>(p, x.scalar_type(), run);
}

template <typename Run>
void weight_sums(const Tensor& grad, const Tensor& x, Tensor weight_sums, Tensor bias_sums, const std::vector<int64_t> kernel,
                 int64_t height, int64_t width, int64_t prefix, int64_t dilation) {
  Launch p = describe(x, kernel, height, width, prefix, dilation, {x, grad});
  check_like(grad, x, "grad");
  const int64_t plane = kernel[1] * kernel[2];
  p.shares = weight_sums.size(0);
  check_contiguous(weight_sums, p.shares * kernel[0] * plane * p.channels, ScalarType::Float, "weight_sums");
  check_contiguous(bias_sums, p.shares * p.channels, ScalarType::Float, "bias_sums");
  STD_TORCH_CHECK(common_width(weight_sums, widest) == widest || p.vector_bytes < widest, "weight_sums: misaligned");
  p.extra = tokens_of(grad);
  p.weight_sums = static_cast<float*>(weight_sums.data_ptr());
  p.bias_sums = static_cast<float*>(bias_sums.data_ptr());
  set_threads(p, p.shares * plane * p.vectors);
  if (p.threads > 0) for_thread<Products>(p, x.scalar_type(), [&](auto thread) { Run::launch(p, thread); });
}

}  // namespace i2v::conv
