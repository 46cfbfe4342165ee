// What the kernels know of a tensor: a pointer and strides, in elements.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace i2v {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// `Rank` leading strides; the last dimension has stride 1.
template <int Rank>
struct View {
  char* data = nullptr;
  int64_t stride[Rank] = {};

  View() = default;
  explicit View(const Tensor& t) : data(static_cast<char*>(t.data_ptr())) {
    for (int i = 0; i < Rank; ++i) stride[i] = t.stride(i);
  }
};

template <typename T>
inline T* row_of(const View<3>& x, int64_t b, int64_t t, int64_t n) {
  return reinterpret_cast<T*>(x.data) + b * x.stride[0] + t * x.stride[1] + n * x.stride[2];
}

// The Python layer tells the user; these checks keep a direct call of the compiled op from reading outside a tensor.
inline void check_like(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == like.dim(), name, " has ", t.dim(), " dimensions, not ", like.dim());
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " has another dtype than the first argument");
  STD_TORCH_CHECK(t.device() == like.device(), name, " is on another device than the first argument");
  for (int64_t i = 0; i < t.dim(); ++i)
    STD_TORCH_CHECK(t.size(i) == like.size(i), name, ": size ", t.size(i), " of dimension ", i, " is not ", like.size(i));
  STD_TORCH_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name, ": the last stride must be 1");
}

// Uninitialized memory of x's shape in x's order of dimensions, the last one innermost; ops/layout.py has the same in Python.
inline Tensor empty_dense_like(const Tensor& x) {
  if (x.is_contiguous()) return torch::stable::new_empty(x, x.sizes());  // whatever the stride of a single entry
  Tensor out = torch::stable::empty_like(x);
  const int64_t last = x.dim() - 1;
  if (out.stride(last) == 1 || out.size(last) == 1) return out;
  return torch::stable::new_empty(x, x.sizes());
}

// What a backward op returns where no gradient is wanted.
inline Tensor empty_of(const Tensor& like) { return torch::stable::new_empty(like, std::vector<int64_t>{0}); }

inline void check_contiguous(const Tensor& t, int64_t elements, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == elements && t.scalar_type() == dtype, name,
                  " must be contiguous with ", elements, " elements of the right dtype");
}

}  // namespace i2v
