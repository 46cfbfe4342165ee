// temporal_conv on the CPU: the entry points, over the kernels of cpu_kernels.h.
#include <string>
#include <tuple>
#include <vector>

#include "../common/activation.h"
#include "../common/cpu.h"
#include "../common/dispatch.h"

namespace i2v {

// What becomes of an output's sums beyond the activation: `extra` is added, or it is the gradient of what they are before it.
enum class Extra { none, add, gradient };

struct Problem {
  int64_t batch, frames, tokens, channels;
  int64_t kt, kh, kw, height, width, prefix, dilation;
  bool copy_prefix;
  bool past_cache;  // what is read and written exceeds a usual last-level cache: write around it
  View<3> x, out, grad;
  const void* taps;  // [kt * kh * kw, C], in the type of the sums
  const void* bias;  // [C], likewise
  Activation activation;
  Extra with_extra;
  View<3> extra;
  View<5> weight;  // for the kernels that arrange it themselves
  bool turned;     // the kernel is turned round: the adjoint
};

// What convolve_by_columns needs, whatever the instruction set.
constexpr int64_t least_columns = 4, least_channels = 16;

// Channels of a cache line and more in the last block: what a worker of convolve_by_columns has at a time.
template <typename T>
int64_t channel_blocks(const Problem& p) {
  return std::max<int64_t>(p.channels / (64 / static_cast<int64_t>(sizeof(T))), 1);
}

}  // namespace i2v

#define I2V_KERNELS "../temporal_conv/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

Problem describe(const Tensor& x, const Tensor& weight, int64_t height, int64_t width, int64_t prefix,
                 const std::string& prefix_mode, int64_t dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "temporal_conv: x must be a CPU tensor [B, T, N, C]");
  STD_TORCH_CHECK(weight.dim() == 5 && weight.size(0) == x.size(3) && weight.size(1) == 1 && weight.is_cpu() &&
                      weight.scalar_type() == x.scalar_type(),
                  "temporal_conv: weight must be [C, 1, kt, kh, kw] of x's dtype");
  STD_TORCH_CHECK(weight.size(2) % 2 && weight.size(3) % 2 && weight.size(4) % 2, "temporal_conv: kt, kh and kw must be odd");
  STD_TORCH_CHECK(0 <= prefix && prefix <= x.size(2), "temporal_conv: prefix ", prefix, " is not within N=", x.size(2));
  const int64_t patches = x.size(2) - prefix;
  STD_TORCH_CHECK(height >= 0 && width >= 0 && (height == 0 ? patches == 0 : width == patches / height && patches % height == 0),
                  "temporal_conv: prefix + H * W is not N");
  STD_TORCH_CHECK(prefix_mode == "zero" || prefix_mode == "copy", "temporal_conv: prefix_mode '", prefix_mode,
                  "' is not one of zero, copy");
  STD_TORCH_CHECK(dilation >= 1, "temporal_conv: dilation ", dilation, " is below 1");
  check_like(x, x, "x");
  const bool past_cache = exceeds_cache(2 * x.numel() * x.element_size());
  return {x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2), weight.size(3), weight.size(4), height, width, prefix,
          std::min(dilation, std::max<int64_t>(x.size(1), 1)), prefix_mode == "copy", past_cache, View<3>(x), {}, {}, nullptr,
          nullptr, Activation::none, Extra::none, {}, View<5>(weight), false};
}

void check_bias(const std::optional<Tensor>& bias, const Tensor& x) {
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == x.size(3) && bias->scalar_type() == x.scalar_type() &&
                            bias->is_cpu()),
                  "temporal_conv: bias must be [C] of x's dtype");
}

// weight [C, 1, kt, kh, kw] as [taps, C], channels innermost as the tokens lie; the adjoint convolves with the kernel turned round.
template <typename T>
Scratch<accumulate_t<T>> taps_of(const Tensor& weight, bool turned) {
  Scratch<accumulate_t<T>> taps(weight.numel());
  const View<5> w(weight);
  const int64_t channels = weight.size(0), kt = weight.size(2), kh = weight.size(3), kw = weight.size(4), count = kt * kh * kw;
  for (int64_t tap = 0; tap < count; ++tap) {
    const int64_t from = turned ? count - 1 - tap : tap, i = from / (kh * kw), j = from / kw % kh, k = from % kw;
    const T* at = reinterpret_cast<const T*>(w.data) + i * w.stride[2] + j * w.stride[3] + k * w.stride[4];
    for (int64_t c = 0; c < channels; ++c) taps.data()[tap * channels + c] = static_cast<accumulate_t<T>>(at[c * w.stride[0]]);
  }
  return taps;
}

template <typename T>
Scratch<accumulate_t<T>> widened(const Tensor& t) {
  Scratch<accumulate_t<T>> out(t.numel());
  const T* from = static_cast<const T*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i) out.data()[i] = static_cast<accumulate_t<T>>(from[i * t.stride(0)]);
  return out;
}

// Whether the frames of a token roll through registers: the kernels that are compiled so.
bool rolls(const Problem& p) { return p.kh * p.kw == 1 && (p.kt == 3 || p.kt == 5 || p.kt == 7); }

// Whether a few columns at a time lie in registers: square kernels that are compiled so, where rows and vectors are long enough.
bool by_columns(const Problem& p) {
  return p.kh == p.kw && (p.kh == 3 || p.kh == 5) && p.width >= least_columns && p.height > 0 && p.channels >= least_channels;
}

// p.out = the convolution of p.x, or its adjoint.
void convolve_into(Problem p, const Tensor& weight, const std::optional<Tensor>& bias, bool adjoint) {
  for_dtype(weight.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto wide_bias = bias ? widened<T>(*bias) : Scratch<accumulate_t<T>>(0);
    p.bias = bias ? wide_bias.data() : nullptr;
    if constexpr (sizeof(T) < 8) {
      if (by_columns(p)) {
        p.turned = adjoint;
        const auto run = I2V_PICK(convolve_by_columns, T);
        const int64_t blocks = channel_blocks<T>(p), row = 2 * p.tokens * p.channels / blocks * sizeof(T);
        // A worker arranges weights once for the items that it has on end: no more pieces than workers.
        torch::stable::parallel_for(0, p.batch * blocks * p.frames, (64 << 10) / row + 1,
                                    [&](int64_t begin, int64_t end) { run(p, begin, end); });
        return;
      }
    }
    const auto wide_taps = taps_of<T>(weight, adjoint);
    p.taps = wide_taps.data();
    const auto run = rolls(p) ? I2V_PICK(convolve_tokens, T) : I2V_PICK(convolve, T);
    const int64_t items = p.batch * p.tokens * (rolls(p) ? 1 : p.frames);
    for_pieces(items, piece_count(items, 2 * p.batch * p.tokens * p.frames * p.channels * sizeof(T) / std::max<int64_t>(items, 1)),
               [&](int64_t, int64_t begin, int64_t end) { run(p, begin, end); });
  });
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor> bias, int64_t height, int64_t width,
                   int64_t prefix, const std::string prefix_mode, int64_t dilation, const std::string activation,
                   bool residual, const std::string /*backend*/) {
  Problem p = describe(x, weight, height, width, prefix, prefix_mode, dilation);
  check_bias(bias, x);
  Tensor out = empty_dense_like(x);
  p.out = View<3>(out);
  p.activation = activation_of(activation);
  if (residual) p.with_extra = Extra::add, p.extra = p.x;
  convolve_into(p, weight, bias, false);
  return out;
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

// Either sum may be unwanted: an empty tensor then. With `turned` weights p.out becomes the gradient of x on the way.
void weight_sums_into(Problem p, Tensor dweight, Tensor dbias, const Tensor* turned) {
  const int64_t taps = p.kt * p.kh * p.kw, weights = taps * p.channels;
  const bool want_weight = dweight.numel() > 0, want_bias = dbias.numel() > 0;
  for_dtype(dweight.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const auto wide_taps = turned ? taps_of<T>(*turned, true) : Scratch<A>(0);
    p.taps = wide_taps.data();
    const auto run = turned ? I2V_PICK(backward_tokens, T) : I2V_PICK(weight_sums, T);
    const int64_t items = p.batch * (turned ? p.tokens : p.tokens - p.prefix);
    // Summed per piece, then over the pieces in order: at most 16 MiB of partial sums.
    const int64_t most = std::clamp<int64_t>((16 << 20) / std::max<int64_t>(weights * sizeof(A), 1), 1, 64);
    const int64_t pieces = piece_count(items, p.frames * p.channels * 2 * sizeof(T), most);
    Scratch<A> weight_parts(want_weight ? pieces * weights : 0), bias_parts(want_bias ? pieces * p.channels : 0);
    for_pieces(items, pieces, [&](int64_t piece, int64_t begin, int64_t end) {
      run(p, begin, end, want_weight ? weight_parts.data() + piece * weights : nullptr,
          want_bias ? bias_parts.data() + piece * p.channels : nullptr);
    });
    const int64_t channels = p.channels;
    if (want_weight)
      add_pieces<T>(weight_parts, pieces, weights, static_cast<T*>(dweight.data_ptr()),
                    [=](int64_t i) { return i % channels * taps + i / channels; });
    if (want_bias)
      add_pieces<T>(bias_parts, pieces, channels, static_cast<T*>(dbias.data_ptr()), [](int64_t i) { return i; });
  });
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        const std::optional<Tensor> bias, int64_t height, int64_t width,
                                                        int64_t prefix, const std::string prefix_mode, int64_t dilation,
                                                        const std::string activation, bool residual,
                                                        const std::vector<bool> wanted, const std::string /*backend*/) {
  Problem p = describe(x, weight, height, width, prefix, prefix_mode, dilation);
  check_like(grad, x, "grad");
  check_bias(bias, x);
  STD_TORCH_CHECK(wanted.size() == 3, "temporal_conv: wanted names x, weight and bias");
  STD_TORCH_CHECK(bias || !wanted[2], "temporal_conv: no bias is given, so it has no gradient");
  Tensor dx = wanted[0] ? empty_dense_like(x) : empty_of(grad);
  Tensor dweight = wanted[1] ? torch::stable::new_empty(weight, weight.sizes()) : empty_of(grad);
  Tensor dbias = wanted[2] ? torch::stable::new_empty(weight, std::vector<int64_t>{weight.size(0)}) : empty_of(grad);
  p.grad = View<3>(grad);
  std::optional<Tensor> before;  // the gradient before the activation
  if (!activation.empty()) {
    before = empty_dense_like(grad);
    Problem again = p;
    again.out = View<3>(*before);
    again.activation = activation_of(activation);
    again.with_extra = Extra::gradient, again.extra = p.grad;
    convolve_into(again, weight, bias, false);
    p.grad = View<3>(*before);
  }
  if (wanted[0]) {
    p.out = View<3>(dx);
    if (residual) p.with_extra = Extra::add, p.extra = View<3>(grad);
  }
  const bool together = wanted[0] && (wanted[1] || wanted[2]) && rolls(p);
  if (wanted[0] && !together) {
    Problem adjoint = p;
    adjoint.x = p.grad;
    convolve_into(adjoint, weight, std::nullopt, true);
  }
  if (wanted[1] || wanted[2]) weight_sums_into(p, dweight, dbias, together ? &weight : nullptr);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels, CPU, m) {
  I2V_IMPL(m, temporal_conv, convolution);
  I2V_IMPL(m, temporal_conv_backward, convolution_backward);
}

}  // namespace i2v
