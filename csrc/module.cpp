// The importable module `_C`: it carries the registered ops and says how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/cpu.h"

#ifndef I2V_CUDA_ARCHITECTURES
#define I2V_CUDA_ARCHITECTURES ""
#endif

namespace i2v {
namespace {

constexpr const char* names[] = {"plain", "avx2", "avx512", "avx512_bf16"};

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::plain;
}

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { chosen().store(isa); }

}  // namespace i2v

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of i2v_kernels; importing it registers them with PyTorch";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cuda_architectures"] = std::string(I2V_CUDA_ARCHITECTURES);
        std::vector<std::string> isas;
        for (int i = 0; i <= static_cast<int>(i2v::best_isa()); ++i) isas.emplace_back(i2v::names[i]);
        info["instruction_sets"] = isas;
        info["instruction_set"] = std::string(i2v::names[static_cast<int>(i2v::current_isa())]);
#if defined(__x86_64__)
        info["vnni"] = static_cast<bool>(__builtin_cpu_supports("avx512vnni"));
#else
        info["vnni"] = false;
#endif
        info["torch_target"] = "2.11";
        return info;
      },
      "Compiler, CUDA architectures (empty without CUDA), instruction sets this processor can run, the one in use, and whether "
      "it has AVX-512 VNNI.");
  m.def(
      "use_instruction_set",
      [](const std::string& name) {
        for (int i = 0; i <= static_cast<int>(i2v::best_isa()); ++i)
          if (name == i2v::names[i]) return i2v::set_isa(static_cast<i2v::Isa>(i));
        throw py::value_error("use_instruction_set: name='" + name + "' is not among build_info()['instruction_sets']");
      },
      "Make the CPU kernels use this instruction set (for tests and measurements).", py::arg("name"));
}
