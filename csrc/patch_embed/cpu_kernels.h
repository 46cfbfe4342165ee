// (pixel - centre) / 256 for the bytes of a patch, one pixel row after the other: at most 8 significant bits, exact in every
// dtype. Included by for_each_isa.h inside the namespace of an instruction set.

template <typename A>
struct Bytes {
  typedef uint8_t type __attribute__((vector_size(lanes<A>)));
};

template <typename A>
I2V_INLINE Vec<A> widen(const uint8_t* from) {
  typename Bytes<A>::type bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, typename VecOf<A>::index), Vec<A>);
}

template <typename T>
I2V_INLINE void convert_run(T* to, const uint8_t* from, const accumulate_t<T>* centre, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  constexpr A scale = A(1) / 256;
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, (widen<A>(from + i) - load(centre + i)) * scale);
  if (i == count) return;
  uint8_t last[W] = {};  // no byte beyond the run is read: the frame may end there
  std::memcpy(last, from + i, count - i);
  store_part(to + i, (widen<A>(last) - load_part(centre + i, count - i)) * scale, count - i);
}

// For the product of whole numbers: counted from 128, unscaled.
I2V_INLINE void convert_run(int8_t* to, const uint8_t* from, const float*, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int8_t>(from[i] ^ 0x80);
}

template <typename T>
I2V_INLINE T convert(uint8_t pixel, accumulate_t<T> centre) {
  if constexpr (std::is_same_v<T, int8_t>) return static_cast<int8_t>(pixel ^ 0x80);
  else return static_cast<T>((static_cast<accumulate_t<T>>(pixel) - centre) * (accumulate_t<T>(1) / 256));
}

// Rows [begin, end): the patches of a line of the grid together, pixel row by pixel row as they lie in memory, which the
// processor then fetches ahead.
template <typename T>
void gather(const Problem& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const A* centre = static_cast<const A*>(p.centre);
  const int64_t run = p.patch_width * 3, step = p.patch_width * p.stride[3], size = p.patch_height * run;
  for (int64_t row = begin; row < end;) {
    const int64_t patch = p.first + row, line = patch / p.grid_width, frame = line / p.grid_height, x = patch % p.grid_width;
    const int64_t count = std::min(p.grid_width - x, end - row);
    const uint8_t* from = p.data + frame / p.frames * p.stride[0] + frame % p.frames * p.stride[1] +
                          line % p.grid_height * p.patch_height * p.stride[2] + x * step;
    T* to = static_cast<T*>(p.rows) + row * size;
    for (int64_t y = 0; y < p.patch_height; ++y, to += run, from += p.stride[2]) {
      for (int64_t i = 0; i < count; ++i) {
        if (p.stride[3] == 3) {
          convert_run(to + i * size, from + i * step, centre, run);
          continue;
        }
        for (int64_t k = 0; k < run; ++k) to[i * size + k] = convert<T>(from[i * step + k / 3 * p.stride[3] + k % 3], centre[k]);
      }
    }
    row += count;
  }
}

using Floats = Vec<float>;
using Ints = VecOf<float>::index;

I2V_INLINE Ints load_ints(const int32_t* p) {
  Ints x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// The last digit to the base 256, from -128 to 127.
I2V_INLINE Ints last_digit(Ints x) { return (x << 24) >> 24; }

I2V_INLINE void store_digits(int8_t* to, Ints x, int64_t count) {
  typedef int8_t Bytes __attribute__((vector_size(lanes<float>)));
  const Bytes bytes = __builtin_convertvector(x, Bytes);
  std::memcpy(to, &bytes, count);
}

I2V_INLINE Floats load_up_to(const float* p, int64_t count) { return count >= lanes<float> ? load(p) : load_part(p, count); }

// Channels [begin, end) of the weight as whole numbers of three digits.
template <typename>
void split(const Digits& p, int64_t begin, int64_t end) {
  constexpr int W = lanes<float>;
  constexpr float most = 0x7f7f7d;  // the digits 127, 127, 125: rounding of a share may take it two further
  for (int64_t c = begin; c < end; ++c) {
    const float* weight = p.weight + c * p.size;
    Floats large{}, squares{};
    for (int64_t k = 0; k < p.size; k += W) {
      const Floats x = load_up_to(weight + k, p.size - k);
      large = max<float>(max<float>(x, -x), large);
    }
    float largest = 0, square = 0;
    for (int i = 0; i < W; ++i) largest = std::max(largest, large[i]);
    const float units = largest > 0 ? most / largest : 0;
    Ints sums[3] = {};
    for (int64_t k = 0; k < p.size; k += W) {
      const Floats share = load_up_to(weight + k, p.size - k) * units;
      squares += share * share;
      const Ints whole = __builtin_convertvector(share < 0 ? share - 0.5f : share + 0.5f, Ints);
      const Ints low = last_digit(whole), rest = (whole - low) >> 8, middle = last_digit(rest);
      const Ints digits[] = {(rest - middle) >> 8, middle, low};
      const Ints offset = load_ints(p.offset + k);
      for (int d = 0; d < 3; ++d) {
        sums[d] += digits[d] * offset;
        store_digits(p.digits + (d * p.channels + c) * p.size + k, digits[d], std::min<int64_t>(W, p.size - k));
      }
    }
    for (int i = 0; i < W; ++i) square += squares[i];
    for (int d = 0; d < 3; ++d) {
      int32_t sum = 0;
      for (int i = 0; i < W; ++i) sum += sums[d][i];
      p.correction[d * p.channels + c] = sum;
    }
    p.scale[c] = units > 0 ? 1 / (256 * units) : 0;
    // False for NaN and infinity as well.
    p.fits[c] = largest == 0 ? square == 0 : largest > 1e-20f && square >= 2 * most * most;
  }
}

// Rows [begin, end) of the result from the sums of each digit's product.
template <typename>
void join(const Joined& p, int64_t begin, int64_t end) {
  constexpr int W = lanes<float>;
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* sums = p.sums + row * 3 * p.channels;
    float* out = p.out + row * p.channels;
    int64_t c = 0;
    for (; c + W <= p.channels; c += W) {
      Floats sum{};
      for (int64_t d = 0, i = c; d < 3; ++d, i += p.channels)
        sum = sum * 256 + __builtin_convertvector(load_ints(sums + i) + load_ints(p.correction + i), Floats);
      store(out + c, sum * load(p.scale + c) + load(p.bias + c));
    }
    for (; c < p.channels; ++c) {
      float sum = 0;
      for (int64_t d = 0, i = c; d < 3; ++d, i += p.channels) sum = sum * 256 + static_cast<float>(sums[i] + p.correction[i]);
      out[c] = sum * p.scale[c] + p.bias[c];
    }
  }
}
