// token_shift on the CPU: the entry point, over the kernels of cpu_kernels.h.

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
  View<3> x, out;
  const Run* runs;  // [frames, run_count]: the groups' and one for the channels that stay, or parts of these
  int64_t run_count;
  int64_t blocks;   // of tokens, in a clip
  bool past_cache;  // input and output together exceed a usual last-level cache: write around it,
  int64_t kept;     // except these of every 16 blocks: as much of the output as fits beside the input
};

// The tokens start, start + step, ... of every clip, `tokens` of them, are shifted where they lie.
struct InPlace {
  int64_t frames, tokens, start, step;
  View<3> x;
  shift::Padding padding;
  const shift::Group* groups;  // their stops are channels
  int64_t group_count;
  int64_t blocks;  // of tokens, in a clip
};

}  // namespace i2v

#define I2V_KERNELS "../token_shift/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

constexpr int64_t run_bytes = 32 << 10;  // of a part of a long row: three frames of it stay in a core's cache

// No run is longer than `longest`.
std::vector<Run> runs_of(const std::vector<int64_t>& channels, const std::vector<int64_t>& offsets, shift::Padding padding,
                         bool adjoint, int64_t frames, int64_t all_channels, int64_t longest) {
  std::vector<Run> runs;
  const auto add = [&](int64_t first, int64_t count, int64_t from, int64_t summed) {
    do {
      const int64_t part = std::min(count, longest);
      runs.push_back({first, part, from, summed});
      first += part, count -= part;
    } while (count > 0);
  };
  runs.reserve(frames * (channels.size() + 1 + all_channels / longest));
  for (int64_t t = 0; t < frames; ++t) {
    int64_t first = 0;
    for (size_t g = 0; g < channels.size(); first += channels[g++]) {
      const int64_t offset = shift::normal_offset(offsets[g], frames, padding);
      int64_t from = shift::source_frame(t, adjoint ? -offset : offset, frames, padding), to = from + 1;
      if (adjoint && padding == shift::edge) shift::edge_readers(t, offset, frames, from, to);
      if (from < 0) from = to;
      add(first, channels[g], from, to - from);
    }
    add(first, all_channels - first, t, 1);
  }
  return runs;
}

shift::Padding padding_of(const std::string& name) {
  if (name == "zeros") return shift::zeros;
  if (name == "edge") return shift::edge;
  STD_TORCH_CHECK(name == "wrap", "token_shift: padding '", name, "' is not one of zeros, edge, wrap");
  return shift::wrap;
}

// What keeps a direct call of the compiled op within its tensor.
void check(const Tensor& x, const std::vector<int64_t>& channels, const std::vector<int64_t>& offsets, int64_t start,
           int64_t stop, int64_t step) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "token_shift: x must be a CPU tensor [B, T, N, C]");
  STD_TORCH_CHECK(channels.size() == offsets.size(), "token_shift: as many offsets as channels are needed");
  STD_TORCH_CHECK(0 <= start && start <= stop && stop <= x.size(2), "token_shift: tokens [", start, ", ", stop, ") of ",
                  x.size(2));
  STD_TORCH_CHECK(step >= 1, "token_shift: step ", step, " must be at least 1");
  check_like(x, x, "x");
  int64_t named = 0;
  for (const int64_t count : channels) {
    STD_TORCH_CHECK(count >= 0 && count <= x.size(3) - named, "token_shift: the groups name more than ", x.size(3), " channels");
    named += count;
  }
}

// What is overwritten must be each element's own: every dimension steps over all that lies within it.
void check_no_overlap(const Tensor& x) {
  for (int64_t i = 0; i < 4; ++i) {
    int64_t within = 0;
    for (int64_t j = 0; j < 4; ++j)
      if (x.size(j) > 1 && (x.stride(j) < x.stride(i) || (x.stride(j) == x.stride(i) && j < i)))
        within += (x.size(j) - 1) * x.stride(j);
    STD_TORCH_CHECK(x.size(i) <= 1 || x.stride(i) > within, "token_shift_: elements of x share memory, but are overwritten");
  }
}

Tensor shifted(const Tensor& x, const std::vector<int64_t>& channels, const std::vector<int64_t>& offsets,
               const std::string& padding, int64_t start, int64_t stop, int64_t step, bool residual, bool adjoint) {
  check(x, channels, offsets, start, stop, step);
  const int64_t bytes = x.numel() * x.element_size();
  const bool long_rows = x.size(3) * x.element_size() > 4 * run_bytes;
  const int64_t longest = long_rows ? run_bytes / x.element_size() : std::max<int64_t>(x.size(3), 1);
  const auto runs = runs_of(channels, offsets, padding_of(padding), adjoint, x.size(1), x.size(3), longest);
  Tensor out = empty_dense_like(x);
  const Problem p{x.size(0), x.size(1), x.size(2), x.size(3), start, stop, step, View<3>(x), View<3>(out), runs.data(),
                  static_cast<int64_t>(runs.size()) / std::max<int64_t>(x.size(1), 1), (x.size(2) + 15) / 16,
                  exceeds_cache(2 * bytes), std::clamp<int64_t>(16 * ((28 << 20) - bytes) / std::max<int64_t>(bytes, 1), 0, 16)};
  for_dtype(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    int64_t items = p.batch * p.frames * p.tokens;
    auto kernel = residual ? I2V_PICK(shift_rows, T, true) : I2V_PICK(shift_rows, T, false);
    if (long_rows) {
      items = p.batch * p.tokens * p.run_count;
      kernel = residual ? I2V_PICK(shift_long_rows, T, true) : I2V_PICK(shift_long_rows, T, false);
    } else if (p.past_cache) {
      items = p.batch * p.blocks;
      kernel = residual ? I2V_PICK(shift_blocks, T, true) : I2V_PICK(shift_blocks, T, false);
    }
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

void token_shift_(const Tensor& x, const std::vector<int64_t> channels, const std::vector<int64_t> offsets,
                  const std::string padding, int64_t start, int64_t stop, int64_t step, const std::string /*backend*/) {
  check(x, channels, offsets, start, stop, step);
  check_no_overlap(x);
  const shift::Padding pad = padding_of(padding);
  std::vector<shift::Group> groups;
  int64_t end = 0;
  for (size_t g = 0; g < channels.size(); ++g)
    groups.push_back({end += channels[g], shift::normal_offset(offsets[g], x.size(1), pad)});
  step = std::min(step, std::max<int64_t>(x.size(2), 1));  // no more, so that its multiples do not overflow
  const int64_t tokens = (stop - start + step - 1) / step;
  const InPlace p{x.size(1), tokens, start, step, View<3>(x), pad, groups.data(), static_cast<int64_t>(groups.size()),
                  (tokens + 15) / 16};
  for_dtype(x.scalar_type(), [&](auto* type) {
    const auto kernel = I2V_PICK(shift_in_place, std::remove_pointer_t<decltype(type)>);
    const int64_t items = x.size(0) * p.blocks, bytes = 2 * x.size(0) * x.size(1) * tokens * end * x.element_size();
    for_pieces(items, piece_count(items, bytes / std::max<int64_t>(items, 1)),
               [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels, CPU, m) {
  I2V_IMPL(m, token_shift, token_shift<false>);
  I2V_IMPL(m, token_shift_backward, token_shift<true>);
  I2V_IMPL(m, token_shift_, token_shift_);
}

}  // namespace i2v
