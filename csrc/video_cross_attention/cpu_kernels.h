// A clip's keys are cut in pieces. A worker takes a piece, block by block of rows: the scores of a row's pairs (head, query)
// stand side by side in the vector's lanes, so that softmax needs no sum across them. Each piece leaves its largest scores, its
// sums of exponentials and its weighted sums of values, which `merge` joins in the pieces' order.
// Included by for_each_isa.h inside the namespace of an instruction set.

constexpr int64_t block_rows = 16;

template <typename A>
struct Pairs {
  int64_t pairs, lanes_of_pairs, dim;  // of pairs and of channels as many as fill vectors

  explicit Pairs(const CrossAttention& p)
      : pairs(p.heads * p.queries), lanes_of_pairs(filled(pairs)), dim(filled(p.dim)) {}
  static int64_t filled(int64_t n) { return (n + lanes<A> - 1) / lanes<A> * lanes<A>; }
  int64_t sums() const { return pairs * dim + 2 * lanes_of_pairs; }  // of a piece: values, largest scores, exponentials
};

// Rows of q's shape, widened, times a factor, as [pairs, dim] with zeros behind the last channel.
template <typename T, typename A>
I2V_INLINE void copy_rows(const CrossAttention& p, const Pairs<A>& l, const View<3>& x, int64_t b, A factor, A* to) {
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.queries; ++i, to += l.dim)
      for (int64_t d = 0; d < p.dim; ++d) to[d] = A(row_of<const T>(x, b, i, h)[d]) * factor;
}

template <typename T>
I2V_INLINE T* token(const CrossAttention& p, const View<4>& x, int64_t b, int64_t key) {
  return reinterpret_cast<T*>(x.data) + b * x.stride[0] + key / p.tokens * x.stride[1] + key % p.tokens * x.stride[2];
}

template <typename T, int fixed_dim>
I2V_INLINE Vec<accumulate_t<T>> products(const accumulate_t<T>* a, const T* x, int64_t any_dim) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const int64_t dim = fixed_dim ? fixed_dim : any_dim;
  Vec<A> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) {
    s0 += load(a + d) * load(x + d), s1 += load(a + d + W) * load(x + d + W);
    s2 += load(a + d + 2 * W) * load(x + d + 2 * W), s3 += load(a + d + 3 * W) * load(x + d + 3 * W);
  }
  for (; d + W <= dim; d += W) s0 += load(a + d) * load(x + d);
  if (d < dim) s1 += load(a + d) * load_part(x + d, dim - d);
  return (s0 + s1) + (s2 + s3);
}

// to[pair] = <a[pair], the row's head of that pair>
template <typename T, int fixed_dim>
I2V_INLINE void dot_row(const CrossAttention& p, const Pairs<accumulate_t<T>>& l, const accumulate_t<T>* a, const T* row,
                        int64_t head_stride, accumulate_t<T>* to) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  int64_t h = 0, i = 0;
  for (int64_t first = 0; first < l.pairs; first += W, to += W) {
    Vec<A> x[W];
    const int64_t count = std::min<int64_t>(W, l.pairs - first);
    for (int64_t j = 0; j < count; ++j, a += l.dim) {
      x[j] = products<T, fixed_dim>(a, row + h * head_stride, p.dim);
      if (++i == p.queries) i = 0, ++h;
    }
    for (int64_t j = count; j < W; ++j) x[j] = Vec<A>{};
    store(to, sum_each<A>(x));
  }
}

template <typename A>
I2V_INLINE void scale_row(A* row, int64_t dim, A factor) {
  for (int64_t d = 0; d < dim; d += lanes<A>) store(row + d, load(row + d) * factor);
}

// Of a block's scores [count, pairs] to exponentials; what was summed before is brought to the new largest scores.
template <typename A>
I2V_INLINE void exponentials(const Pairs<A>& l, int64_t count, A* scores, A* values, A* most, A* total, A* shrink) {
  constexpr int W = lanes<A>;
  const Vec<A> least = broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t first = 0; first < l.lanes_of_pairs; first += W) {
    const Vec<A> before = load(most + first);
    Vec<A> largest = before;
    for (int64_t j = 0; j < count; ++j) largest = max<A>(load(scores + j * l.lanes_of_pairs + first), largest);
    const Vec<A> safe = largest == least ? Vec<A>{} : largest;
    const Vec<A> less = exp_nonpositive(before - safe);
    Vec<A> sum = load(total + first) * less;
    for (int64_t j = 0; j < count; ++j) {
      A* s = scores + j * l.lanes_of_pairs + first;
      const Vec<A> e = exp_nonpositive(load(s) - safe);
      store(s, e);
      sum += e;
    }
    store(most + first, largest), store(total + first, sum), store(shrink + first, less);
  }
  for (int64_t pair = 0; pair < l.pairs; ++pair)
    if (!(shrink[pair] == 1)) scale_row(values + pair * l.dim, l.dim, shrink[pair]);
}

// values[pair] += sum over the block's rows of weight[row, pair] * the row's head of that pair
template <typename T, int fixed_dim>
I2V_INLINE void add_rows(const CrossAttention& p, const Pairs<accumulate_t<T>>& l, int64_t count, const accumulate_t<T>* weight,
                         const T* const* rows, int64_t head_stride, accumulate_t<T>* values) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const int64_t dim = fixed_dim ? fixed_dim : p.dim;
  int64_t h = 0, i = 0;
  for (int64_t pair = 0; pair < l.pairs; ++pair, values += l.dim) {
    const A* w = weight + pair;
    const int64_t offset = h * head_stride;
    int64_t d = 0;
    for (; d + 4 * W <= dim; d += 4 * W) {
      A* to = values + d;
      Vec<A> s0 = load(to), s1 = load(to + W), s2 = load(to + 2 * W), s3 = load(to + 3 * W);
      for (int64_t j = 0; j < count; ++j) {
        const T* x = rows[j] + offset + d;
        const Vec<A> by = broadcast(w[j * l.lanes_of_pairs]);
        s0 += by * load(x), s1 += by * load(x + W), s2 += by * load(x + 2 * W), s3 += by * load(x + 3 * W);
      }
      store(to, s0), store(to + W, s1), store(to + 2 * W, s2), store(to + 3 * W, s3);
    }
    for (; d < dim; d += W) {
      Vec<A> sum = load(values + d);
      for (int64_t j = 0; j < count; ++j) {
        const T* x = rows[j] + offset + d;
        sum += broadcast(w[j * l.lanes_of_pairs]) * (d + W <= dim ? load(x) : load_part(x, dim - d));
      }
      store(values + d, sum);
    }
    if (++i == p.queries) i = 0, ++h;
  }
}

// A row of gradients: each head's is the sum over its queries of weight[pair] * a[pair].
template <typename T, int fixed_dim>
I2V_INLINE void write_row(const CrossAttention& p, const Pairs<accumulate_t<T>>& l, const accumulate_t<T>* weight,
                          const accumulate_t<T>* a, T* row, int64_t head_stride) {
  using A = accumulate_t<T>;
  constexpr int W = lanes<A>;
  const int64_t dim = fixed_dim ? fixed_dim : p.dim;
  for (int64_t h = 0; h < p.heads; ++h, weight += p.queries, a += p.queries * l.dim, row += head_stride) {
    for (int64_t d = 0; d < dim; d += W) {
      Vec<A> sum = {};
      for (int64_t i = 0; i < p.queries; ++i) sum += broadcast(weight[i]) * load(a + i * l.dim + d);
      if (d + W <= dim) store_or_stream(row + d, sum, p.past_cache);
      else store_part(row + d, sum, dim - d);
    }
  }
}

template <typename T>
struct Rows {
  int64_t count;
  const T *k[block_rows], *v[block_rows];
  bool valid[block_rows];

  I2V_INLINE Rows(const CrossAttention& p, int64_t b, int64_t first, int64_t end) : count(std::min(block_rows, end - first)) {
    for (int64_t j = 0; j < count; ++j) {
      k[j] = token<const T>(p, p.k, b, first + j), v[j] = token<const T>(p, p.v, b, first + j);
      valid[j] = !p.mask || p.mask[b * p.frames + (first + j) / p.tokens];
    }
  }
};

// Lines of values that the block needs after its scores.
template <typename T>
I2V_INLINE void fetch_row(const CrossAttention& p, const T* row, int64_t head_stride) {
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t d = 0; d < p.dim; d += 64 / sizeof(T)) __builtin_prefetch(row + h * head_stride + d);
}

template <typename T, int fixed_dim>
I2V_INLINE void scores_of(const CrossAttention& p, const Pairs<accumulate_t<T>>& l, const Rows<T>& block,
                          const accumulate_t<T>* q, accumulate_t<T>* scores) {
  using A = accumulate_t<T>;
  const Vec<A> least = broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t j = 0; j < block.count; ++j) {
    A* to = scores + j * l.lanes_of_pairs;
    fetch_row<T>(p, block.v[j], p.v.stride[3]);
    dot_row<T, fixed_dim>(p, l, q, block.k[j], p.k.stride[3], to);
    if (!block.valid[j])
      for (int64_t i = 0; i < l.lanes_of_pairs; i += lanes<A>) store(to + i, least);
  }
}

// Pieces [begin, end) of all clips' pieces.
template <typename T, int fixed_dim>
I2V_INLINE void forward_of(const CrossAttention& p, int64_t begin, int64_t end, void* sums) {
  using A = accumulate_t<T>;
  const Pairs<A> l(p);
  const int64_t keys = p.frames * p.tokens;
  Scratch<A> memory(l.pairs * l.dim + (block_rows + 1) * l.lanes_of_pairs);
  A *q = memory.data(), *scores = q + l.pairs * l.dim, *shrink = scores + block_rows * l.lanes_of_pairs;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.pieces, piece = item % p.pieces, last = keys * (piece + 1) / p.pieces;
    if (item == begin || piece == 0) copy_rows<T>(p, l, p.q, b, A(p.scale), q);
    A *values = static_cast<A*>(sums) + item * l.sums(), *most = values + l.pairs * l.dim, *total = most + l.lanes_of_pairs;
    std::fill(most, total, -std::numeric_limits<A>::infinity());
    for (int64_t first = keys * piece / p.pieces; first < last; first += block_rows) {
      const Rows<T> block(p, b, first, last);
      scores_of<T, fixed_dim>(p, l, block, q, scores);
      exponentials(l, block.count, scores, values, most, total, shrink);
      add_rows<T, fixed_dim>(p, l, block.count, scores, block.v, p.v.stride[3], values);
    }
  }
}

I2V_INLINE bool any_valid(const CrossAttention& p, int64_t b) {
  bool any = !p.mask;
  for (int64_t t = 0; t < p.frames; ++t) any = any || p.mask[b * p.frames + t];
  return any && p.tokens > 0;
}

// The pieces of the pairs [begin, end) of all clips' pairs, joined.
template <typename T>
void merge(const CrossAttention& p, int64_t begin, int64_t end, const void* sums) {
  using A = accumulate_t<T>;
  constexpr A infinite = std::numeric_limits<A>::infinity();
  const Pairs<A> l(p);
  Scratch<A> share(p.pieces);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / l.pairs, pair = item % l.pairs, h = pair / p.queries, i = pair % p.queries;
    const A* values = static_cast<const A*>(sums) + b * p.pieces * l.sums();
    const A *most = values + l.pairs * l.dim + pair, *total = most + l.lanes_of_pairs;
    A largest = -infinite, sum = 0;
    for (int64_t s = 0; s < p.pieces; ++s) largest = std::max(largest, most[s * l.sums()]);
    const A safe = largest == -infinite ? 0 : largest;
    for (int64_t s = 0; s < p.pieces; ++s) {
      share.data()[s] = std::exp(most[s * l.sums()] - safe);
      sum += share.data()[s] * total[s * l.sums()];
    }
    if (!any_valid(p, b)) sum = 1;
    const int64_t at = (b * p.queries + i) * p.heads + h;
    static_cast<A*>(p.sums)[2 * at] = largest, static_cast<A*>(p.sums)[2 * at + 1] = sum;
    const A whole = 1 / sum;
    T* out = row_of<T>(p.out, b, i, h);
    for (int64_t d = 0; d < p.dim; d += lanes<A>) {
      Vec<A> mixed = {};
      for (int64_t s = 0; s < p.pieces; ++s) mixed += broadcast(share.data()[s]) * load(values + s * l.sums() + pair * l.dim + d);
      mixed *= whole;
      if (d + lanes<A> <= p.dim) store(out + d, mixed);
      else store_part(out + d, mixed, p.dim - d);
    }
  }
}

// Probabilities in place of scores, and gradients of scores in place of those of probabilities.
template <typename T>
I2V_INLINE void score_gradients(const Pairs<accumulate_t<T>>& l, const Rows<T>& block, const accumulate_t<T>* most,
                                const accumulate_t<T>* whole, const accumulate_t<T>* delta, accumulate_t<T>* probs, accumulate_t<T>* ds) {
  using A = accumulate_t<T>;
  for (int64_t j = 0; j < block.count; ++j) {
    for (int64_t i = 0; i < l.lanes_of_pairs; i += lanes<A>) {
      A *prob = probs + j * l.lanes_of_pairs + i, *grad = ds + j * l.lanes_of_pairs + i;
      const Vec<A> e = exp_nonpositive(load(prob) - load(most + i)) * load(whole + i);
      store(prob, e);
      store(grad, block.valid[j] ? e * (load(grad) - load(delta + i)) : Vec<A>{});
    }
  }
}

template <typename T, int fixed_dim>
I2V_INLINE void backward_of(const CrossAttention& p, int64_t begin, int64_t end, void* sums) {
  using A = accumulate_t<T>;
  const Pairs<A> l(p);
  const int64_t keys = p.frames * p.tokens, rows = l.pairs * l.dim, square = block_rows * l.lanes_of_pairs;
  const bool of_scores = p.dq.data || p.dk.data;
  Scratch<A> memory(2 * rows + 2 * square + 4 * l.lanes_of_pairs);
  A *q = memory.data(), *grad = q + rows, *probs = grad + rows, *ds = probs + square;
  A *most = ds + square, *whole = most + l.lanes_of_pairs, *delta = whole + l.lanes_of_pairs, *one = delta + l.lanes_of_pairs;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.pieces, piece = item % p.pieces, last = keys * (piece + 1) / p.pieces;
    if (item == begin || piece == 0) {
      const bool any = any_valid(p, b);
      copy_rows<T>(p, l, p.q, b, A(p.scale), q);
      copy_rows<T>(p, l, p.grad, b, A(1), grad);
      for (int64_t pair = 0; pair < l.pairs; ++pair) {
        const int64_t h = pair / p.queries, i = pair % p.queries, at = (b * p.queries + i) * p.heads + h;
        // where no key is valid none has a probability
        most[pair] = any ? static_cast<const A*>(p.sums)[2 * at] : std::numeric_limits<A>::infinity();
        whole[pair] = 1 / static_cast<const A*>(p.sums)[2 * at + 1];
        // as the products with values are taken: of one key the difference is zero
        Vec<A> lane[lanes<A>] = {products<T, fixed_dim>(grad + pair * l.dim, row_of<const T>(p.out, b, i, h), p.dim)};
        store(one, sum_each<A>(lane));
        delta[pair] = one[0];
      }
    }
    for (int64_t first = keys * piece / p.pieces; first < last; first += block_rows) {
      const Rows<T> block(p, b, first, last);
      scores_of<T, fixed_dim>(p, l, block, q, probs);
      for (int64_t j = 0; of_scores && j < block.count; ++j)
        dot_row<T, fixed_dim>(p, l, grad, block.v[j], p.v.stride[3], ds + j * l.lanes_of_pairs);
      score_gradients<T>(l, block, most, whole, delta, probs, ds);
      if (p.dq.data)
        add_rows<T, fixed_dim>(p, l, block.count, ds, block.k, p.k.stride[3], static_cast<A*>(sums) + item * rows);
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t at = j * l.lanes_of_pairs;
        if (p.dk.data) write_row<T, fixed_dim>(p, l, ds + at, q, token<T>(p, p.dk, b, first + j), p.dk.stride[3]);
        if (p.dv.data) write_row<T, fixed_dim>(p, l, probs + at, grad, token<T>(p, p.dv, b, first + j), p.dv.stride[3]);
      }
    }
  }
}

// dq of the pairs [begin, end): the pieces' sums in order.
template <typename T>
void add_up(const CrossAttention& p, int64_t begin, int64_t end, const void* sums) {
  using A = accumulate_t<T>;
  const Pairs<A> l(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / l.pairs, pair = item % l.pairs;
    const A* part = static_cast<const A*>(sums) + (b * p.pieces * l.pairs + pair) * l.dim;
    T* to = row_of<T>(p.dq, b, pair % p.queries, pair / p.queries);
    for (int64_t d = 0; d < p.dim; d += lanes<A>) {
      Vec<A> sum = {};
      for (int64_t s = 0; s < p.pieces; ++s) sum += load(part + s * l.pairs * l.dim + d);
      sum *= A(p.scale);
      if (d + lanes<A> <= p.dim) store(to + d, sum);
      else store_part(to + d, sum, p.dim - d);
    }
  }
}

template <typename T>
void forward(const CrossAttention& p, int64_t begin, int64_t end, void* sums) {
  p.dim == 64 ? forward_of<T, 64>(p, begin, end, sums) : forward_of<T, 0>(p, begin, end, sums);
}

template <typename T>
void backward(const CrossAttention& p, int64_t begin, int64_t end, void* sums) {
  p.dim == 64 ? backward_of<T, 64>(p, begin, end, sums) : backward_of<T, 0>(p, begin, end, sums);
}

// What a worker's sums take, in elements.
template <typename A>
int64_t sums_size(const CrossAttention& p, bool of_gradients) {
  const Pairs<A> l(p);
  return of_gradients ? l.pairs * l.dim : l.sums();
}
