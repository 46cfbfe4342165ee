// Run-time choice of the instruction set, work split and scratch memory for the CPU kernels.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "tensor.h"

namespace i2v {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;

enum class Isa { plain, avx2, avx512, avx512_bf16 };

Isa best_isa();      // what this processor has
Isa current_isa();   // what the kernels use: the best one unless set_isa was called
void set_isa(Isa isa);

// Sums over T are kept in this type.
template <typename T>
struct accumulate { using type = float; };
template <>
struct accumulate<double> { using type = double; };
template <typename T>
using accumulate_t = typename accumulate<T>::type;

// `kernel<T, ...>` of the namespace compiled for the current instruction set.
#if defined(__x86_64__)
#define I2V_PICK(kernel, ...)                                                         \
  (::i2v::current_isa() == ::i2v::Isa::avx512_bf16 ? avx512_bf16::kernel<__VA_ARGS__> \
   : ::i2v::current_isa() == ::i2v::Isa::avx512    ? avx512::kernel<__VA_ARGS__>      \
   : ::i2v::current_isa() == ::i2v::Isa::avx2      ? avx2::kernel<__VA_ARGS__>        \
                                                   : plain::kernel<__VA_ARGS__>)
#else
#define I2V_PICK(kernel, ...) plain::kernel<__VA_ARGS__>
#endif

// Runs `body` with a null pointer of the element type.
template <typename Body>
void for_dtype(ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::Float: return body(static_cast<float*>(nullptr));
    case ScalarType::Double: return body(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return body(static_cast<bf16*>(nullptr));
    case ScalarType::Half: return body(static_cast<fp16*>(nullptr));
    default: STD_TORCH_CHECK(false, "only float64, float32, bfloat16 and float16 are supported");
  }
}

// Whether traffic of so many bytes leaves nothing of itself in a usual last-level cache.
inline bool exceeds_cache(int64_t bytes) { return bytes > (32 << 20); }

// Work is cut into pieces that depend on the shape alone, so that sums come out the same for any number of threads.
inline int64_t piece_count(int64_t items, int64_t bytes_per_item, int64_t most = 128) {
  const int64_t worthwhile = items * bytes_per_item / (64 << 10);  // below 64 KiB a thread costs more than it saves
  return std::max<int64_t>(1, std::min({items, worthwhile, most}));
}

// body(piece, begin, end) for each piece of [0, items).
template <typename Body>
void for_pieces(int64_t items, int64_t pieces, const Body& body) {
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i, items * i / pieces, items * (i + 1) / pieces);
  });
}

// Zeroed memory on a cache line's boundary.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(::operator new(std::max<int64_t>(count, 1) * sizeof(A), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(data_), 0, count * sizeof(A));
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(Scratch&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* data() const { return data_; }

 private:
  A* data_;
};

}  // namespace i2v
