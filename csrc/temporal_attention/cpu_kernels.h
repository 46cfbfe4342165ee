// One (clip, token, head) is a sequence of T frames of D numbers. A worker copies G sequences into its first-level cache,
// computes their scores, queries by keys, and turns them with the frames of the queries in the vector's lanes: then softmax needs no
// sum across lanes, and short sequences fill a vector together (G * T lanes).
// Included by for_each_isa.h inside the namespace of an instruction set.

#include "cpu_group.h"

template <typename T>
I2V_INLINE T* at(const View<4>& x, int64_t b, int64_t n, int64_t h) {
  return reinterpret_cast<T*>(x.data) + b * x.stride[0] + n * x.stride[2] + h * x.stride[3];
}

// From head h of a token to the group of heads that comes next, in the same token or at the start of the following one.
template <typename A>
I2V_INLINE int64_t next_group(const Problem& p, const Layout<A>& l, const View<4>& x, int64_t h) {
  return h + l.group < p.heads ? l.group * x.stride[3] : x.stride[2] - h * x.stride[3];
}

// Lines that are soon to be written: their old contents come while other work goes on.
template <typename T>
I2V_INLINE void expect_writes(const Problem& p, const View<4>& x, int64_t frames, int64_t b, int64_t n, int64_t h) {
  if (p.past_cache) return;
  for (int64_t t = 0; t < frames; ++t)
    for (int64_t d = 0; d < p.dim; d += 64 / sizeof(T)) __builtin_prefetch(at<T>(x, b, n, h) + t * x.stride[1] + d, 1, 3);
}

template <typename A>
I2V_INLINE const A* bias_of(const Problem& p, const Layout<A>& l, int64_t h) {
  return p.bias_lanes ? static_cast<const A*>(p.bias_lanes) + h / l.group * l.square() : nullptr;
}

template <typename A>
I2V_INLINE void fill_lane_frames(const Layout<A>& l, A* lane_frame) {
  for (int64_t lane = 0; lane < l.lane_count; ++lane) {
    const int64_t t = lane % l.padded_queries;
    const bool query = t < l.queries && lane < l.group * l.padded_queries;
    lane_frame[lane] = query ? A(t + l.keys - l.queries) : std::numeric_limits<A>::quiet_NaN();  // which sees no key
  }
}

// Probabilities of the heads [h, h + count) of one token, from memory.
template <typename T, typename A>
I2V_INLINE void probabilities(const Problem& p, const Layout<A>& l, int64_t b, int64_t n, int64_t h, int64_t count,
                              const A* lane_frame, A* q, A* k, A* turned, A* scores, A* lse) {
  const int64_t offset = offset_of(p, h);
  for (int64_t g = 0; g < count; ++g) {
    A *to_q = q + g * l.query_sequence(), *to_k = k + g * l.key_sequence();
    copy_in(l, at<T>(p.q, b, n, h + g), l.queries, 0, p.q.stride[1], next_group(p, l, p.q, h), to_q);
    copy_in(l, at<T>(p.k, b, n, h + g), l.keys, offset, p.k.stride[1], next_group(p, l, p.k, h), to_k);
    dot_products(l, to_q, to_k, turned, scores + g * l.padded_queries);
  }
  softmax(p, l, lane_frame, bias_of(p, l, h), p.mask ? p.mask + b * p.keys : nullptr, offset, scores, lse);
}

// The lanes' log-sum-exps to [B, Tq, N, H].
template <typename A>
I2V_INLINE void write_lse(const Problem& p, const Layout<A>& l, int64_t b, int64_t n, int64_t h, int64_t count, const A* lse) {
  for (int64_t g = 0; g < count; ++g)
    for (int64_t t = 0; t < l.queries; ++t)
      static_cast<A*>(p.lse)[((b * p.queries + t) * p.tokens + n) * p.heads + h + g] = lse[g * l.padded_queries + t];
}

// bias [H, Tq, Tk] into the order in which softmax reads it: [group][key frame][lane].
template <typename T>
void arrange_bias(const Problem& p, const void* bias, void* lanes_out) {
  using A = accumulate_t<T>;
  const Layout<A> l(p);
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.queries; ++i)
      for (int64_t j = 0; j < p.keys; ++j)
        static_cast<A*>(lanes_out)[h / l.group * l.square() + j * l.lane_count + h % l.group * l.padded_queries + i] =
            static_cast<const A*>(bias)[(h * p.queries + i) * p.keys + j];
}

template <typename T>
int64_t bias_lanes_size(const Problem& p) {
  const Layout<accumulate_t<T>> l(p);
  return (p.heads + l.group - 1) / l.group * l.square();
}

template <typename T>
I2V_INLINE void forward_of(const Problem& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Layout<A> l(p);
  Scratch<A> memory(l.group * (l.query_sequence() + 2 * l.key_sequence()) + l.square() + 2 * l.lane_count + l.turned());
  A *q = memory.data(), *k = q + l.group * l.query_sequence(), *v = k + l.group * l.key_sequence();
  A *scores = v + l.group * l.key_sequence(), *lane_frame = scores + l.square(), *lse = lane_frame + l.lane_count;
  A* turned = lse + l.lane_count;
  fill_lane_frames(l, lane_frame);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.tokens, n = token % p.tokens;
    for (int64_t h = 0; h < p.heads; h += l.group) {
      const int64_t count = std::min(l.group, p.heads - h);
      for (int64_t g = 0; g < count; ++g) expect_writes<T>(p, p.out, l.queries, b, n, h + g);
      probabilities<T>(p, l, b, n, h, count, lane_frame, q, k, turned, scores, p.lse ? lse : nullptr);
      if (p.lse) write_lse(p, l, b, n, h, count, lse);
      for (int64_t g = 0; g < count; ++g) {
        A* to = v + g * l.key_sequence();
        copy_in(l, at<T>(p.v, b, n, h + g), l.keys, offset_of(p, h), p.v.stride[1], next_group(p, l, p.v, h), to);
        mix(l, over_keys(l, scores + g * l.padded_queries), to, A(1), at<T>(p.out, b, n, h + g), p.out.stride[1],
            p.past_cache);
      }
    }
  }
}

template <typename T>
I2V_INLINE void backward_of(const Problem& p, int64_t begin, int64_t end, void* bias_grad) {
  using A = accumulate_t<T>;
  const Layout<A> l(p);
  const int64_t queries = l.group * l.query_sequence(), keys = l.group * l.key_sequence();
  Scratch<A> memory(2 * queries + 2 * keys + l.key_sequence() + 2 * l.square() + l.lane_count + l.turned());
  A *q = memory.data(), *grad = q + queries, *k = grad + queries, *v = k + keys, *seen = v + keys;
  A *probs = seen + l.key_sequence(), *dscores = probs + l.square(), *lane_frame = dscores + l.square();
  A* turned = lane_frame + l.lane_count;
  fill_lane_frames(l, lane_frame);
  // A gradient of keys or values, which a head with an offset saw elsewhere than they are.
  const auto mix_to_keys = [&](const A* weight, const A* in, A scale, const View<4>& to, int64_t b, int64_t n, int64_t h) {
    T* out = at<T>(to, b, n, h);
    if (offset_of(p, h) == 0) return mix(l, over_queries(l, weight), in, scale, out, to.stride[1], p.past_cache);
    mix(l, over_queries(l, weight), in, scale, seen, l.padded_dim, false);
    to_frames(seen, l.padded_dim, l.keys, l.dim, offset_of(p, h), out, to.stride[1]);
  };
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.tokens, n = token % p.tokens;
    for (int64_t h = 0; h < p.heads; h += l.group) {
      const int64_t count = std::min(l.group, p.heads - h), offset = offset_of(p, h);
      probabilities<T>(p, l, b, n, h, count, lane_frame, q, k, turned, probs, static_cast<A*>(nullptr));
      for (int64_t g = 0; g < count; ++g) {
        A *to_v = v + g * l.key_sequence(), *to_grad = grad + g * l.query_sequence();
        copy_in(l, at<T>(p.v, b, n, h + g), l.keys, offset, p.v.stride[1], next_group(p, l, p.v, h), to_v);
        copy_in(l, at<T>(p.grad, b, n, h + g), l.queries, 0, p.grad.stride[1], next_group(p, l, p.grad, h), to_grad);
        expect_writes<T>(p, p.dv, l.keys, b, n, h + g);
        dot_products(l, to_grad, to_v, turned, dscores + g * l.padded_queries);
      }
      score_gradients(p, l, lane_frame, p.mask ? p.mask + b * p.keys : nullptr, offset, probs, dscores);
      for (int64_t g = 0; g < count; ++g) {
        const A *pr = probs + g * l.padded_queries, *ds = dscores + g * l.padded_queries;
        expect_writes<T>(p, p.dk, l.keys, b, n, h + g);
        mix_to_keys(pr, grad + g * l.query_sequence(), A(1), p.dv, b, n, h + g);
        expect_writes<T>(p, p.dq, l.queries, b, n, h + g);
        mix_to_keys(ds, q + g * l.query_sequence(), A(p.scale), p.dk, b, n, h + g);
        mix(l, over_keys(l, ds), k + g * l.key_sequence(), A(p.scale), at<T>(p.dq, b, n, h + g), p.dq.stride[1], p.past_cache);
        if (bias_grad) add_bias_gradient(l, ds, static_cast<A*>(bias_grad) + (h + g) * p.queries * p.keys);
      }
    }
  }
}

#if I2V_ISA == I2V_ISA_AVX512_BF16
#include "cpu_bf16.h"
#endif

// The shapes of most models as constants: of what is inlined above, the loops of a few turns then disappear.
template <typename T, typename Run>
I2V_INLINE void for_shape(const Problem& p, const Run& run) {
  const auto fixed = [&](auto frames) __attribute__((always_inline)) {
    Problem known = p;
    known.queries = known.keys = frames, known.dim = 64;
    run(known);
  };
  if constexpr (sizeof(T) <= 4) {
    if (p.queries == p.keys && p.dim == 64) {
      if (p.keys == 4) return fixed(std::integral_constant<int64_t, 4>());
      if (p.keys == 8) return fixed(std::integral_constant<int64_t, 8>());
      if (p.keys == 16) return fixed(std::integral_constant<int64_t, 16>());
    }
  }
  run(p);
}

template <typename T>
void forward(const Problem& p, int64_t begin, int64_t end) {
  for_shape<T>(p, [=](const Problem& known) __attribute__((always_inline)) { forward_of<T>(known, begin, end); });
}

template <typename T>
void backward(const Problem& p, int64_t begin, int64_t end, void* bias_grad) {
  for_shape<T>(p, [=](const Problem& known) __attribute__((always_inline)) { backward_of<T>(known, begin, end, bias_grad); });
}
