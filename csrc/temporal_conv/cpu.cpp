// temporal_conv on the CPU: the entry points, over the kernels of cpu_kernels.h.
#include <vector>

#include "../common/cpu.h"

namespace i2v {

struct Problem {
  int64_t batch, frames, tokens, channels;
  int64_t kt, kh, kw, height, width, prefix;
  bool copy_prefix;
  bool past_cache;  // what is read and written exceeds a usual last-level cache: write around it
  View<3> x, out, grad;
  const void* taps;  // [kt * kh * kw, C], in the type of the sums
  const void* bias;  // [C], likewise
};

}  // namespace i2v

#define I2V_KERNELS "../temporal_conv/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

Problem describe(const Tensor& x, const std::vector<int64_t>& kernel, int64_t height, int64_t width, int64_t prefix,
                 bool copy_prefix) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "temporal_conv: x must be a CPU tensor [B, T, N, C]");
  STD_TORCH_CHECK(kernel.size() == 3 && kernel[0] * kernel[1] * kernel[2] <= 343, "temporal_conv: at most 343 taps");
  STD_TORCH_CHECK(prefix >= 0 && prefix + height * width == x.size(2), "temporal_conv: prefix + H * W is not N");
  check_like(x, x, "x");
  const bool past_cache = exceeds_cache(2 * x.numel() * x.element_size());
  return {x.size(0), x.size(1), x.size(2),   x.size(3),  kernel[0],  kernel[1], kernel[2], height, width,
          prefix,    copy_prefix, past_cache, View<3>(x), {},        {},        nullptr,   nullptr};
}

template <typename T>
Scratch<accumulate_t<T>> widened(const Tensor& t) {
  Scratch<accumulate_t<T>> out(t.numel());
  const T* from = static_cast<const T*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i) out.data()[i] = static_cast<accumulate_t<T>>(from[i]);
  return out;
}

void convolution(const Tensor& x, const Tensor& taps, const std::optional<Tensor> bias, Tensor out,
                 const std::vector<int64_t> kernel, int64_t height, int64_t width, int64_t prefix, bool copy_prefix) {
  Problem p = describe(x, kernel, height, width, prefix, copy_prefix);
  check_like(out, x, "out");
  check_contiguous(taps, p.kt * p.kh * p.kw * p.channels, x.scalar_type(), "taps");
  if (bias) check_like(*bias, *bias, "bias"), check_contiguous(*bias, p.channels, x.scalar_type(), "bias");
  p.out = View<3>(out);
  for_dtype(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto wide_taps = widened<T>(taps);
    const auto wide_bias = bias ? widened<T>(*bias) : Scratch<accumulate_t<T>>(0);
    p.taps = wide_taps.data();
    p.bias = bias ? wide_bias.data() : nullptr;
    const auto run = I2V_PICK(convolve, T);
    const int64_t rows = p.batch * p.tokens * p.frames;
    for_pieces(rows, piece_count(rows, p.channels * 2 * sizeof(T)),
               [&](int64_t, int64_t begin, int64_t end) { run(p, begin, end); });
  });
}

// total[i] = sum over the pieces, in order; `order(i)` says where element i goes.
template <typename T, typename Order>
void add_pieces(const Scratch<accumulate_t<T>>& partial, int64_t pieces, int64_t count, T* total, const Order& order) {
  for (int64_t i = 0; i < count; ++i) {
    accumulate_t<T> sum = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += partial.data()[piece * count + i];
    total[order(i)] = static_cast<T>(sum);
  }
}

void weight_gradient(const Tensor& grad, const Tensor& x, const std::optional<Tensor> dweight,
                     const std::optional<Tensor> dbias, const std::vector<int64_t> kernel, int64_t height, int64_t width,
                     int64_t prefix) {
  Problem p = describe(x, kernel, height, width, prefix, false);
  check_like(grad, x, "grad");
  const int64_t taps = p.kt * p.kh * p.kw, weights = taps * p.channels;
  if (dweight) check_contiguous(*dweight, weights, x.scalar_type(), "dweight");
  if (dbias) check_contiguous(*dbias, p.channels, x.scalar_type(), "dbias");
  p.grad = View<3>(grad);
  for_dtype(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const auto run = I2V_PICK(weight_sums, T);
    const int64_t items = p.batch * (p.tokens - p.prefix);
    // Summed per piece, then over the pieces in order: at most 16 MiB of partial sums.
    const int64_t most = std::clamp<int64_t>((16 << 20) / std::max<int64_t>(weights * sizeof(A), 1), 1, 64);
    const int64_t pieces = piece_count(items, p.frames * p.channels * 2 * sizeof(T), most);
    Scratch<A> weight_parts(dweight ? pieces * weights : 0), bias_parts(dbias ? pieces * p.channels : 0);
    for_pieces(items, pieces, [&](int64_t piece, int64_t begin, int64_t end) {
      run(p, begin, end, dweight ? weight_parts.data() + piece * weights : nullptr,
          dbias ? bias_parts.data() + piece * p.channels : nullptr);
    });
    const int64_t channels = p.channels;
    if (dweight)
      add_pieces<T>(weight_parts, pieces, weights, static_cast<T*>(dweight->data_ptr()),
                    [=](int64_t i) { return i % channels * taps + i / channels; });
    if (dbias)
      add_pieces<T>(bias_parts, pieces, channels, static_cast<T*>(dbias->data_ptr()), [](int64_t i) { return i; });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def(
      "temporal_conv(Tensor x, Tensor taps, Tensor? bias, Tensor(a!) out, int[] kernel, int height, int width, int prefix, "
      "bool copy_prefix) -> ()");
  m.def(
      "temporal_conv_weight_grad(Tensor grad, Tensor x, Tensor(a!)? dweight, Tensor(b!)? dbias, int[] kernel, int height, "
      "int width, int prefix) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) {
  m.impl("temporal_conv", TORCH_BOX(&convolution));
  m.impl("temporal_conv_weight_grad", TORCH_BOX(&weight_gradient));
}

}  // namespace i2v
