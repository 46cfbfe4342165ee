// Where a channel's value comes from: the arithmetic of token_shift, shared by the CPU and CUDA kernels and by the CPU test
// that runs the CUDA kernel's index arithmetic over its whole grid.
#pragma once

#include "../common/host_device.h"

namespace i2v::shift {

enum Padding { zeros = 0, edge = 1, wrap = 2 };
constexpr int max_groups = 8;

// Channels [stop of the group before, stop) of output frame t come from frame t - offset.
struct Group {
  int64_t stop, offset;
};

// The offset in [-frames, frames] that shifts as this one does. The functions below take no other: t - offset could overflow,
// and a remainder for every value read would cost the GPU more than the copy.
I2V_HOST_DEVICE int64_t normal_offset(int64_t offset, int64_t frames, Padding padding) {
  if (frames < 1) return 0;
  if (padding == wrap) return offset % frames;
  return offset < -frames ? -frames : offset > frames ? frames : offset;
}

// The frame that frame t reads, or -1 for zeros. The adjoint of zeros and wrap is the shift the other way.
I2V_HOST_DEVICE int64_t source_frame(int64_t t, int64_t offset, int64_t frames, Padding padding) {
  const int64_t from = t - offset;
  if (from >= 0 && from < frames) return from;
  if (padding == zeros) return -1;
  if (padding == edge) return from < 0 ? 0 : frames - 1;
  return from < 0 ? from + frames : from - frames;
}

// The frames [first, last) whose "edge" shift reads frame t: what the adjoint sums over.
I2V_HOST_DEVICE void edge_readers(int64_t t, int64_t offset, int64_t frames, int64_t& first, int64_t& last) {
  first = t + offset, last = first + 1;
  if (t == 0) first = 0;
  if (t == frames - 1) last = frames;
  if (first < 0) first = 0;
  if (last > frames) last = frames;
  if (first > last) first = last;
}

}  // namespace i2v::shift
