// The entry points of the CUDA kernels: one set of checks and one table of kernels for the GPU and the emulation.
#pragma once

#include "cuda_warp.h"

namespace i2v::attention {

// body(T{}, integral_constant of the frames that sequences are padded to).
template <typename Body>
void for_kernel(const Launch& p, ScalarType dtype, const Body& body) {
  const auto of_type = [&](auto type) {
    const int frames = std::max(p.queries, p.keys);
    if (frames <= 8) return body(type, std::integral_constant<int, 8>());
    if (frames <= 16) return body(type, std::integral_constant<int, 16>());
    body(type, std::integral_constant<int, 32>());
  };
  if (dtype == ScalarType::BFloat16) return of_type(torch::headeronly::BFloat16());
  if (dtype == ScalarType::Half) return of_type(torch::headeronly::Half());
  STD_TORCH_CHECK(false, "temporal_attention: the CUDA kernels take float16 and bfloat16");
}

// Device has forward<T, Frames>(launch) and backward<T, Frames, Bias>(launch).
template <typename Device>
void run_forward(const Tensor& q, const Tensors k, const Tensors v, const Tensors bias, const Tensors mask,
                 const Offsets offsets, double scale, int64_t left, int64_t right, Tensor out, const Tensors lse) {
  const Problem problem = describe(q, k, v, bias, mask, offsets, scale, left, right);
  check_like(out, k ? q : torch::stable::select(q, 3, 0), "out");
  if (out.numel() == 0) return;
  Launch p = describe_launch(problem, q, bias);
  p.out = operand(problem, View<4>(out), p.queries, "out");
  if (lse) {
    check_contiguous(*lse, out.numel() / p.dim, ScalarType::Float, "lse");
    p.lse = static_cast<float*>(lse->data_ptr());
  }
  for_kernel(p, q.scalar_type(), [&](auto type, auto frames) { Device::template forward<decltype(type), frames>(p); });
}

// bias_sums [shares, H, Tq, Tk] receives sums over shares of the tokens.
template <typename Device>
void run_backward(const Tensor& grad, const Tensor& q, const Tensors k, const Tensors v, const Tensors bias,
                  const Tensors mask, const Offsets offsets, double scale, int64_t left, int64_t right, Tensor dq,
                  const Tensors dk, const Tensors dv, const Tensors bias_sums) {
  const Problem problem = describe(q, k, v, bias, mask, offsets, scale, left, right);
  check_like(grad, k ? q : torch::stable::select(q, 3, 0), "grad");
  check_like(dq, q, "dq");
  if (k) {
    STD_TORCH_CHECK(dk && dv, "temporal_attention: dk and dv are missing");
    check_like(*dk, *k, "dk"), check_like(*dv, *k, "dv");
  }
  STD_TORCH_CHECK(grad.numel() > 0, "temporal_attention: nothing to do");
  Launch p = describe_launch(problem, q, bias);
  const Triple grads(dq, k ? dk : k, k ? dv : v);
  p.grad = operand(problem, View<4>(grad), p.queries, "grad"), p.dq = operand(problem, grads.q, p.queries, "dq");
  p.dk = operand(problem, grads.k, p.keys, "dk"), p.dv = operand(problem, grads.v, p.keys, "dv");
  if (bias_sums) {
    const int64_t share = problem.heads * problem.queries * problem.keys, shares = bias_sums->numel() / share;
    STD_TORCH_CHECK(shares >= 1 && shares <= p.units, "temporal_attention: bias_sums must be [1 to ", p.units, ", H, Tq, Tk]");
    check_contiguous(*bias_sums, shares * share, ScalarType::Float, "bias_sums");
    p.bias_sums = static_cast<float*>(bias_sums->data_ptr());
    p.shares = static_cast<int>(shares), p.warps = p.shares * p.heads;
  }
  for_kernel(p, q.scalar_type(), [&](auto type, auto frames) {
    p.bias_sums ? Device::template backward<decltype(type), frames, true>(p)
                : Device::template backward<decltype(type), frames, false>(p);
  });
}

}  // namespace i2v::attention
