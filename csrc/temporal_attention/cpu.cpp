// temporal_attention on the CPU: the entry points, over the kernels of cpu_kernels.h.
#include <string>
#include <tuple>
#include <vector>

#include "../common/cpu.h"
#include "../common/dispatch.h"

namespace i2v {

struct Problem {
  int64_t batch, queries, keys, tokens, heads, dim;  // queries and keys: their numbers of frames
  View<4> q, k, v, out, grad, dq, dk, dv;
  const int64_t* offsets = nullptr;  // [H]
  double scale = 1;
  int64_t left = -1, right = -1;  // the window; negative: no limit
  const void* bias_lanes = nullptr;  // see arrange_bias
  const bool* mask = nullptr;        // [B, Tk]
  void* lse = nullptr;               // [B, Tq, N, H]
  bool past_cache = false;  // what is read and written exceeds a usual last-level cache: write around it
};

}  // namespace i2v

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

// q, k and v as three tensors, or, where k and v are not given, in q: [B, T, N, 3, H, D].
struct Triple {
  View<4> q, k, v;

  Triple(const Tensor& q_, const std::optional<Tensor>& k_, const std::optional<Tensor>& v_) {
    if (k_ && v_) {
      q = View<4>(q_), k = View<4>(*k_), v = View<4>(*v_);
      return;
    }
    View<4>* const parts[] = {&q, &k, &v};
    for (int i = 0; i < 3; ++i) {
      parts[i]->data = static_cast<char*>(q_.data_ptr()) + i * q_.stride(3) * q_.element_size();
      for (int j = 0; j < 4; ++j) parts[i]->stride[j] = q_.stride(j < 3 ? j : 4);
    }
  }
};

using Tensors = std::optional<Tensor>;
using Offsets = std::optional<std::vector<int64_t>>;

Problem describe(const Tensor& q, const Tensors& k, const Tensors& v, const Tensors& bias, const Tensors& mask,
                 const Offsets& offsets, double scale, int64_t left, int64_t right) {
  const bool packed = !k && !v;
  STD_TORCH_CHECK(q.is_cpu() && (packed ? q.dim() == 6 && q.size(3) == 3 : k && v && q.dim() == 5 && k->dim() == 5),
                  "temporal_attention: q must be a CPU tensor [B, T, N, H, D] with k and v, or [B, T, N, 3, H, D]");
  check_like(q, q, "q");
  if (!packed) {
    for (const int64_t i : {0, 2, 3, 4})
      STD_TORCH_CHECK(k->size(i) == q.size(i), "temporal_attention: k must have q's shape but for its frames");
    check_like(*k, *k, "k"), check_like(*v, *k, "v");
    STD_TORCH_CHECK(k->scalar_type() == q.scalar_type(), "temporal_attention: k has another dtype than q");
  }
  Problem p{q.size(0), q.size(1), packed ? q.size(1) : k->size(1), q.size(2), q.size(packed + 3), q.size(packed + 4)};
  const Triple qkv(q, k, v);
  p.q = qkv.q, p.k = qkv.k, p.v = qkv.v;
  p.scale = scale, p.left = left, p.right = right;
  if (offsets) {
    STD_TORCH_CHECK(static_cast<int64_t>(offsets->size()) == p.heads, "temporal_attention: one offset for each head is needed");
    p.offsets = offsets->data();
  }
  const ScalarType sums = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (bias) check_contiguous(*bias, p.heads * p.queries * p.keys, sums, "bias");
  if (mask) {
    check_contiguous(*mask, p.batch * p.keys, ScalarType::Bool, "mask");
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
    const int64_t most = want_bias ? std::max<int64_t>(1, std::min<int64_t>(128, (16 << 20) / (square * sizeof(A)))) : 128;
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
