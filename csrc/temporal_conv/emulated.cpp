// The CUDA kernels' schema, and their threads run one after another on the CPU over the whole grid: with no GPU at hand, the
// tests judge indices, masks, vector widths and arithmetic so, with the address sanitizer watching. For tests alone: the fast
// kernels for CPUs are those of cpu.cpp.
#include "cuda_entry.h"

namespace i2v::conv {
namespace {

struct Emulator {
  template <typename Thread>
  static void launch(const Launch& p, Thread) {
    for (int64_t i = 0; i < p.blocks * threads_per_block; ++i) Thread::run(p, i);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def(
      "temporal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? extra, Tensor(a!) out, int[] kernel, int height, int width, "
      "int prefix, bool copy_prefix, int dilation, str activation, bool gradient) -> ()");
  m.def(
      "temporal_conv_weight_sums(Tensor grad, Tensor x, Tensor(a!) weight_sums, Tensor(b!) bias_sums, int[] kernel, int height, "
      "int width, int prefix, int dilation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) {
  m.impl("temporal_conv", TORCH_BOX(&convolve<Emulator>));
  m.impl("temporal_conv_weight_sums", TORCH_BOX(&weight_sums<Emulator>));
}

}  // namespace i2v::conv
