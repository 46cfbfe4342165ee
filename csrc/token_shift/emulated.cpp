// The CUDA kernel's schema, and its threads run one after another on the CPU over the whole grid: with no GPU at hand, the tests
// judge index arithmetic, masks, vector widths and sums so, with the address sanitizer watching. For tests alone: the fast
// kernels for CPUs are those of cpu.cpp.
#include "cuda_thread.h"

namespace i2v::shift {
namespace {

void emulate(const Tensor& x, Tensor out, const std::vector<int64_t> channels, const std::vector<int64_t> offsets,
             int64_t padding, int64_t start, int64_t stop, int64_t step, bool residual, bool adjoint) {
  const Launch p = describe(x, out, channels, offsets, padding, start, stop, step, residual, adjoint);
  if (p.threads == 0) return;
  for_thread(p, x.scalar_type(), [&](auto thread) {
    for (int64_t i = 0; i < p.blocks * threads_per_block; ++i) decltype(thread)::run(p, i);
  });
}

// The bytes that a thread loads and stores at once; no memory is read, so it answers for any device.
int64_t token_shift_vector_bytes(const Tensor& x, const Tensor& out, const std::vector<int64_t> channels) {
  return describe(x, out, channels, std::vector<int64_t>(channels.size()), zeros, 0, x.size(2), 1, false, false).vector_bytes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def(
      "token_shift(Tensor x, Tensor(a!) out, int[] channels, int[] offsets, int padding, int start, int stop, int step, "
      "bool residual, bool adjoint) -> ()");
  m.def("token_shift_vector_bytes(Tensor x, Tensor out, int[] channels) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) { m.impl("token_shift", TORCH_BOX(&emulate)); }

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("token_shift_vector_bytes", TORCH_BOX(&token_shift_vector_bytes));
}

}  // namespace i2v::shift
