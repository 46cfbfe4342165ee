// temporal_conv on CUDA: launches over the threads of cuda_thread.h. The schema stands in emulated.cpp.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

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
    int32_t device = 0;
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&device));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const unsigned blocks = static_cast<unsigned>(p.blocks);
    temporal_conv_kernel<Thread><<<blocks, threads_per_block, 0, static_cast<cudaStream_t>(stream)>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

void convolve_on_device(const Tensor& x, const Tensor& weight, const std::optional<Tensor> bias,
                        const std::optional<Tensor> extra, Tensor out, const std::vector<int64_t> kernel, int64_t height,
                        int64_t width, int64_t prefix, bool copy_prefix, int64_t dilation, int64_t activation, bool gradient) {
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
