// What one thread of the CUDA kernels does, and the launch that describes it: no CUDA header is needed, so that emulated.cpp
// runs the same code on the CPU. A thread owns a vector of neighbouring channels: channels are the lanes of a depthwise
// convolution, and neighbouring threads hold neighbouring channels of one token.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../common/activation.h"
#include "../common/vector_width.h"

namespace i2v::conv {

constexpr int threads_per_block = 128;
constexpr int sums_per_thread = 32;  // outputs whose sums a thread holds: a frame is loaded once for all taps in time

// A tensor [B, T, N, C]; strides of clip, frame and token in bytes.
struct Tokens {
  char* data;
  int64_t stride[3];
};

// A row of C channels is cut into `vectors` vectors of `vector_bytes` bytes.
struct Launch {
  Tokens x, out;
  Tokens extra;        // added to the output, or with `gradient` the gradient behind the activation; data is null for none
  const char* weight;  // [kt * kh * kw, C] in the type of x
  const char* bias;    // [C] in the type of x, or null
  float* weight_sums;  // of the gradient: [shares, kt * kh * kw, C], and its extra is what it sums the products with
  float* bias_sums;    // [shares, C]
  int64_t clips, frames, tokens, channels, vectors, prefix, height, width, dilation, chunks, shares;
  int64_t threads, blocks;  // threads that have work, and the blocks that hold them
  int kt, kh, kw;
  Activation activation;
  bool copy_prefix, gradient;
  int vector_bytes;
};

constexpr int lanes_of(int vector_bytes, int64_t itemsize) { return vector_bytes / static_cast<int>(itemsize); }
constexpr int frames_per_thread(int lanes) { return lanes == 1 ? 8 : sums_per_thread / lanes; }

template <typename T, int Bytes>
I2V_HOST_DEVICE Vector<T, Bytes> load(const char* from) {
  return *reinterpret_cast<const Vector<T, Bytes>*>(from);
}

// A few output frames of one token and vector, of one residue modulo the dilation. Plain: no activation, no extra.
template <typename T, int Bytes, int KT, bool Plain>
I2V_HOST_DEVICE void convolve_frames(const Launch& p, int64_t thread) {
  constexpr int lanes = lanes_of(Bytes, sizeof(T)), frames = frames_per_thread(lanes);
  using Row = Vector<T, Bytes>;
  if (thread >= p.threads) return;
  const int64_t vector = thread % p.vectors, token = thread / p.vectors % p.tokens, rest = thread / p.vectors / p.tokens;
  const int64_t residue = rest / p.chunks % p.dilation, clip = rest / p.chunks / p.dilation;
  const int64_t first = residue + rest % p.chunks * frames * p.dilation;  // frame
  const int64_t column = vector * Bytes;
  const char* x = p.x.data + clip * p.x.stride[0] + column;
  const char* extra = p.extra.data ? p.extra.data + clip * p.extra.stride[0] + token * p.extra.stride[2] + column : nullptr;
  char* out = p.out.data + clip * p.out.stride[0] + token * p.out.stride[2] + column;

  if (token < p.prefix) {
    for (int i = 0; i < frames; ++i) {
      const int64_t t = first + i * p.dilation;
      if (t >= p.frames) break;
      Row row{};
      if (p.copy_prefix)
        row = load<T, Bytes>(p.gradient ? extra + t * p.extra.stride[1] : x + token * p.x.stride[2] + t * p.x.stride[1]);
      *reinterpret_cast<Row*>(out + t * p.out.stride[1]) = row;
    }
    return;
  }

  float sum[frames][lanes] = {};
  if (p.bias) {
    const Row bias = load<T, Bytes>(p.bias + column);
#pragma unroll
    for (int i = 0; i < frames; ++i)
#pragma unroll
      for (int c = 0; c < lanes; ++c) sum[i][c] = static_cast<float>(bias.value[c]);
  }
  const int64_t patch = token - p.prefix, row_y = patch / p.width, row_x = patch % p.width;
  const int64_t plane = static_cast<int64_t>(p.kh) * p.kw;
  for (int j = 0; j < plane; ++j) {
    const int64_t from_y = row_y + j / p.kw - p.kh / 2, from_x = row_x + j % p.kw - p.kw / 2;
    if (from_y < 0 || from_y >= p.height || from_x < 0 || from_x >= p.width) continue;
    const char* from = x + (p.prefix + from_y * p.width + from_x) * p.x.stride[2];
    Row weight[KT], row[frames + KT - 1];
#pragma unroll
    for (int i = 0; i < KT; ++i)
      weight[i] = load<T, Bytes>(p.weight + (i * plane + j) * p.channels * static_cast<int64_t>(sizeof(T)) + column);
#pragma unroll
    for (int i = 0; i < frames + KT - 1; ++i) {
      const int64_t t = first + (i - KT / 2) * p.dilation;
      row[i] = t >= 0 && t < p.frames ? load<T, Bytes>(from + t * p.x.stride[1]) : Row{};
    }
#pragma unroll
    for (int i = 0; i < frames; ++i)
#pragma unroll
      for (int k = 0; k < KT; ++k)
#pragma unroll
        for (int c = 0; c < lanes; ++c)
          sum[i][c] += static_cast<float>(weight[k].value[c]) * static_cast<float>(row[i + k].value[c]);
  }
#pragma unroll
  for (int i = 0; i < frames; ++i) {
    const int64_t t = first + i * p.dilation;
    if (t < p.frames) {
      const Row more = !Plain && extra ? load<T, Bytes>(extra + t * p.extra.stride[1]) : Row{};
      Row row;
#pragma unroll
      for (int c = 0; c < lanes; ++c) {
        const float other = static_cast<float>(more.value[c]);
        float y = sum[i][c];
        if (!Plain) y = p.gradient ? activation_gradient(other, y, p.activation) : activate(y, p.activation) + other;
        row.value[c] = static_cast<T>(y);
      }
      *reinterpret_cast<Row*>(out + t * p.out.stride[1]) = row;
    }
  }
}

// This share's sums for one vector and one tap in the grid: over every shares-th token, all frames, all taps in time. The
// window of input frames rolls through registers. The shares are added afterwards, in order: the same bits every time.
template <typename T, int Bytes, int KT>
I2V_HOST_DEVICE void sum_products(const Launch& p, int64_t thread) {
  constexpr int lanes = lanes_of(Bytes, sizeof(T));
  using Row = Vector<T, Bytes>;
  if (thread >= p.threads) return;
  const int64_t plane = static_cast<int64_t>(p.kh) * p.kw, patches = p.tokens - p.prefix;
  const int64_t vector = thread % p.vectors, j = thread / p.vectors % plane, share = thread / p.vectors / plane;
  const int64_t column = vector * Bytes, down = j / p.kw - p.kh / 2, right = j % p.kw - p.kw / 2;
  const int64_t x_step = p.dilation * p.x.stride[1], grad_step = p.dilation * p.extra.stride[1];
  const int64_t reach = p.frames - KT / 2 * p.dilation;  // gradients before this frame meet an input at their last tap
  float sum[KT][lanes] = {}, bias_sum[lanes] = {};
  for (int64_t item = share; item < p.clips * patches; item += p.shares) {
    const int64_t clip = item / patches, patch = item % patches;
    const int64_t from_y = patch / p.width + down, from_x = patch % p.width + right;
    if (from_y < 0 || from_y >= p.height || from_x < 0 || from_x >= p.width) continue;
    const char* x = p.x.data + clip * p.x.stride[0] + (p.prefix + from_y * p.width + from_x) * p.x.stride[2] + column;
    const char* grad = p.extra.data + clip * p.extra.stride[0] + (p.prefix + patch) * p.extra.stride[2] + column;
    for (int64_t residue = 0; residue < p.dilation; ++residue) {
      Row window[KT];
#pragma unroll
      for (int k = 0; k < KT - 1; ++k) {
        const int64_t t = residue + (k - KT / 2) * p.dilation;
        window[k] = t >= 0 && t < p.frames ? load<T, Bytes>(x + t * p.x.stride[1]) : Row{};
      }
      const char* ahead = x + (residue + KT / 2 * p.dilation) * p.x.stride[1];
      const char* at = grad + residue * p.extra.stride[1];
#pragma unroll 4
      for (int64_t t = residue; t < p.frames; t += p.dilation) {
        window[KT - 1] = t < reach ? load<T, Bytes>(ahead) : Row{};
        const Row row = load<T, Bytes>(at);
        ahead += x_step, at += grad_step;
#pragma unroll
        for (int c = 0; c < lanes; ++c) {
          const float g = static_cast<float>(row.value[c]);
          bias_sum[c] += g;
#pragma unroll
          for (int k = 0; k < KT; ++k) sum[k][c] += g * static_cast<float>(window[k].value[c]);
        }
#pragma unroll
        for (int k = 0; k < KT - 1; ++k) window[k] = window[k + 1];
      }
    }
  }
  constexpr int piece = lanes < 4 ? lanes : 4;
  using Sums = Vector<float, piece * 4>;
#pragma unroll
  for (int c = 0; c < lanes; c += piece) {
    const int64_t channel = vector * lanes + c;
#pragma unroll
    for (int k = 0; k <= KT; ++k) {
      if (k == KT && (down != 0 || right != 0)) continue;  // every token takes part in the middle tap
      Sums sums;
#pragma unroll
      for (int l = 0; l < piece; ++l) sums.value[l] = k == KT ? bias_sum[c + l] : sum[k < KT ? k : 0][c + l];
      float* to = k == KT ? p.bias_sums + share * p.channels : p.weight_sums + ((share * KT + k) * plane + j) * p.channels;
      *reinterpret_cast<Sums*>(to + channel) = sums;
    }
  }
}

template <typename T, int Bytes, int KT>
struct Convolve {
  static I2V_HOST_DEVICE void run(const Launch& p, int64_t thread) { convolve_frames<T, Bytes, KT, true>(p, thread); }
};

template <typename T, int Bytes, int KT>
struct ConvolveAndFinish {
  static I2V_HOST_DEVICE void run(const Launch& p, int64_t thread) { convolve_frames<T, Bytes, KT, false>(p, thread); }
};

template <typename T, int Bytes, int KT>
struct Products {
  static I2V_HOST_DEVICE void run(const Launch& p, int64_t thread) { sum_products<T, Bytes, KT>(p, thread); }
};

}  // namespace i2v::conv
