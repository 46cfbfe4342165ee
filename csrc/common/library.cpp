// The one definition of the library of compiled ops; each op adds its fragment.
#include "tensor.h"

STABLE_TORCH_LIBRARY(i2v_kernels_C, m) {}
