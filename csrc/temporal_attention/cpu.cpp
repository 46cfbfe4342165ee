// temporal_attention on the CPU: the entry points, over the kernels of cpu_kernels.h.
#include <string>
#include <tuple>
#include <vector>

#include "../common/cpu.h"
#include "../common/dispatch.h"
#include "problem.h"

#define I2V_KERNELS "../temporal_attention/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

// Whether to write around the cache `tensors` as large as the output; kernels that write 16-bit numbers by half lines do not.
bool writes_past_cache(const Tensor& out, int64_t tensors) {
  const bool whole_lines =
      out.element_size() >= 4 || (out.scalar_type() == ScalarType::BFloat16 && current_isa() == Isa::avx512_bf16);
  return whole_lines && exceeds_cache(tensors * out.numel() * out.element_size());
}

template <typename T>
Scratch<accumulate_t<T>> lanes_of_bias(Problem& p, const std::optional<Tensor>& bias) {
  Scratch<accumulate_t<T>> lanes(bias ? I2V_PICK(bias_lanes_size, T)(p) : 0);
  if (bias) {
    I2V_PICK(arrange_bias, T)(p, bias->const_data_ptr(), lanes.data());
    p.bias_lanes = lanes.data();
  }
  return lanes;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensors k, const Tensors v, const Tensors bias,
                                     const Tensors mask, const Offsets offsets, double scale, int64_t left, int64_t right,
                                     bool want_lse, const std::string /*backend*/) {
  Problem p = describe(q, k, v, bias, mask, offsets, scale, left, right);
  Tensor out = empty_dense_like(k ? q : torch::stable::select(q, 3, 0));
  const ScalarType sums = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> nothing{0}, rows{p.batch, p.queries, p.tokens, p.heads};
  Tensor lse = torch::stable::new_empty(q, want_lse ? rows : nothing, sums);
  p.out = View<4>(out);
  if (want_lse) p.lse = lse.data_ptr();
  p.past_cache = writes_past_cache(out, 4);
  for_dtype(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto lanes = lanes_of_bias<T>(p, bias);
    const auto kernel = I2V_PICK(forward, T);
    const int64_t tokens = p.batch * p.tokens;
    for_pieces(tokens, piece_count(tokens, (p.queries + p.keys) * p.heads * p.dim * 2 * sizeof(T)),
               [&](int64_t, int64_t begin, int64_t end) { kernel(p, begin, end); });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensors k,
                                                              const Tensors v, const Tensors bias, const Tensors mask,
                                                              const Offsets offsets, double scale, int64_t left,
                                                              int64_t right, bool want_bias, const std::string /*backend*/) {
  Problem p = describe(q, k, v, bias, mask, offsets, scale, left, right);
  check_like(grad, k ? q : torch::stable::select(q, 3, 0), "grad");
  STD_TORCH_CHECK(bias || !want_bias, "temporal_attention: no bias is given, so it has no gradient");
  Tensor dq = empty_dense_like(q), dk = k ? empty_dense_like(*k) : empty_of(grad), dv = v ? empty_dense_like(*v) : empty_of(grad);
  Tensor dbias = want_bias ? empty_dense_like(*bias) : empty_of(grad);
  const Triple grads(dq, k ? std::optional(dk) : k, v ? std::optional(dv) : v);
  p.grad = View<4>(grad), p.dq = grads.q, p.dk = grads.k, p.dv = grads.v;
  p.past_cache = writes_past_cache(grad, 7);
  for_dtype(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const auto lanes = lanes_of_bias<T>(p, bias);
    const auto kernel = I2V_PICK(backward, T);
    const int64_t tokens = p.batch * p.tokens, square = p.heads * p.queries * p.keys;
    // Bias gradients are summed per piece, then over the pieces in order: at most 16 MiB of partial sums.
    const int64_t most = want_bias ? std::max<int64_t>(1, std::min<int64_t>(128, (16 << 20) / std::max<int64_t>(square * sizeof(A), 1))) : 128;
    const int64_t pieces = piece_count(tokens, (3 * p.queries + 4 * p.keys) * p.heads * p.dim * sizeof(T), most);
    Scratch<A> partial(want_bias ? pieces * square : 0);
    for_pieces(tokens, pieces, [&](int64_t piece, int64_t begin, int64_t end) {
      kernel(p, begin, end, want_bias ? partial.data() + piece * square : nullptr);
    });
    if (want_bias) {
      A* total = static_cast<A*>(dbias.data_ptr());
      for (int64_t i = 0; i < square; ++i) {
        A sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) sum += partial.data()[piece * square + i];
        total[i] = sum;
      }
    }
  });
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels, CPU, m) {
  I2V_IMPL(m, temporal_attention, attention);
  I2V_IMPL(m, temporal_attention_backward, attention_backward);
}

}  // namespace i2v
