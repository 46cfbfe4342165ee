// token_shift on the CPU: the entry point, over the kernels of cpu_kernels.h.

#include <vector>

#include "../common/cpu.h"
#include "index.h"

namespace i2v {

struct Problem {
  int64_t batch, frames, tokens, channels, start, stop;
  View<3> x, out;
  const shift::Group* groups;
  int64_t group_count;
  shift::Padding padding;
  bool adjoint;
  bool past_cache;  // input and output together exceed a usual last-level cache: write around it
};

}  // namespace i2v

#define I2V_KERNELS "../token_shift/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {


void token_shift(const Tensor& x, Tensor out, const std::vector<int64_t> channels, const std::vector<int64_t> offsets,
                 int64_t padding, int64_t start, int64_t stop, bool adjoint) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "token_shift: x must be a CPU tensor [B, T, N, C]");
  STD_TORCH_CHECK(channels.size() == offsets.size(), "token_shift: as many offsets as channels are needed");
  STD_TORCH_CHECK(padding >= 0 && padding <= 2, "token_shift: padding ", padding, " is unknown");
  check_like(x, x, "x");
  check_like(out, x, "out");
  std::vector<shift::Group> groups;
  int64_t end = 0;
  for (size_t i = 0; i < channels.size(); ++i)
    groups.push_back({end += std::max<int64_t>(channels[i], 0),
                      shift::normal_offset(offsets[i], x.size(1), static_cast<shift::Padding>(padding))});
  STD_TORCH_CHECK(end <= x.size(3), "token_shift: the groups name ", end, " of ", x.size(3), " channels");
  const int64_t bytes = x.numel() * x.element_size();
  const Problem p{x.size(0),     x.size(1),      x.size(2),
                  x.size(3),     start,          stop,
                  View<3>(x),    View<3>(out),   groups.data(),
                  static_cast<int64_t>(groups.size()), static_cast<shift::Padding>(padding), adjoint,
                  exceeds_cache(2 * bytes)};
  for_dtype(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = I2V_PICK(shift_rows, T);
    const int64_t rows = p.batch * p.frames * p.tokens;
    for_pieces(rows, piece_count(rows, p.channels * 2 * sizeof(T)),
               [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def(
      "token_shift(Tensor x, Tensor(a!) out, int[] channels, int[] offsets, int padding, int start, int stop, bool adjoint) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) { m.impl("token_shift", TORCH_BOX(&token_shift)); }

}  // namespace i2v
