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

// Rows [begin, end).
template <typename T>
void gather(const Problem& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const A* centre = static_cast<const A*>(p.centre);
  const int64_t run = p.patch_width * 3;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t patch = p.first + row, line = patch / p.grid_width, frame = line / p.grid_height;
    const uint8_t* from = p.data + frame / p.frames * p.stride[0] + frame % p.frames * p.stride[1] +
                          line % p.grid_height * p.patch_height * p.stride[2] +
                          patch % p.grid_width * p.patch_width * p.stride[3];
    T* to = static_cast<T*>(p.rows) + row * p.patch_height * run;
    for (int64_t y = 0; y < p.patch_height; ++y, to += run, from += p.stride[2]) {
      if (p.stride[3] == 3) {
        convert_run(to, from, centre, run);
        continue;
      }
      for (int64_t x = 0; x < p.patch_width; ++x)
        for (int64_t c = 0; c < 3; ++c)
          to[3 * x + c] = static_cast<T>((static_cast<A>(from[x * p.stride[3] + c]) - centre[c]) * (A(1) / 256));
    }
  }
}
