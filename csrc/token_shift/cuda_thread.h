// What one thread of the CUDA kernel does, and the launch that describes it: no CUDA header is needed, so that emulated.cpp
// runs the same code on the CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <vector>

#include "../common/vector_width.h"
#include "index.h"

namespace i2v::shift {

constexpr int threads_per_block = 256;
constexpr int frames_per_thread = 4;  // independent loads in flight before the first store

// A row of C channels is cut into `vectors` vectors of `vector_bytes` bytes that cross no group boundary.
// Strides are bytes, of clip, frame and token; the groups' stops are in vectors.
struct Launch {
  const char* x;
  char* out;
  int64_t x_stride[3], out_stride[3];
  int64_t frames, chunks, tokens, vectors, start, stop, step;  // a chunk is the frames of one thread
  int64_t threads, blocks;                                     // threads that have work, and the blocks that hold them
  Group groups[max_groups];
  Padding padding;
  int vector_bytes;
  bool readers;   // the adjoint of "edge": the frames that read one are added into it
  bool residual;  // and each frame itself
};

// Vectors come first, then tokens: a warp's accesses are neighbours in memory.
struct Position {
  int64_t vector, token, frame, clip;
};

template <typename Count>
I2V_HOST_DEVICE Position position_of(const Launch& p, Count thread) {
  const Count vectors = static_cast<Count>(p.vectors), tokens = static_cast<Count>(p.tokens);
  const Count chunks = static_cast<Count>(p.chunks);
  const Count row = thread / vectors, chunk = row / tokens;
  return {static_cast<int64_t>(thread % vectors), static_cast<int64_t>(row % tokens),
          static_cast<int64_t>(chunk % chunks) * frames_per_thread, static_cast<int64_t>(chunk / chunks)};
}

// A GPU divides 64 bits in some hundred instructions, 32 in a dozen: none of the sizes exceeds the number of threads.
I2V_HOST_DEVICE Position position_of(const Launch& p, int64_t thread) {
  return p.threads >> 32 == 0 ? position_of<uint32_t>(p, static_cast<uint32_t>(thread)) : position_of<int64_t>(p, thread);
}

// Groups that are not there stop at 0, so the loop is unrolled whole and its table stays in the constant bank.
I2V_HOST_DEVICE int64_t offset_of(const Launch& p, const Position& at) {
  int64_t offset = 0;
#pragma unroll
  for (int g = max_groups - 1; g >= 0; --g)
    if (at.vector < p.groups[g].stop) offset = p.groups[g].offset;
  const int64_t token = at.token - p.start;
  return token >= 0 && at.token < p.stop && (p.step == 1 || token % p.step == 0) ? offset : 0;
}

// Output frame t is the sum of frames [first, last), and with a residual of itself.
I2V_HOST_DEVICE void summands_of(const Launch& p, int64_t t, int64_t offset, int64_t& first, int64_t& last) {
  if (p.readers) return edge_readers(t, offset, p.frames, first, last);
  first = source_frame(t, offset, p.frames, p.padding);
  last = first < 0 ? first : first + 1;
}

template <typename T>
struct Sum { using type = float; };
template <>
struct Sum<double> { using type = double; };

// Output frames [at.frame, at.frame + frames_per_thread) of one vector, T being any type of an element's size or less: copies.
template <typename T, int Bytes>
I2V_HOST_DEVICE void copy_frames(const Launch& p, int64_t thread) {
  if (thread >= p.threads) return;
  const Position at = position_of(p, thread);
  const int64_t offset = offset_of(p, at);
  const char* x = p.x + at.clip * p.x_stride[0] + at.token * p.x_stride[2] + at.vector * Bytes;
  char* out = p.out + at.clip * p.out_stride[0] + at.token * p.out_stride[2] + at.vector * Bytes;
  Vector<T, Bytes> row[frames_per_thread];
#pragma unroll
  for (int i = 0; i < frames_per_thread; ++i) {
    const int64_t t = at.frame + i, from = t < p.frames ? source_frame(t, offset, p.frames, p.padding) : -1;
    row[i] = from < 0 ? Vector<T, Bytes>{} : *reinterpret_cast<const Vector<T, Bytes>*>(x + from * p.x_stride[1]);
  }
#pragma unroll
  for (int i = 0; i < frames_per_thread; ++i)
    if (at.frame + i < p.frames) *reinterpret_cast<Vector<T, Bytes>*>(out + (at.frame + i) * p.out_stride[1]) = row[i];
}

// The same where each output frame is a sum, T being the element's type: of the frames that read it, or the one it reads, and
// with Residual of itself. All but the clip's first and last frame have at most one reader, so the first readers of all frames
// are loaded before any others.
template <typename T, int Bytes, bool Residual>
I2V_HOST_DEVICE void sum_frames(const Launch& p, int64_t thread) {
  if (thread >= p.threads) return;
  constexpr int lanes = Bytes / static_cast<int>(sizeof(T));
  const Position at = position_of(p, thread);
  const int64_t offset = offset_of(p, at);
  const char* x = p.x + at.clip * p.x_stride[0] + at.token * p.x_stride[2] + at.vector * Bytes;
  char* out = p.out + at.clip * p.out_stride[0] + at.token * p.out_stride[2] + at.vector * Bytes;
  Vector<T, Bytes> row[frames_per_thread], own[frames_per_thread];
#pragma unroll
  for (int i = 0; i < frames_per_thread; ++i) {
    const int64_t t = at.frame + i;
    int64_t first = 0, last = 0;
    if (t < p.frames) summands_of(p, t, offset, first, last);
    row[i] = first == last ? Vector<T, Bytes>{} : *reinterpret_cast<const Vector<T, Bytes>*>(x + first * p.x_stride[1]);
    own[i] = !Residual || t >= p.frames ? Vector<T, Bytes>{}
                                        : *reinterpret_cast<const Vector<T, Bytes>*>(x + t * p.x_stride[1]);
  }
#pragma unroll
  for (int i = 0; i < frames_per_thread; ++i) {
    const int64_t t = at.frame + i;
    if (t >= p.frames) return;
    int64_t first, last;
    summands_of(p, t, offset, first, last);
    if (Residual || last - first > 1) {
      typename Sum<T>::type sum[lanes];
#pragma unroll
      for (int c = 0; c < lanes; ++c) sum[c] = row[i].value[c];
      if constexpr (Residual) {
#pragma unroll
        for (int c = 0; c < lanes; ++c) sum[c] += static_cast<typename Sum<T>::type>(own[i].value[c]);
      }
      for (int64_t s = first + 1; s < last; ++s) {
        const auto more = *reinterpret_cast<const Vector<T, Bytes>*>(x + s * p.x_stride[1]);
#pragma unroll
        for (int c = 0; c < lanes; ++c) sum[c] += static_cast<typename Sum<T>::type>(more.value[c]);
      }
#pragma unroll
      for (int c = 0; c < lanes; ++c) row[i].value[c] = static_cast<T>(sum[c]);
    }
    *reinterpret_cast<Vector<T, Bytes>*>(out + t * p.out_stride[1]) = row[i];
  }
}

// Checks the arguments and describes the launch.
inline Launch describe(const Tensor& x, const Tensor& out, const std::vector<int64_t>& channels,
                       const std::vector<int64_t>& offsets, int64_t padding, int64_t start, int64_t stop, int64_t step,
                       bool residual, bool adjoint) {
  STD_TORCH_CHECK(x.dim() == 4, "token_shift: x must be [B, T, N, C]");
  STD_TORCH_CHECK(channels.size() == offsets.size(), "token_shift: as many offsets as channels are needed");
  STD_TORCH_CHECK(channels.size() <= max_groups, "token_shift: ", channels.size(), " groups, at most ", max_groups, " fit");
  STD_TORCH_CHECK(padding >= 0 && padding <= 2, "token_shift: padding ", padding, " is unknown");
  STD_TORCH_CHECK(step >= 1, "token_shift: step ", step, " must be at least 1");
  check_like(x, x, "x");
  check_like(out, x, "out");
  Launch p{};
  p.x = static_cast<const char*>(x.data_ptr());
  p.out = static_cast<char*>(out.data_ptr());
  p.frames = x.size(1), p.tokens = x.size(2);
  p.start = start, p.stop = stop, p.step = step;
  p.padding = static_cast<Padding>(padding);
  p.readers = adjoint && p.padding == edge;
  p.residual = residual;
  const int64_t size = x.element_size();
  for (int i = 0; i < 3; ++i) p.x_stride[i] = x.stride(i) * size, p.out_stride[i] = out.stride(i) * size;
  p.vector_bytes = common_width(out, common_width(x, widest));
  int64_t end = 0;
  for (size_t i = 0; i < channels.size(); ++i) {
    end += channels[i] > 0 ? channels[i] : 0;
    p.vector_bytes = common_width(end * size, p.vector_bytes);
    const int64_t offset = normal_offset(offsets[i], p.frames, p.padding);
    p.groups[i] = {end * size, adjoint && !p.readers ? -offset : offset};
  }
  STD_TORCH_CHECK(end <= x.size(3), "token_shift: the groups name ", end, " of ", x.size(3), " channels");
  if ((p.readers || p.residual) && p.vector_bytes < widest) p.vector_bytes = static_cast<int>(size);  // rare: no kernels of its own
  p.vectors = x.size(3) * size / p.vector_bytes;
  for (Group& group : p.groups) group.stop /= p.vector_bytes;
  p.chunks = (p.frames + frames_per_thread - 1) / frames_per_thread;
  p.threads = x.size(0) * p.chunks * p.tokens * p.vectors;
  p.blocks = (p.threads + threads_per_block - 1) / threads_per_block;
  return p;
}

template <typename T, int Bytes>
struct Copy {
  static I2V_HOST_DEVICE void run(const Launch& p, int64_t thread) { copy_frames<T, Bytes>(p, thread); }
};

template <typename T, int Bytes, bool Residual>
struct Add {
  static I2V_HOST_DEVICE void run(const Launch& p, int64_t thread) { sum_frames<T, Bytes, Residual>(p, thread); }
};

template <typename T, typename Body>
void for_sums(const Launch& p, const Body& body) {
  constexpr int narrow = static_cast<int>(sizeof(T));
  if (p.vector_bytes == widest) return p.residual ? body(Add<T, widest, true>{}) : body(Add<T, widest, false>{});
  return p.residual ? body(Add<T, narrow, true>{}) : body(Add<T, narrow, false>{});
}

// body(Thread{}), where Thread::run is what a thread of this launch does: one table for the GPU and the emulation.
template <typename Body>
void for_thread(const Launch& p, ScalarType dtype, const Body& body) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (!p.readers && !p.residual) {
    switch (p.vector_bytes) {
      case 16: return body(Copy<uint32_t, 16>{});
      case 8: return body(Copy<uint32_t, 8>{});
      case 4: return body(Copy<uint32_t, 4>{});
      case 2: return body(Copy<uint16_t, 2>{});
      default: break;
    }
  } else {
    switch (dtype) {
      case ScalarType::Double: return for_sums<double>(p, body);
      case ScalarType::Float: return for_sums<float>(p, body);
      case ScalarType::BFloat16: return for_sums<BFloat16>(p, body);
      case ScalarType::Half: return for_sums<Half>(p, body);
      default: break;
    }
  }
  STD_TORCH_CHECK(false, "token_shift: only float64, float32, bfloat16 and float16 are supported");
}

}  // namespace i2v::shift
