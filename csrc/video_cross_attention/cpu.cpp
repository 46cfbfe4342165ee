// video_cross_attention on the CPU: the entry points, over the kernels of cpu_kernels.h.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/cpu.h"
#include "../common/dispatch.h"

namespace i2v {

// Its name is its own: templates over it are emitted under names that those of other ops must not have.
struct CrossAttention {
  int64_t batch, queries, frames, tokens, heads, dim;
  int64_t pieces = 1;             // of a clip's keys
  View<3> q, out, grad, dq;       // [B, Q, H, D]; gradients that are not wanted have no data
  View<4> k, v, dk, dv;           // [B, T, N, H, D]
  const bool* mask = nullptr;     // [B, T]
  double scale = 1;
  void* sums = nullptr;           // [B, Q, H, 2]: of each query the largest score, and the sum of exponentials
  bool past_cache = false;        // what is read and written exceeds a usual last-level cache: write around it
};

}  // namespace i2v

#define I2V_KERNELS "../video_cross_attention/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

ScalarType sums_of(const Tensor& q) { return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Checks the arguments and describes the problem, but for what it writes.
CrossAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 5, "video_cross_attention: q must be [B, Q, H, D], k [B, T, N, H, D]");
  check_like(q, q, "q"), check_like(k, k, "k"), check_like(v, k, "v");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(2) && k.size(4) == q.size(3),
                  "video_cross_attention: k must have q's clips, heads and channels");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && k.device() == q.device(),
                  "video_cross_attention: k has another dtype than q, or is on another device");
  STD_TORCH_CHECK(k.size(1) >= 1, "video_cross_attention: k must have at least one frame");
  CrossAttention p{q.size(0), q.size(1), k.size(1), k.size(2), q.size(2), q.size(3)};
  p.q = View<3>(q), p.k = View<4>(k), p.v = View<4>(v), p.scale = scale;
  if (mask) {
    STD_TORCH_CHECK(mask->device() == q.device(), "video_cross_attention: mask is on another device than q");
    check_contiguous(*mask, p.batch * p.frames, ScalarType::Bool, "mask");
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  // Pieces of at least 64 KiB, 64 in all where there are so many, whose sums take 16 MiB at most.
  const int64_t keys = p.frames * p.tokens, size = q.element_size();
  const int64_t sums = std::max<int64_t>(p.batch * p.queries * p.heads * (p.dim + 64) * 4, 1);
  const int64_t most = std::min(64 / std::max<int64_t>(p.batch, 1), (16 << 20) / sums);
  p.pieces = piece_count(std::max<int64_t>(keys, 1), 2 * p.heads * p.dim * size, std::max<int64_t>(most, 1));
  p.past_cache = exceeds_cache(4 * p.batch * keys * p.heads * p.dim * size);
  return p;
}

// body(items, ...) over the pieces of all clips, then over all clips' pairs of head and query.
template <typename A, typename First, typename Second>
void in_two_steps(const CrossAttention& p, int64_t sums, const First& first, const Second& second) {
  const int64_t items = p.batch * p.pieces, pairs = p.batch * p.heads * p.queries;
  Scratch<A> memory(items * sums);
  for_pieces(items, items, [&](int64_t, int64_t begin, int64_t end) { first(p, begin, end, memory.data()); });
  for_pieces(pairs, piece_count(pairs, p.pieces * p.dim * sizeof(A)),
             [&](int64_t, int64_t begin, int64_t end) { second(p, begin, end, memory.data()); });
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor> mask,
                                     double scale, const std::string /*backend*/) {
  CrossAttention p = describe(q, k, v, mask, scale);
  Tensor out = empty_dense_like(q);
  Tensor sums = torch::stable::new_empty(q, std::vector<int64_t>{p.batch, p.queries, p.heads, 2}, sums_of(q));
  p.out = View<3>(out), p.sums = sums.data_ptr();
  for_dtype(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    in_two_steps<A>(p, I2V_PICK(sums_size, A)(p, false), I2V_PICK(forward, T), I2V_PICK(merge, T));
  });
  return {out, sums};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const std::optional<Tensor> mask, double scale, const Tensor& out,
                                                      const Tensor& sums, const std::vector<bool> wanted,
                                                      const std::string /*backend*/) {
  CrossAttention p = describe(q, k, v, mask, scale);
  check_like(grad, q, "grad"), check_like(out, q, "out");
  check_contiguous(sums, 2 * p.batch * p.queries * p.heads, sums_of(q), "sums");
  STD_TORCH_CHECK(wanted.size() == 3, "video_cross_attention: wanted has ", wanted.size(), " entries, not 3");
  Tensor dq = wanted[0] ? empty_dense_like(q) : empty_of(grad), dk = wanted[1] ? empty_dense_like(k) : empty_of(grad);
  Tensor dv = wanted[2] ? empty_dense_like(v) : empty_of(grad);
  p.grad = View<3>(grad), p.out = View<3>(out), p.sums = sums.data_ptr();
  if (wanted[0]) p.dq = View<3>(dq);
  if (wanted[1]) p.dk = View<4>(dk);
  if (wanted[2]) p.dv = View<4>(dv);
  for_dtype(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    in_two_steps<A>(p, wanted[0] ? I2V_PICK(sums_size, A)(p, true) : 0, I2V_PICK(backward, T),
                    [&](const CrossAttention&, int64_t begin, int64_t end, const void* sums) {
                      if (wanted[0]) I2V_PICK(add_up, T)(p, begin, end, sums);
                    });
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels, CPU, m) {
  I2V_IMPL(m, video_cross_attention, attention);
  I2V_IMPL(m, video_cross_attention_backward, attention_backward);
}

}  // namespace i2v
