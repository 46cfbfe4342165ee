// temporal_conv on CUDA: launches over the threads of cuda_thread.h. The schema stands in emulated.cpp.
#include "../common/current_stream.h"
#include "cuda_entry.h"

namespace i2v::conv {
namespace {

template <typename Thread>
__global__ void __launch_bounds__(threads_per_block, 1) temporal_conv_kernel(const __grid_constant__ Launch p) {
  Thread::run(p, static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x);
}

struct Gpu {
  template <typename Thread>
  static void launch(const Launch& p, Thread) {
    temporal_conv_kernel<Thread><<<static_cast<unsigned>(p.blocks), threads_per_block, 0, current_stream()>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

void convolve_on_device(const Tensor& x, const Tensor& weight, const std::optional<Tensor> bias,
                        const std::optional<Tensor> extra, Tensor out, const std::vector<int64_t> kernel, int64_t height,
                        int64_t width, int64_t prefix, bool copy_prefix, int64_t dilation, const std::string activation,
                        bool gradient) {
  STD_TORCH_CHECK(x.is_cuda(), "temporal_conv: x must be a CUDA tensor");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  convolve<Gpu>(x, weight, bias, extra, out, kernel, height, width, prefix, copy_prefix, dilation, activation, gradient);
}

void weight_sums_on_device(const Tensor& grad, const Tensor& x, Tensor weight_sums, Tensor bias_sums,
                           const std::vector<int64_t> kernel, int64_t height, int64_t width, int64_t prefix, int64_t dilation) {
  STD_TORCH_CHECK(x.is_cuda(), "temporal_conv: x must be a CUDA tensor");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  conv::weight_sums<Gpu>(grad, x, weight_sums, bias_sums, kernel, height, width, prefix, dilation);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CUDA, m) {
  m.impl("temporal_conv", TORCH_BOX(&convolve_on_device));
  m.impl("temporal_conv_weight_sums", TORCH_BOX(&weight_sums_on_device));
}

}  // namespace i2v::conv
