// token_shift on the CPU: the entry points, over the kernels of cpu_kernels.h.

#include <numeric>
#include <string>
#include <vector>

#include "../common/cpu.h"
#include "../common/dispatch.h"
#include "index.h"

namespace i2v {

// Channels [first, first + count) of an output frame: the sum over `frames` frames of the input, none for zeros.
struct Run {
  int64_t first, count, from, frames;
};

struct Problem {
  int64_t batch, frames, tokens, channels, start, stop, step;
  bool residual;  // x is added
  View<3> x, out;
  const Run* runs;  // [frames, run_count]: the groups' and one for the channels that stay
  int64_t run_count;
  int64_t blocks;   // of tokens, in a clip
  const int64_t* offsets;  // in place: of each group, and
  shift::Padding padding;  // what the frames beyond the clip give
  bool past_cache;  // input and output together exceed a usual last-level cache: write around it,
  int64_t kept;     // except these of every 16 blocks: as much of the output as fits beside the input
};

}  // namespace i2v

#define I2V_KERNELS "../token_shift/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

std::vector<Run> runs_of(const std::vector<int64_t>& channels, const std::vector<int64_t>& offsets, shift::Padding padding,
                         bool adjoint, int64_t frames, int64_t all_channels) {
  std::vector<Run> runs;
  runs.reserve(frames * (channels.size() + 1));
  for (int64_t t = 0; t < frames; ++t) {
    int64_t first = 0;
    for (size_t g = 0; g < channels.size(); first += channels[g++]) {
      const int64_t offset = shift::normal_offset(offsets[g], frames, padding);
      int64_t from = shift::source_frame(t, adjoint ? -offset : offset, frames, padding), to = from + 1;
      if (adjoint && padding == shift::edge) shift::edge_readers(t, offset, frames, from, to);
      if (from < 0) from = to;
      runs.push_back({first, channels[g], from, to - from});
    }
    runs.push_back({first, all_channels - first, t, 1});
  }
  return runs;
}

shift::Padding padding_of(const std::string& name) {
  if (name == "zeros") return shift::zeros;
  if (name == "edge") return shift::edge;
  STD_TORCH_CHECK(name == "wrap", "token_shift: padding '", name, "' is not one of zeros, edge, wrap");
  return shift::wrap;
}

void check_arguments(const Tensor& x, const std::vector<int64_t>& channels, const std::vector<int64_t>& offsets, int64_t start,
                     int64_t stop, int64_t step) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "token_shift: x must be a CPU tensor [B, T, N, C]");
  STD_TORCH_CHECK(channels.size() == offsets.size(), "token_shift: as many offsets as channels are needed");
  check_like(x, x, "x");
  int64_t named = 0;
  for (const int64_t count : channels) {
    STD_TORCH_CHECK(count >= 0 && count <= x.size(3) - named, "token_shift: the groups name more than ", x.size(3), " channels");
    named += count;
  }
  STD_TORCH_CHECK(0 <= start && start <= stop && stop <= x.size(2) && step >= 1, "token_shift: tokens ", start, " to ", stop,
                  " by ", step, " are not among ", x.size(2));
}

Tensor shifted(const Tensor& x, const std::vector<int64_t>& channels, const std::vector<int64_t>& offsets,
               const std::string& padding, int64_t start, int64_t stop, int64_t step, bool residual, bool adjoint) {
  check_arguments(x, channels, offsets, start, stop, step);
  const auto runs = runs_of(channels, offsets, padding_of(padding), adjoint, x.size(1), x.size(3));
  Tensor out = empty_dense_like(x);
  const int64_t bytes = x.numel() * x.element_size();
  const Problem p{x.size(0), x.size(1), x.size(2), x.size(3), start, stop, step, residual, View<3>(x), View<3>(out),
                  runs.data(), static_cast<int64_t>(channels.size()) + 1, (x.size(2) + 15) / 16,
                  nullptr, shift::zeros, exceeds_cache(2 * bytes), std::clamp<int64_t>(16 * ((28 << 20) - bytes) / std::max<int64_t>(bytes, 1), 0, 16)};
  for_dtype(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = p.past_cache ? I2V_PICK(shift_blocks, T) : I2V_PICK(shift_rows, T);
    const int64_t items = p.batch * (p.past_cache ? p.blocks : p.frames * p.tokens);
    for_pieces(items, piece_count(items, 2 * bytes / std::max<int64_t>(items, 1)),
               [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  });
  return out;
}

template <bool adjoint>
Tensor token_shift(const Tensor& x, const std::vector<int64_t> channels, const std::vector<int64_t> offsets,
                   const std::string padding, int64_t start, int64_t stop, int64_t step, bool residual,
                   const std::string /*backend*/) {
  return shifted(x, channels, offsets, padding, start, stop, step, residual, adjoint);
}

void shift_in_place(Tensor x, const std::vector<int64_t> channels, const std::vector<int64_t> offsets, const std::string padding,
                    int64_t start, int64_t stop, int64_t step) {
  check_arguments(x, channels, offsets, start, stop, step);
  if (x.numel() == 0) return;
  const auto kind = padding_of(padding);
  const auto runs = runs_of(channels, offsets, kind, false, 1, x.size(3));
  std::vector<int64_t> moves;
  for (const int64_t offset : offsets) moves.push_back(shift::normal_offset(offset, x.size(1), kind));
  Problem p{};
  p.batch = x.size(0), p.frames = x.size(1), p.tokens = x.size(2), p.channels = x.size(3);
  p.start = start, p.stop = stop, p.step = step;
  p.x = p.out = View<3>(x);
  p.runs = runs.data(), p.run_count = static_cast<int64_t>(runs.size());
  p.offsets = moves.data(), p.padding = kind;
  const int64_t items = p.batch * ((stop - start + step - 1) / step);
  for_dtype(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = I2V_PICK(shift_in_place, T);
    for_pieces(items, piece_count(items, 2 * p.frames * p.channels * sizeof(T)),
               [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def("token_shift_in_place(Tensor(a!) x, int[] channels, int[] offsets, str padding, int start, int stop, int step) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) { m.impl("token_shift_in_place", TORCH_BOX(&shift_in_place)); }

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels, CPU, m) {
  I2V_IMPL(m, token_shift, token_shift<false>);
  I2V_IMPL(m, token_shift_backward, token_shift<true>);
}

}  // namespace i2v
