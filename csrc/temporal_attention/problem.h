// The arguments of temporal_attention as its kernels take them, on the CPU and on CUDA.
#pragma once

#include <optional>
#include <vector>

#include "../common/tensor.h"

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

// Checks the arguments and describes the problem, but for what it writes.
inline Problem describe(const Tensor& q, const Tensors& k, const Tensors& v, const Tensors& bias, const Tensors& mask,
                        const Offsets& offsets, double scale, int64_t left, int64_t right) {
  const bool packed = !k && !v;
  STD_TORCH_CHECK(packed ? q.dim() == 6 && q.size(3) == 3 : k && v && q.dim() == 5 && k->dim() == 5,
                  "temporal_attention: q must be [B, T, N, H, D] with k and v, or [B, T, N, 3, H, D]");
  check_like(q, q, "q");
  if (!packed) {
    for (const int64_t i : {0, 2, 3, 4})
      STD_TORCH_CHECK(k->size(i) == q.size(i), "temporal_attention: k must have q's shape but for its frames");
    check_like(*k, *k, "k"), check_like(*v, *k, "v");
    STD_TORCH_CHECK(k->scalar_type() == q.scalar_type() && k->device() == q.device(),
                    "temporal_attention: k has another dtype than q, or is on another device");
  }
  Problem p{q.size(0), q.size(1), packed ? q.size(1) : k->size(1), q.size(2), q.size(packed + 3), q.size(packed + 4)};
  STD_TORCH_CHECK(p.queries >= 1 && p.keys >= 1, "temporal_attention: q and k must have at least one frame, not ", p.queries,
                  " and ", p.keys);
  const Triple qkv(q, k, v);
  p.q = qkv.q, p.k = qkv.k, p.v = qkv.v;
  p.scale = scale, p.left = left, p.right = right;
  if (offsets) {
    STD_TORCH_CHECK(static_cast<int64_t>(offsets->size()) == p.heads, "temporal_attention: one offset for each head is needed");
    for (const int64_t offset : *offsets)
      STD_TORCH_CHECK(-p.keys <= offset && offset <= p.keys, "temporal_attention: offset ", offset, " is beyond the clip's ",
                      p.keys, " frames");
    p.offsets = offsets->data();
  }
  const ScalarType sums = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const Tensors* t : {&bias, &mask})
    STD_TORCH_CHECK(!*t || (*t)->device() == q.device(), "temporal_attention: bias or mask is on another device than q");
  if (bias) check_contiguous(*bias, p.heads * p.queries * p.keys, sums, "bias");
  if (mask) {
    check_contiguous(*mask, p.batch * p.keys, ScalarType::Bool, "mask");
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  return p;
}

}  // namespace i2v
