// How the CPU kernels stand in the dispatcher: at torch.ops.i2v_kernels.<op> itself, so that an eager call meets no Python
// between its argument checks and the kernel.
#pragma once

#include <string_view>

#include "stable.h"
#include "tensor.h"

namespace i2v {

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

// The last argument names a backend. "" and "cpu" run here; any other name goes on to <op>_by_name, where Python chooses.
inline void run_or_pass_on(BoxedKernel kernel, const char* by_name, StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const auto name = torch::stable::detail::to<StringHandle>(stack[inputs - 1]);  // borrowed: whoever runs takes the stack
  const char* text = nullptr;
  size_t length = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &text));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(name, &length));
  const std::string_view backend(text, length);
  if (backend.empty() || backend == "cpu") return kernel(stack, inputs, outputs);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(by_name, "", stack, TORCH_ABI_VERSION));
}

}  // namespace i2v

// Inside STABLE_TORCH_LIBRARY_IMPL(i2v_kernels, CPU, m); the schema is defined by i2v_kernels/ops/base.py.
#define I2V_IMPL(m, op, kernel)                                                                                       \
  (m).impl(#op, [](StableIValue* stack, uint64_t inputs, uint64_t outputs) {                                          \
    ::i2v::run_or_pass_on(TORCH_BOX(&kernel), "i2v_kernels::" #op "_by_name", stack, inputs, outputs);                \
  })
