// Maxima of a tile of similarities in both directions, and what they hand back to the features. Included by for_each_isa.h
// inside the namespace of an instruction set.

// Element i of indices of so many bytes each.
I2V_INLINE int64_t place_at(const char* p, int bytes, int64_t i) {
  if (bytes == 1) return reinterpret_cast<const uint8_t*>(p)[i];
  return bytes == 2 ? reinterpret_cast<const uint16_t*>(p)[i] : reinterpret_cast<const uint32_t*>(p)[i];
}

I2V_INLINE void put_place(char* p, int bytes, int64_t i, int64_t value) {
  if (bytes == 1) reinterpret_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(value);
  else if (bytes == 2) reinterpret_cast<int16_t*>(p)[i] = static_cast<int16_t>(value);
  else reinterpret_cast<int32_t*>(p)[i] = static_cast<int32_t>(value);
}

template <typename A>
I2V_INLINE A largest_lane(Vec<A> x) {
#pragma GCC unroll 8
  for (int width = lanes<A> / 2; width >= 1; width /= 2) {
    typename VecOf<A>::index turned;
#pragma GCC unroll 16
    for (int i = 0; i < lanes<A>; ++i) turned[i] = (i + width) % lanes<A>;
    x = max<A>(x, __builtin_shuffle(x, turned));
  }
  return x[0];
}

// The first of the lanes that are -1, lanes<A> if none is.
template <typename A>
I2V_INLINE int first_lane(typename VecOf<A>::index x) {
#if I2V_ISA >= I2V_ISA_AVX512
  const __m512i bits = (__m512i)x;
  const uint32_t set = sizeof(A) == 4 ? _mm512_movepi32_mask(bits) : _mm512_movepi64_mask(bits);
  return set ? __builtin_ctz(set) : lanes<A>;
#elif I2V_ISA == I2V_ISA_AVX2
  const uint32_t set = sizeof(A) == 4 ? _mm256_movemask_ps((__m256)x) : _mm256_movemask_pd((__m256d)x);
  return set ? __builtin_ctz(set) : lanes<A>;
#else
  int i = 0;
  while (i < lanes<A> && !x[i]) ++i;
  return i;
#endif
}

template <typename T>
I2V_INLINE Vec<accumulate_t<T>> load_upto(const T* p, int64_t count) {
  return count >= lanes<accumulate_t<T>> ? load(p) : load_part(p, count);
}

// The first of the largest of `count` numbers, and its place; `readable` may be read from where they begin.
template <typename T>
I2V_INLINE accumulate_t<T> largest_of(const T* p, int64_t count, int64_t readable, int64_t* place) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  typename VecOf<A>::index lane;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) lane[i] = i;
  const Vec<A> lowest = broadcast(-std::numeric_limits<A>::infinity());
  Vec<A> largest = lowest;
  int64_t i = 0;
  for (; i + W <= count; i += W) largest = max<A>(largest, load(p + i));
  const auto left = lane < static_cast<IndexOf<A>>(count - i);
  if (i < count) largest = max<A>(largest, left ? load_upto(p + i, readable - i) : lowest);
  const A value = largest_lane<A>(largest);
  if (!place) return value;
  *place = 0;
  for (i = 0; i < count; i += W) {
    auto same = load_upto(p + i, readable - i) == broadcast(value);
    if (i + W > count) same &= left;
    const int found = first_lane<A>(same);
    if (found < W) {
      *place = i + found;
      break;
    }
  }
  return value;
}

// Of W columns, N times: the first of the largest of `rows` numbers below each other, `step` apart.
template <int N, typename T>
I2V_INLINE void largest_below(const T* p, int64_t rows, int64_t step, int64_t readable, accumulate_t<T>* most,
                              IndexOf<accumulate_t<T>>* place) {
  using A = accumulate_t<T>;
  using Index = typename VecOf<A>::index;
  constexpr int W = lanes<A>;
  Vec<A> largest[N];
  Index where[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) largest[i] = broadcast(-std::numeric_limits<A>::infinity()), where[i] = Index{};
  for (int64_t t = 0; t < rows; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Vec<A> x = N > 1 ? load(p + t * step + i * W) : load_upto(p + t * step, readable);
      const Index more = x > largest[i];
      largest[i] = more ? x : largest[i];
      where[i] = more ? Index{} + static_cast<IndexOf<A>>(t) : where[i];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    store(most + i * W, largest[i]);
    std::memcpy(place + i * W, &where[i], sizeof(Index));
  }
}

// Texts [first, last) of the tile.
template <typename T>
void late_scores(const LateTile& p, int64_t first, int64_t last) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>, together = 4;
  const int64_t all = p.column_start[p.videos];
  Scratch<A> most_memory(all + W);
  Scratch<double> sums_memory(p.videos);
  Scratch<IndexOf<A>> place_memory(all + W);
  A* most = most_memory.data();
  double* sums = sums_memory.data();
  IndexOf<A>* place = place_memory.data();
  for (int64_t a = first; a < last; ++a) {
    const int64_t row0 = p.row_start[a], rows = p.row_start[a + 1] - row0;
    T* const tile = static_cast<T*>(p.tile) + row0 * all;
    if (p.zero) {
      for (int64_t t = 0; p.text_mask && t < rows; ++t)
        for (int64_t c = 0; !p.text_mask[row0 + t] && c < all; ++c) tile[t * all + c] = static_cast<A>(tile[t * all + c]) * 0;
      for (int64_t c = 0; p.video_mask && c < all; ++c)
        for (int64_t t = 0; !p.video_mask[c] && t < rows; ++t) tile[t * all + c] = static_cast<A>(tile[t * all + c]) * 0;
    }
    for (int64_t b = 0; b < p.videos; ++b) sums[b] = 0;
    if (p.text_best) {  // of tokens that are not valid there is none
      for (int64_t b = 0; b < p.videos; ++b)
        std::memset(p.text_best + a * p.text_step[0] + b * p.text_step[1], 0, p.rows * p.text_bytes);
    }
    // each token of the text: the largest of each video
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t token = p.row_token[row0 + t];
      const A weight = p.text_weight ? static_cast<const A*>(p.text_weight)[a * p.rows + token] : 1;
      for (int64_t b = 0; b < p.videos; ++b) {
        const int64_t c = p.column_start[b], columns = p.column_start[b + 1] - c;
        if (columns == 0) continue;
        int64_t found;
        sums[b] += static_cast<double>(weight) * largest_of(tile + t * all + c, columns, all - c, p.text_best ? &found : nullptr);
        if (p.text_best)
          put_place(p.text_best + a * p.text_step[0] + b * p.text_step[1], p.text_bytes, token, p.column_token[c + found]);
      }
    }
    A* scores = static_cast<A*>(p.scores) + a * p.scores_step;
    if (!p.both) {
      for (int64_t b = 0; b < p.videos; ++b) scores[b] = static_cast<A>(sums[b]);
      continue;
    }
    // each token of the videos: the largest of the text
    int64_t c = 0;
    for (; c + together * W <= all; c += together * W) largest_below<together>(tile + c, rows, all, 0, most + c, place + c);
    for (; c < all; c += W) largest_below<1>(tile + c, rows, all, all - c, most + c, place + c);
    for (int64_t b = 0; b < p.videos; ++b) {
      const A* weights = static_cast<const A*>(p.video_weight) + b * p.columns;
      double sum = 0;
      for (c = p.column_start[b]; rows && c < p.column_start[b + 1]; ++c)
        sum += static_cast<double>(weights[p.column_token[c]]) * most[c];
      scores[b] = static_cast<A>((sums[b] + sum) / 2);
      if (!p.video_best) continue;
      char* best = p.video_best + a * p.video_step[0] + b * p.video_step[1];
      std::memset(best, 0, p.columns * p.video_bytes);
      for (c = p.column_start[b]; rows && c < p.column_start[b + 1]; ++c)
        put_place(best, p.video_bytes, p.column_token[c], p.row_token[row0 + place[c]]);
    }
  }
}

template <typename T>
struct LatePart {
  const T* row;
  accumulate_t<T> factor;
};

// sums += the rows of the parts times their factors, N vectors of channels. Their own sum first: it is more exact.
template <int N, typename T>
I2V_INLINE void add_rows(accumulate_t<T>* sums, const LatePart<T>* parts, int64_t count, int64_t channel) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  Vec<A> x[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = Vec<A>{};
  for (int64_t j = 0; j < count; ++j) {
    const T* row = parts[j].row + channel;
    const Vec<A> factor = broadcast(parts[j].factor);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] += factor * load(row + i * W);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(sums + channel + i * W, load(sums + channel + i * W) + x[i]);
}

// `sums` is padded to vectors.
template <typename T>
I2V_INLINE void add_parts(accumulate_t<T>* sums, const LatePart<T>* parts, int64_t count, int64_t channels) {
  constexpr int W = lanes<accumulate_t<T>>;
  int64_t c = 0;
  for (; c + 8 * W <= channels; c += 8 * W) add_rows<8>(sums, parts, count, c);
  for (; c + W <= channels; c += W) add_rows<1>(sums, parts, count, c);
  if (c == channels) return;
  Vec<accumulate_t<T>> x{};
  for (int64_t j = 0; j < count; ++j) x += broadcast(parts[j].factor) * load_part(parts[j].row + c, channels - c);
  store(sums + c, load(sums + c) + x);
}

// Items [first, last): the gradient of their tokens, from those tokens of the others that were the largest to them and those to
// which they were, a few others at a time in their order.
template <typename T>
void late_gradient(const LateGradient& p, int64_t first, int64_t last) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  constexpr int64_t together = 32;
  const int64_t width = (p.channels + W - 1) / W * W, own = p.tokens * width;
  Scratch<A> own_memory(own), given_memory(own);
  Scratch<int64_t> ends_memory(2 * (p.tokens + 1));
  Scratch<LatePart<T>> own_parts(together * p.tokens), given_parts(together * (p.tokens + p.others_tokens));
  int64_t *own_ends = ends_memory.data(), *given_ends = own_ends + p.tokens + 1;
  const bool apart = p.dweight != nullptr;  // the token's own maxima without its weight, which gives that one's gradient
  for (int64_t i = first; i < last; ++i) {
    A *mine = own_memory.data(), *given = given_memory.data();
    std::memset(mine, 0, own * sizeof(A)), std::memset(given, 0, own * sizeof(A));
    const bool* here = p.mask ? p.mask + i * p.tokens : nullptr;
    const A* weight = p.weight ? static_cast<const A*>(p.weight) + i * p.tokens : nullptr;
    for (int64_t j0 = 0; j0 < p.others; j0 += together) {
      const int64_t j1 = std::min(j0 + together, p.others);
      // a list for each token, one behind the other: counted in the first turn, written in the second
      for (int turn = 0; turn < 2; ++turn) {
        if (turn == 0) {
          std::memset(own_ends, 0, 2 * (p.tokens + 1) * sizeof(int64_t));
        } else {
          for (int64_t x = 0; x < p.tokens; ++x) own_ends[x + 1] += own_ends[x], given_ends[x + 1] += given_ends[x];
        }
        int64_t* const of_own = apart ? own_ends : given_ends;
        LatePart<T>* const own_list = apart ? own_parts.data() : given_parts.data();
        for (int64_t j = j0; j < j1; ++j) {
          const A g = static_cast<const A*>(p.grad)[i * p.grad_step[0] + j * p.grad_step[1]] * (p.both ? A(0.5) : A(1));
          const T* other = static_cast<const T*>(p.other) + j * p.other_step[0];
          const bool* there = p.other_mask ? p.other_mask + j * p.others_tokens : nullptr;
          for (int64_t x = 0; p.best && x < p.tokens; ++x) {
            if (here && !here[x]) continue;
            const int64_t y = place_at(p.best + i * p.best_step[0] + j * p.best_step[1], p.best_bytes, x);
            if (y >= p.others_tokens || (there && !there[y])) continue;
            if (turn == 0) ++of_own[x + 1];
            else own_list[of_own[x]++] = {other + y * p.other_step[1], apart || !weight ? g : g * weight[x]};
          }
          for (int64_t y = 0; p.other_best && y < p.others_tokens; ++y) {
            if (there && !there[y]) continue;
            const int64_t x = place_at(p.other_best + i * p.other_best_step[0] + j * p.other_best_step[1], p.other_bytes, y);
            if (x >= p.tokens || (here && !here[x])) continue;
            const A factor = p.other_weight ? g * static_cast<const A*>(p.other_weight)[j * p.others_tokens + y] : g;
            if (turn == 0) ++given_ends[x + 1];
            else given_parts.data()[given_ends[x]++] = {other + y * p.other_step[1], factor};
          }
        }
      }
      for (int64_t x = 0, from = 0; x < p.tokens; from = given_ends[x++])  // written, each list ends where it should
        add_parts(given + x * width, given_parts.data() + from, given_ends[x] - from, p.channels);
      for (int64_t x = 0, from = 0; apart && x < p.tokens; from = own_ends[x++])
        add_parts(mine + x * width, own_parts.data() + from, own_ends[x] - from, p.channels);
    }
    for (int64_t x = 0; x < p.tokens; ++x) {
      A *of_mine = mine + x * width, *of_given = given + x * width;
      if (apart) {
        const T* row = static_cast<const T*>(p.own) + i * p.own_step[0] + x * p.own_step[1];
        A sum = 0;
        for (int64_t c = 0; c < p.channels; ++c) sum += of_mine[c] * static_cast<A>(row[c]);
        static_cast<A*>(p.dweight)[i * p.tokens + x] = sum;
        for (int64_t c = 0; c < p.channels; ++c) of_given[c] += of_mine[c] * weight[x];
      }
      if (!p.dx) continue;
      T* to = static_cast<T*>(p.dx) + i * p.dx_step[0] + x * p.dx_step[1];
      int64_t c = 0;
      for (; c + W <= p.channels; c += W) store(to + c, load(of_given + c));
      if (c < p.channels) store_part(to + c, load(of_given + c), p.channels - c);
    }
  }
}
