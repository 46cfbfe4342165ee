// temporal_attention on the CPU: the entry points, over the kernels of cpu_kernels.h.
#include "../common/cpu.h"

namespace i2v {

struct Problem {
  int64_t batch, frames, tokens, heads, dim;
  View<4> q, k, v, out, grad, dq, dk, dv;
  const void* bias_lanes;  // see arrange_bias
  const bool* mask;        // [B, T]
  double scale;
  bool causal;
  bool past_cache;  // what is read and written exceeds a usual last-level cache: write around it
};

}  // namespace i2v

#define I2V_KERNELS "../temporal_attention/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

// Whether to write around the cache; kernels that write 16-bit numbers by half lines do not.
bool writes_past_cache(const Tensor& q, int64_t tensors) {
  const bool whole_lines = q.element_size() >= 4 || (q.scalar_type() == ScalarType::BFloat16 && current_isa() == Isa::avx512_bf16);
  return whole_lines && exceeds_cache(tensors * q.numel() * q.element_size());
}

Problem describe(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& mask, double scale, bool causal) {
  STD_TORCH_CHECK(q.dim() == 5 && q.is_cpu(), "temporal_attention: q must be a CPU tensor [B, T, N, H, D]");
  check_like(q, q, "q");
  check_like(k, q, "k");
  check_like(v, q, "v");
  Problem p{q.size(0), q.size(1), q.size(2), q.size(3), q.size(4), View<4>(q), View<4>(k), View<4>(v), {}, {}, {}, {}, {},
            nullptr, nullptr, scale, causal, false};
  const ScalarType sums = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (bias) check_contiguous(*bias, p.heads * p.frames * p.frames, sums, "bias");
  if (mask) {
    check_contiguous(*mask, p.batch * p.frames, ScalarType::Bool, "mask");
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  return p;
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

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor> bias,
               const std::optional<Tensor> mask, Tensor out, double scale, bool causal) {
  Problem p = describe(q, k, v, bias, mask, scale, causal);
  check_like(out, q, "out");
  p.out = View<4>(out);
  p.past_cache = writes_past_cache(q, 4);
  for_dtype(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto lanes = lanes_of_bias<T>(p, bias);
    const auto kernel = I2V_PICK(forward, T);
    const int64_t tokens = p.batch * p.tokens;
    for_pieces(tokens, piece_count(tokens, p.frames * p.heads * p.dim * 4 * sizeof(T)),
               [&](int64_t, int64_t begin, int64_t end) { kernel(p, begin, end); });
  });
}

void attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor> bias, const std::optional<Tensor> mask, Tensor dq, Tensor dk, Tensor dv,
                        Tensor dbias, double scale, bool causal) {
  Problem p = describe(q, k, v, bias, mask, scale, causal);
  check_like(grad, q, "grad");
  check_like(dq, q, "dq");
  check_like(dk, q, "dk");
  check_like(dv, q, "dv");
  p.grad = View<4>(grad), p.dq = View<4>(dq), p.dk = View<4>(dk), p.dv = View<4>(dv);
  p.past_cache = writes_past_cache(q, 7);
  const bool want_bias = bias && dbias.numel() > 0;
  if (want_bias) check_like(dbias, *bias, "dbias");
  for_dtype(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const auto lanes = lanes_of_bias<T>(p, bias);
    const auto kernel = I2V_PICK(backward, T);
    const int64_t tokens = p.batch * p.tokens, square = p.heads * p.frames * p.frames;
    // Bias gradients are summed per piece, then over the pieces in order: at most 16 MiB of partial sums.
    const int64_t most = want_bias ? std::max<int64_t>(1, std::min<int64_t>(128, (16 << 20) / (square * sizeof(A)))) : 128;
    const int64_t pieces = piece_count(tokens, p.frames * p.heads * p.dim * 7 * sizeof(T), most);
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
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def(
      "temporal_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor(a!) out, float scale, "
      "bool causal) -> ()");
  m.def(
      "temporal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dbias, float scale, bool causal) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) {
  m.impl("temporal_attention", TORCH_BOX(&attention));
  m.impl("temporal_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace i2v
