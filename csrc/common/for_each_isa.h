// Compiles the header I2V_KERNELS once per instruction set, each time in a namespace of its own: plain, avx2, avx512,
// avx512_bf16. No include guard. Kernels must not hold lambdas (they would not inherit the target).
#define I2V_ISA_PLAIN 0
#define I2V_ISA_AVX2 1
#define I2V_ISA_AVX512 2
#define I2V_ISA_AVX512_BF16 3

#define I2V_ISA I2V_ISA_PLAIN
#define I2V_VECTOR_BYTES 16
namespace i2v::plain {
#include "vec.h"
#include I2V_KERNELS
}  // namespace i2v::plain
#undef I2V_ISA
#undef I2V_VECTOR_BYTES

#if defined(__x86_64__)

#define I2V_ISA I2V_ISA_AVX2
#define I2V_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace i2v::avx2 {
#include "vec.h"
#include I2V_KERNELS
}  // namespace i2v::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef I2V_ISA
#undef I2V_VECTOR_BYTES

#define I2V_ISA I2V_ISA_AVX512
#define I2V_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace i2v::avx512 {
#include "vec.h"
#include I2V_KERNELS
}  // namespace i2v::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef I2V_ISA
#undef I2V_VECTOR_BYTES

#define I2V_ISA I2V_ISA_AVX512_BF16
#define I2V_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace i2v::avx512_bf16 {
#include "vec.h"
#include I2V_KERNELS
}  // namespace i2v::avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef I2V_ISA
#undef I2V_VECTOR_BYTES
#endif
