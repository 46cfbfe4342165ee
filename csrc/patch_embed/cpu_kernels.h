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
        for (int64_t k = 0; k < run; ++k)
          to[i * size + k] =
              static_cast<T>((static_cast<A>(from[i * step + k / 3 * p.stride[3] + k % 3]) - centre[k]) * (A(1) / 256));
      }
    }
    row += count;
  }
}
