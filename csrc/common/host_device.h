// What the code of GPU threads needs to be compiled for the CPU as well.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define I2V_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define I2V_HOST_DEVICE inline
#endif

namespace i2v {

// What one instruction loads or stores.
template <typename T, int Bytes>
struct alignas(Bytes) Vector {
  T value[Bytes / sizeof(T)];
};

}  // namespace i2v
