// Activations by number, and what a GPU thread computes of them.
#pragma once

#include <cmath>

#include "host_device.h"

namespace i2v {

enum class Activation { none, gelu, quick_gelu, relu, silu };  // i2v_kernels/ops/activations.py has the names in this order

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
