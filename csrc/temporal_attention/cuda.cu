// temporal_attention on CUDA: one launch over the warps of cuda_warp.h. The schema stands in emulated.cpp.
#include "../common/current_stream.h"
#include "cuda_entry.h"

namespace i2v::attention {
namespace {

constexpr int threads = 32 * warps_per_block;

__device__ __forceinline__ int warp_index() {  // told to the compiler as the same in all lanes
  return blockIdx.x * warps_per_block + __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
}

template <typename T, int Frames>
__global__ void __launch_bounds__(threads) attention_forward_kernel(const __grid_constant__ Launch p) {
  const int index = warp_index();
  if (index >= p.warps) return;
  DeviceWarp<ForwardLane<Frames>> warp;
  forward<T, Frames>(p, warp, index);
}

// Asked for one block at least, ptxas does not spill where it would for sm_100; elsewhere it needs no asking, and takes fewer registers.
template <typename T, int Frames, bool Bias>
__global__ void __launch_bounds__(threads, Frames == 16 && Bias ? 1 : 0) attention_backward_kernel(const __grid_constant__ Launch p) {
  const int index = warp_index();
  if (index >= p.warps) return;
  DeviceWarp<BackwardLane<Frames, Bias>> warp;
  backward<T, Frames, Bias>(p, warp, index);
}

struct Gpu {
  template <typename T, int Frames>
  static void forward(const Launch& p) {
    const unsigned blocks = (p.warps + warps_per_block - 1) / warps_per_block;
    attention_forward_kernel<T, Frames><<<blocks, threads, 0, current_stream()>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, int Frames, bool Bias>
  static void backward(const Launch& p) {
    const unsigned blocks = (p.warps + warps_per_block - 1) / warps_per_block;
    attention_backward_kernel<T, Frames, Bias><<<blocks, threads, 0, current_stream()>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

void forward_on_device(const Tensor& q, const Tensors k, const Tensors v, const Tensors bias, const Tensors mask,
                       const Offsets offsets, double scale, int64_t left, int64_t right, Tensor out, const Tensors lse) {
  STD_TORCH_CHECK(q.is_cuda(), "temporal_attention: q must be a CUDA tensor");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  run_forward<Gpu>(q, k, v, bias, mask, offsets, scale, left, right, out, lse);
}

void backward_on_device(const Tensor& grad, const Tensor& q, const Tensors k, const Tensors v, const Tensors bias,
                        const Tensors mask, const Offsets offsets, double scale, int64_t left, int64_t right, Tensor dq,
                        const Tensors dk, const Tensors dv, const Tensors bias_sums) {
  STD_TORCH_CHECK(q.is_cuda(), "temporal_attention: q must be a CUDA tensor");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  run_backward<Gpu>(grad, q, k, v, bias, mask, offsets, scale, left, right, dq, dk, dv, bias_sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CUDA, m) {
  m.impl("temporal_attention", TORCH_BOX(&forward_on_device));
  m.impl("temporal_attention_backward", TORCH_BOX(&backward_on_device));
}

}  // namespace i2v::attention
