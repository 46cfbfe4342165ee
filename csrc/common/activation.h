// Activations by name, and what a GPU thread computes of them.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <string>

#include "host_device.h"

namespace i2v {

enum class Activation { none, gelu, quick_gelu, relu, silu };

inline Activation activation_of(const std::string& name) {
  constexpr const char* names[] = {"", "gelu", "quick_gelu", "relu", "silu"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "activation '", name, "' is unknown");
}

I2V_HOST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

I2V_HOST_DEVICE float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::quick_gelu: return x * sigmoid(1.702f * x);
    case Activation::relu: return x < 0 ? 0 : x;  // NaN stays
    case Activation::silu: return x * sigmoid(x);
    default: return x;
  }
}

// The gradient before the activation, of that behind it.
I2V_HOST_DEVICE float activation_gradient(float grad, float x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return grad * (0.5f * (1.0f + erff(x * 0.70710678f)) + x * expf(-0.5f * x * x) * 0.39894228f);
    case Activation::quick_gelu: {
      const float gate = sigmoid(1.702f * x);
      return grad * (gate + 1.702f * x * gate * (1.0f - gate));
    }
    case Activation::relu: return x <= 0 ? 0 : grad;  // NaN passes, as in PyTorch
    case Activation::silu: {
      const float gate = sigmoid(x);
      return grad * (gate + x * gate * (1.0f - gate));
    }
    default: return grad;
  }
}

}  // namespace i2v
