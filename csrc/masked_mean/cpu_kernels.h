// A clip's frames are added up in a row that stays in the nearest cache; a frame that is normalised is read twice, the second
// time from there. Included by for_each_isa.h inside the namespace of an instruction set.

template <typename T>
I2V_INLINE Vec<accumulate_t<T>> load_some(const T* p, int64_t left) {
  return left >= lanes<accumulate_t<T>> ? load(p) : load_part(p, left);
}

template <typename T>
I2V_INLINE void store_some(T* p, Vec<accumulate_t<T>> x, int64_t left) {
  if (left >= lanes<accumulate_t<T>>) store(p, x);
  else store_part(p, x, left);
}

template <typename A>
I2V_INLINE A sum_lanes(Vec<A> x) {
  A sum = 0;
  for (int i = 0; i < lanes<A>; ++i) sum += x[i];
  return sum;
}

// <x, y> of two rows
template <typename T, typename U>
I2V_INLINE accumulate_t<T> product(const T* x, const U* y, int64_t channels) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  Vec<A> s0 = {}, s1 = {};
  int64_t c = 0;
  for (; c + 2 * W <= channels; c += 2 * W) s0 += load(x + c) * load(y + c), s1 += load(x + c + W) * load(y + c + W);
  for (; c < channels; c += W) s0 += load_some(x + c, channels - c) * load_some(y + c, channels - c);
  return sum_lanes<A>(s0 + s1);
}

// A length of at least F.normalize's eps; NaN stays NaN.
template <typename A>
I2V_INLINE A at_least(A length, A least) {
  return length < least ? least : length;
}

constexpr double smallest_length = 1e-12;

// sum = the sum of the clip's valid frames, of unit length if they are normalised; their number is returned, at least 1.
template <typename T, bool normalize>
I2V_INLINE accumulate_t<T> sum_frames(const MaskedMean& p, int64_t b, accumulate_t<T>* sum) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  for (int64_t c = 0; c < p.channels; c += W) store(sum + c, Vec<A>{});
  int64_t count = 0;
  for (int64_t t = 0; t < p.frames; ++t) {
    if (p.mask && !p.mask[b * p.frames + t]) continue;
    ++count;
    const T* x = reinterpret_cast<const T*>(p.x.data) + b * p.x.stride[0] + t * p.x.stride[1];
    A factor = 1;
    if constexpr (normalize) factor /= at_least<A>(std::sqrt(product(x, x, p.channels)), smallest_length);
    for (int64_t c = 0; c < p.channels; c += W) {
      const Vec<A> part = load_some(x + c, p.channels - c);
      store(sum + c, load(sum + c) + (normalize ? part * factor : part));
    }
  }
  return A(std::max<int64_t>(count, 1));
}

template <typename T, bool normalize>
void mean(const MaskedMean& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const Scratch<A> memory(p.channels + W);
  A* sum = memory.data();
  for (int64_t b = begin; b < end; ++b) {
    A by = sum_frames<T, normalize>(p, b, sum);
    if constexpr (normalize) by = at_least<A>(std::sqrt(product(sum, sum, p.channels)), by * A(smallest_length));
    T* out = reinterpret_cast<T*>(p.out.data) + b * p.out.stride[0];
    for (int64_t c = 0; c < p.channels; c += W) store_some(out + c, load(sum + c) / broadcast(by), p.channels - c);
  }
}

// The gradient of the sum, in the place of the sum.
template <typename T, bool normalize>
I2V_INLINE void sum_gradient(const MaskedMean& p, int64_t b, accumulate_t<T>* sum) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const T* grad = reinterpret_cast<const T*>(p.grad.data) + b * p.grad.stride[0];
  A by = 0, along = 0;
  if constexpr (normalize) {
    const A count = sum_frames<T, true>(p, b, sum), length = std::sqrt(product(sum, sum, p.channels));
    by = at_least<A>(length, count * A(smallest_length));
    if (!(length < by)) along = product(grad, sum, p.channels) / by / by;  // shorter ones are not normalised
  } else {
    int64_t count = p.mask ? 0 : p.frames;
    for (int64_t t = 0; p.mask && t < p.frames; ++t) count += p.mask[b * p.frames + t];
    by = A(std::max<int64_t>(count, 1));
  }
  for (int64_t c = 0; c < p.channels; c += W) {
    Vec<A> g = load_some(grad + c, p.channels - c);
    if constexpr (normalize) g -= load(sum + c) * along;
    store(sum + c, g / broadcast(by));
  }
}

template <typename T, bool normalize>
void spread(const MaskedMean& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const Scratch<A> memory(p.channels + W);
  A* given = memory.data();
  for (int64_t b = begin; b < end; ++b) {
    sum_gradient<T, normalize>(p, b, given);
    for (int64_t t = 0; t < p.frames; ++t) {
      T* dx = reinterpret_cast<T*>(p.dx.data) + b * p.dx.stride[0] + t * p.dx.stride[1];
      if (p.mask && !p.mask[b * p.frames + t]) {
        std::memset(static_cast<void*>(dx), 0, p.channels * sizeof(T));
        continue;
      }
      if constexpr (normalize) {
        const T* x = reinterpret_cast<const T*>(p.x.data) + b * p.x.stride[0] + t * p.x.stride[1];
        const A length = std::sqrt(product(x, x, p.channels)), factor = 1 / at_least<A>(length, smallest_length);
        const A along = length < A(smallest_length) ? 0 : product(x, given, p.channels) * factor * factor;
        for (int64_t c = 0; c < p.channels; c += W)
          store_some(dx + c, (load(given + c) - load_some(x + c, p.channels - c) * along) * factor, p.channels - c);
      } else {
        for (int64_t c = 0; c < p.channels; c += W) store_some(dx + c, load(given + c), p.channels - c);
      }
    }
  }
}
