// masked_mean on the CPU: the entry points, over the kernels of cpu_kernels.h.

#include <optional>
#include <string>

#include "../common/cpu.h"
#include "../common/dispatch.h"

namespace i2v {

struct MaskedMean {
  int64_t batch, frames, channels;
  View<2> x, dx;              // [B, T, C]
  View<1> out, grad;          // [B, C]
  const bool* mask = nullptr;  // [B, T]
};

}  // namespace i2v

#define I2V_KERNELS "../masked_mean/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

MaskedMean describe(const Tensor& x, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_cpu(), "masked_mean: x must be a CPU tensor [B, T, C]");
  check_like(x, x, "x");
  MaskedMean p{x.size(0), x.size(1), x.size(2), View<2>(x)};
  if (mask) {
    STD_TORCH_CHECK(mask->is_cpu(), "masked_mean: mask is on another device than x");
    check_contiguous(*mask, p.batch * p.frames, ScalarType::Bool, "mask");
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  return p;
}

// kernel(p, begin, end) over the clips; of no channels there may be no memory.
template <typename Kernel>
void over_clips(const MaskedMean& p, int64_t bytes, Kernel kernel) {
  if (p.channels == 0) return;
  for_pieces(p.batch, piece_count(p.batch, bytes / std::max<int64_t>(p.batch, 1)),
             [&](int64_t, int64_t begin, int64_t end) { kernel(p, begin, end); });
}

Tensor masked_mean(const Tensor& x, const std::optional<Tensor> mask, bool normalize, const std::string /*backend*/) {
  MaskedMean p = describe(x, mask);
  Tensor out = torch::stable::new_empty(x, std::vector<int64_t>{p.batch, p.channels});
  p.out = View<1>(out);
  for_dtype(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    over_clips(p, x.numel() * x.element_size(), normalize ? I2V_PICK(mean, T, true) : I2V_PICK(mean, T, false));
  });
  return out;
}

Tensor masked_mean_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor> mask, bool normalize,
                            const std::string /*backend*/) {
  MaskedMean p = describe(x, mask);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.is_cpu() && grad.size(0) == p.batch && grad.size(1) == p.channels &&
                      grad.scalar_type() == x.scalar_type(),
                  "masked_mean: grad must be [B, C], as the output");
  check_like(grad, grad, "grad");
  Tensor dx = empty_dense_like(x);
  p.grad = View<1>(grad), p.dx = View<2>(dx);
  for_dtype(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    over_clips(p, 2 * x.numel() * x.element_size(), normalize ? I2V_PICK(spread, T, true) : I2V_PICK(spread, T, false));
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels, CPU, m) {
  I2V_IMPL(m, masked_mean, masked_mean);
  I2V_IMPL(m, masked_mean_backward, masked_mean_backward);
}

}  // namespace i2v
