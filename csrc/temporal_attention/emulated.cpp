// The CUDA kernels' schema, and their warps run one after another on the CPU over the whole grid: with no GPU at hand, the tests
// judge indices, masks, fragments and arithmetic so, with the address sanitizer watching. For tests alone: the fast kernels
// for CPUs are those of cpu.cpp.
#include "cuda_entry.h"

namespace i2v::attention {
namespace {

struct Emulator {
  template <typename T, int Frames>
  static void forward(const Launch& p) {
    for (int i = 0; i < p.warps; ++i) {
      HostWarp<ForwardLane<Frames>> warp;
      attention::forward<T, Frames>(p, warp, i);
    }
  }

  template <typename T, int Frames, bool Bias>
  static void backward(const Launch& p) {
    for (int i = 0; i < p.warps; ++i) {
      HostWarp<BackwardLane<Frames, Bias>> warp;
      attention::backward<T, Frames, Bias>(p, warp, i);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def(
      "temporal_attention(Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, int[]? offsets, float scale, int left, "
      "int right, Tensor(a!) out, Tensor(b!)? lse) -> ()");
  m.def(
      "temporal_attention_backward(Tensor grad, Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, int[]? offsets, "
      "float scale, int left, int right, Tensor(a!) dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? bias_sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) {
  m.impl("temporal_attention", TORCH_BOX(&run_forward<Emulator>));
  m.impl("temporal_attention_backward", TORCH_BOX(&run_backward<Emulator>));
}

}  // namespace i2v::attention
