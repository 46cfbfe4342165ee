// What frame_attention does on CPUs beside PyTorch's attention (ops/frame_attention/sdpa.py): parts are joined, in place, by
// their log-sum-exp, and a few keys of a frame's own are attended to. All tensors are [B, T, rows, H, D], or without D.

#include "../common/cpu.h"
#include "../common/dispatch.h"

namespace i2v {

struct Joining {
  int64_t batch, frames, rows, heads, channels, keys;
  int64_t block, blocks;  // of so many tokens, or heads in backward, in a frame
  double scale;
  View<4> q, k, v, out, lse, grad, dq, dk, dv, part, part_lse;
};

}  // namespace i2v

#define I2V_KERNELS "../frame_attention/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

constexpr ScalarType sum_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

constexpr int64_t tokens_of_block = 64, heads_of_block = 4;

void check_rows(const Tensor& t, const Tensor& like, int64_t rows, const char* name) {
  STD_TORCH_CHECK(t.dim() == 5 && t.is_cpu() && t.scalar_type() == like.scalar_type(), name,
                  " must be a CPU tensor [B, T, rows, H, D] of out's dtype");
  for (const int64_t i : {0, 1, 3, 4})
    STD_TORCH_CHECK(t.size(i) == like.size(i), name, ": size ", t.size(i), " of dimension ", i, " is not ", like.size(i));
  STD_TORCH_CHECK(t.size(2) == rows, name, " has ", t.size(2), " rows, not ", rows);
  STD_TORCH_CHECK(t.size(4) <= 1 || t.stride(4) == 1, name, ": the last stride must be 1");
}

void check_sums(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.is_cpu() && t.scalar_type() == sum_dtype(like.scalar_type()), name,
                  " must be a CPU tensor [B, T, rows, H] of the sums' dtype");
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(t.size(i) == like.size(i), name, ": size ", t.size(i), " of dimension ", i, " is not ", like.size(i));
}

Joining problem(const Tensor& out, const Tensor& lse, int64_t keys, double scale) {
  check_rows(out, out, out.size(2), "out");
  check_sums(lse, out, "lse");
  Joining p{out.size(0), out.size(1), out.size(2), out.size(3), out.size(4), keys,
            tokens_of_block, (out.size(2) + tokens_of_block - 1) / tokens_of_block, scale};
  p.out = View<4>(out);
  p.lse = View<4>(lse);
  return p;
}

void attend_extra_(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  Joining p = problem(out, lse, k.dim() == 5 ? k.size(2) : 0, scale);
  check_rows(q, out, p.rows, "q");
  check_rows(k, out, p.keys, "k");
  check_rows(v, out, p.keys, "v");
  p.q = View<4>(q), p.k = View<4>(k), p.v = View<4>(v);
  for_dtype(out.scalar_type(), [&](auto* type) {
    const auto kernel = I2V_PICK(attend_extra, std::remove_pointer_t<decltype(type)>);
    const int64_t items = p.batch * p.frames * p.blocks;
    for_pieces(items, piece_count(items, 3 * p.block * p.heads * p.channels * out.element_size()),
               [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  });
}

void attend_extra_backward_(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& grad, const Tensor& out,
                            const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  Joining p = problem(out, lse, k.dim() == 5 ? k.size(2) : 0, scale);
  check_rows(q, out, p.rows, "q");
  check_rows(grad, out, p.rows, "grad");
  check_rows(dq, out, p.rows, "dq");
  check_rows(k, out, p.keys, "k");
  check_rows(v, out, p.keys, "v");
  check_rows(dk, out, p.keys, "dk");
  check_rows(dv, out, p.keys, "dv");
  p.q = View<4>(q), p.k = View<4>(k), p.v = View<4>(v), p.grad = View<4>(grad);
  p.dq = View<4>(dq), p.dk = View<4>(dk), p.dv = View<4>(dv);
  p.block = std::min(heads_of_block, p.heads), p.blocks = (p.heads + heads_of_block - 1) / heads_of_block;
  for_dtype(out.scalar_type(), [&](auto* type) {
    const auto kernel = I2V_PICK(attend_extra_backward, std::remove_pointer_t<decltype(type)>);
    const int64_t items = p.batch * p.frames * p.blocks;
    for_pieces(items, piece_count(items, 5 * p.rows * p.block * p.channels * out.element_size()),
               [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  });
}

void join_attention_(const Tensor& out, const Tensor& lse, const Tensor& part, const Tensor& part_lse) {
  Joining p = problem(out, lse, 0, 1.0);
  check_rows(part, out, p.rows, "part");
  check_sums(part_lse, out, "part_lse");
  p.part = View<4>(part), p.part_lse = View<4>(part_lse);
  for_dtype(out.scalar_type(), [&](auto* type) {
    const auto kernel = I2V_PICK(join, std::remove_pointer_t<decltype(type)>);
    const int64_t items = p.batch * p.frames * p.blocks;
    for_pieces(items, piece_count(items, 3 * p.block * p.heads * p.channels * out.element_size()),
               [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def("attend_extra_(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, float scale) -> ()");
  m.def(
      "attend_extra_backward_(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor grad, Tensor out, Tensor lse, Tensor q, "
      "Tensor k, Tensor v, float scale) -> ()");
  m.def("join_attention_(Tensor(a!) out, Tensor(b!) lse, Tensor part, Tensor part_lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) {
  m.impl("attend_extra_", TORCH_BOX(&attend_extra_));
  m.impl("attend_extra_backward_", TORCH_BOX(&attend_extra_backward_));
  m.impl("join_attention_", TORCH_BOX(&join_attention_));
}

}  // namespace i2v
