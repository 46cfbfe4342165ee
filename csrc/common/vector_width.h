// How wide a GPU thread's loads and stores may be.
#pragma once

#include "tensor.h"

namespace i2v {

constexpr int widest = 16;  // bytes of the widest load and store

// The greatest power of two up to `width` that divides a number of bytes.
inline int common_width(int64_t bytes, int width) {
  while (bytes % width != 0) width /= 2;
  return width;
}

// The same of all places where rows of a tensor begin and end.
inline int common_width(const Tensor& t, int width) {
  const int64_t size = t.element_size();
  width = common_width(reinterpret_cast<int64_t>(t.data_ptr()), width);
  width = common_width(t.size(t.dim() - 1) * size, width);
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    if (t.size(i) > 1) width = common_width(t.stride(i) * size, width);
  return width;
}

}  // namespace i2v
