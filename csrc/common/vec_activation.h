// The activations of activation.h on vectors. Included once per instruction set, after vec.h: no include guard.

template <typename A>
I2V_INLINE Vec<A> sigmoid(Vec<A> x) {
  const Vec<A> e = exp_nonpositive(x < 0 ? x : -x);  // no overflow
  return (x < 0 ? e : broadcast<A>(1)) / (1 + e);
}

// The share of the normal distribution below x, and its density there.
I2V_INLINE Vec<float> normal_cdf(Vec<float> x, Vec<float>& density) {
  // The tail over exp(-x^2 / 2) is nearly a polynomial in 1 / (1 + 0.28 |x|); this one, fitted up to 13.3, is off by 3e-8 of it.
  constexpr float coefficient[] = {1.49567459e-05f, 0.111380868f,   0.114675067f, 0.0877882764f,   0.131921172f,
                                   -0.0243041515f,  0.117990568f,   -0.00586534152f, -0.0500631109f, 0.016461717f};
  const Vec<float> e = exp_nonpositive(-0.5f * x * x);
  const Vec<float> t = 1.0f / (1.0f + 0.28f * (x < 0 ? -x : x));
  Vec<float> tail = broadcast(coefficient[9]);
#pragma GCC unroll 9
  for (int i = 8; i >= 0; --i) tail = tail * t + coefficient[i];
  tail *= e;
  density = e * 0.39894228f;
  return x < 0 ? tail : 1.0f - tail;
}

I2V_INLINE Vec<double> normal_cdf(Vec<double> x, Vec<double>& density) {
  density = exp_nonpositive(-0.5 * x * x) * 0.39894228040143267794;
  for (int i = 0; i < lanes<double>; ++i) x[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
  return x;
}

template <typename A>
I2V_INLINE Vec<A> activate(Vec<A> x, Activation activation) {
  Vec<A> density;
  switch (activation) {
    case Activation::gelu: return x * normal_cdf(x, density);
    case Activation::quick_gelu: return x * sigmoid<A>(A(1.702) * x);
    case Activation::relu: return x < 0 ? Vec<A>{} : x;  // NaN stays
    case Activation::silu: return x * sigmoid<A>(x);
    default: return x;
  }
}

// The gradient before the activation, of that behind it.
template <typename A>
I2V_INLINE Vec<A> activation_gradient(Vec<A> grad, Vec<A> x, Activation activation) {
  Vec<A> gate, density;
  switch (activation) {
    case Activation::gelu:
      gate = normal_cdf(x, density);
      return grad * (gate + x * density);
    case Activation::quick_gelu:
      gate = sigmoid<A>(A(1.702) * x);
      return grad * (gate + A(1.702) * x * gate * (1 - gate));
    case Activation::relu: return x <= 0 ? Vec<A>{} : grad;  // NaN passes, as in PyTorch
    case Activation::silu:
      gate = sigmoid<A>(x);
      return grad * (gate + x * gate * (1 - gate));
    default: return grad;
  }
}
