// token_shift on CUDA: one launch over the threads of cuda_thread.h. The schema stands in emulated.cpp.
#include <limits>

#include "../common/current_stream.h"
#include "cuda_thread.h"

namespace i2v::shift {
namespace {

template <typename Thread>
__global__ void __launch_bounds__(threads_per_block) token_shift_kernel(const __grid_constant__ Launch p) {
  Thread::run(p, static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x);
}

void token_shift(const Tensor& x, Tensor out, const std::vector<int64_t> channels, const std::vector<int64_t> offsets,
                 int64_t padding, int64_t start, int64_t stop, int64_t step, bool residual, bool adjoint) {
  STD_TORCH_CHECK(x.is_cuda(), "token_shift: x must be a CUDA tensor [B, T, N, C]");
  const Launch p = describe(x, out, channels, offsets, padding, start, stop, step, residual, adjoint);
  if (p.threads == 0) return;
  STD_TORCH_CHECK(p.blocks <= std::numeric_limits<int32_t>::max(), "token_shift: ", p.blocks, " blocks are too many");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  for_thread(p, x.scalar_type(), [&](auto thread) {
    token_shift_kernel<decltype(thread)><<<static_cast<unsigned>(p.blocks), threads_per_block, 0, current_stream()>>>(p);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CUDA, m) { m.impl("token_shift", TORCH_BOX(&token_shift)); }

}  // namespace i2v::shift
