// bf16 where the processor multiplies pairs of it (vdpbf16ps): the same walk as in cpu_kernels.h, with half the instructions
// and no conversion on the way in. Probabilities and their gradients are rounded to bf16 before the products with v, k, q, as
// PyTorch's own bf16 formulation does; sums stay in float32. Included by cpu_kernels.h.

using Lanes = Layout<float>;

I2V_INLINE int64_t raw_row(const Lanes& l) { return (l.dim + 31) / 32 * 32; }
I2V_INLINE int64_t packed_size(const Lanes& l) { return std::max(l.padded_queries, l.padded_keys) / 2 * raw_row(l); }

// 32 elements of a row from d on, zeros beyond its end.
I2V_INLINE __m512i load_raw(const Lanes& l, const bf16* row, int64_t d) {
  const int64_t left = l.dim - d;
  return _mm512_maskz_loadu_epi16(left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1, row + d);
}

// [T, D] from memory to [padded T][raw_row].
I2V_INLINE void copy_raw(const Lanes& l, const bf16* frames, int64_t count, int64_t offset, int64_t stride, int64_t ahead,
                         bf16* target) {
  for (int64_t t = 0; t < count; ++t) {
    const bf16* row = frames + source(t, offset, count) * stride;
    for (int64_t d = 0; d < l.dim; d += 32) {
      __builtin_prefetch(row + ahead + d, 0, 2);
      _mm512_storeu_si512(target + t * raw_row(l) + d, load_raw(l, row, d));
    }
  }
}

// (a0, b0, a1, b1, ...): the first or the second half of it.
I2V_INLINE __m512i zip(__m512i a, __m512i b, bool second) {
  alignas(64) static constexpr uint16_t order[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(order[second]), b);
}

// Rows c and c + 1 of [T, D] zipped into one row of pairs: [padded T / 2][raw_row]. `ahead` as in copy_in.
I2V_INLINE void pack_rows(const Lanes& l, const bf16* frames, int64_t count, int64_t offset, int64_t stride, int64_t ahead,
                          uint32_t* packed) {
  for (int64_t c = 0; c < count; c += 2) {
    const bf16* first = frames + source(c, offset, count) * stride;
    const bf16* second = frames + source(c + 1, offset, count) * stride;
    for (int64_t d = 0; d < l.dim; d += 32) {
      if (ahead) __builtin_prefetch(first + ahead + d, 0, 2), __builtin_prefetch(second + ahead + d, 0, 2);
      const __m512i a = load_raw(l, first, d), b = c + 1 < count ? load_raw(l, second, d) : _mm512_setzero_si512();
      _mm512_storeu_si512(packed + c / 2 * raw_row(l) + d, zip(a, b, false));
      _mm512_storeu_si512(packed + c / 2 * raw_row(l) + d + 16, zip(a, b, true));
    }
  }
}

// out[j][i] = <a_i, b_j>, i in lanes.
I2V_INLINE void dot_raw(const Lanes& l, const bf16* a, const bf16* b, float* turned, float* out) {
  if (l.turns()) {  // pairs of numbers are turned as they are, each as one word
    turn(l, reinterpret_cast<const float*>(a), raw_row(l) / 2, raw_row(l) / 2, turned);
    for_blocks(l, [=](auto keys, auto vectors, int64_t j, int64_t lane) __attribute__((always_inline)) {
      __m512 sum[keys][vectors] = {};
      for (int64_t d = 0; 2 * d < l.dim; ++d) {
        __m512bh query[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) query[v] = (__m512bh)_mm512_loadu_ps(turned + d * l.lane_count + lane + v * 16);
#pragma GCC unroll 16
        for (int c = 0; c < keys; ++c) {
          int32_t pair;
          std::memcpy(&pair, b + (j + c) * raw_row(l) + 2 * d, sizeof pair);
          const __m512bh key = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) sum[c][v] = _mm512_dpbf16_ps(sum[c][v], query[v], key);
        }
      }
#pragma GCC unroll 16
      for (int c = 0; c < keys; ++c)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(out + (j + c) * l.lane_count + lane + v * 16, sum[c][v]);
    });
    return;
  }
  for (int64_t i = 0; i < l.queries; i += 4) {
    for (int64_t j = 0; j < l.keys; j += 4) {
      __m512 sum[16] = {};
      for (int64_t d = 0; d < l.dim; d += 32) {
        __m512bh rows[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) rows[r] = (__m512bh)_mm512_loadu_si512(a + (i + r) * raw_row(l) + d);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          const __m512bh column = (__m512bh)_mm512_loadu_si512(b + (j + c) * raw_row(l) + d);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) sum[c * 4 + r] = _mm512_dpbf16_ps(sum[c * 4 + r], rows[r], column);
        }
      }
      Vec<float> sums[16];
#pragma GCC unroll 16
      for (int x = 0; x < 16; ++x) sums[x] = (Vec<float>)sum[x];
      const __m512 block = (__m512)sum_each<float>(sums);
      float* to = out + j * l.lane_count + i;
      _mm_storeu_ps(to, _mm512_castps512_ps128(block));
      _mm_storeu_ps(to + l.lane_count, _mm512_extractf32x4_ps(block, 1));
      _mm_storeu_ps(to + 2 * l.lane_count, _mm512_extractf32x4_ps(block, 2));
      _mm_storeu_ps(to + 3 * l.lane_count, _mm512_extractf32x4_ps(block, 3));
    }
  }
}

// scale * weights for sums over keys: [key pair][lane], and for sums over queries: [key][lane], pairs side by side.
I2V_INLINE void round_weights(const Lanes& l, const float* weights, float scale, uint32_t* over_keys, bf16* over_queries) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t j = 0; j < l.keys; j += 2) {
    for (int64_t lane = 0; lane < l.lane_count; lane += 16) {
      const float* from = weights + j * l.lane_count + lane;
      const __m512 first = _mm512_mul_ps(_mm512_loadu_ps(from), factor);
      const __m512 second = j + 1 < l.keys ? _mm512_mul_ps(_mm512_loadu_ps(from + l.lane_count), factor) : _mm512_setzero_ps();
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      const __m256i low = _mm512_castsi512_si256(both), high = _mm512_extracti64x4_epi64(both, 1);
      _mm512_storeu_si512(over_keys + j / 2 * l.lane_count + lane, zip(both, _mm512_castsi256_si512(high), false));
      if (over_queries) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(over_queries + j * l.lane_count + lane), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(over_queries + (j + 1) * l.lane_count + lane), high);
      }
    }
  }
}

// out[r] = sum_c weight[r, c] * in[c], the weights as pairs of c; 32 * NV dimensions from d on.
template <int NV>
I2V_INLINE void mix_pairs(const Lanes& l, const Weights<uint32_t>& w, const uint32_t* in, bf16* out, int64_t out_stride,
                          int64_t d, bool past_cache) {
  for (int64_t r0 = 0; r0 < w.rows; r0 += 4) {
    __m512 sum[4][2 * NV] = {};
    for (int64_t c = 0; 2 * c < w.columns; ++c) {
      __m512bh x[2 * NV];
#pragma GCC unroll 4
      for (int v = 0; v < 2 * NV; ++v) x[v] = (__m512bh)_mm512_loadu_si512(in + c * raw_row(l) + d + v * 16);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(w.weight[(r0 + r) * w.row_step + c * w.column_step]);
#pragma GCC unroll 4
        for (int v = 0; v < 2 * NV; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, x[v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if (r0 + r >= w.rows) break;
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        bf16* to = out + (r0 + r) * out_stride + d + v * 32;
        const int64_t left = l.dim - d - v * 32;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(sum[r][2 * v + 1], sum[r][2 * v]);
        if (left < 32) _mm512_mask_storeu_epi16(to, (__mmask32(1) << left) - 1, both);
        else if (past_cache && reinterpret_cast<uintptr_t>(to) % 64 == 0) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
        else _mm512_storeu_si512(to, both);
      }
    }
  }
}

I2V_INLINE void mix_all(const Lanes& l, const Weights<uint32_t>& w, const uint32_t* in, bf16* out, int64_t out_stride,
                        bool past_cache) {
  int64_t d = 0;
  for (; d + 64 <= raw_row(l); d += 64) mix_pairs<2>(l, w, in, out, out_stride, d, past_cache);
  if (d < l.dim) mix_pairs<1>(l, w, in, out, out_stride, d, past_cache);
}

template <>
I2V_INLINE void forward_of<bf16>(const Problem& p, int64_t begin, int64_t end) {
  const Lanes l(p);
  Scratch<bf16> rows((l.padded_queries + l.padded_keys) * raw_row(l));
  Scratch<uint32_t> pairs(packed_size(l) + l.square() / 2);
  Scratch<float> lanes_memory(l.square() + 2 * l.lane_count + raw_row(l) / 2 * l.lane_count);
  bf16 *q = rows.data(), *k = q + l.padded_queries * raw_row(l);
  uint32_t *packed = pairs.data(), *weights = packed + packed_size(l);
  float *scores = lanes_memory.data(), *lane_frame = scores + l.square(), *lse = lane_frame + l.lane_count;
  float* turned = lse + l.lane_count;
  fill_lane_frames(l, lane_frame);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.tokens, n = token % p.tokens;
    for (int64_t h = 0; h < p.heads; h += l.group) {
      const int64_t count = std::min(l.group, p.heads - h), offset = offset_of(p, h);
      for (int64_t g = 0; g < count; ++g) {
        copy_raw(l, at<bf16>(p.q, b, n, h + g), l.queries, 0, p.q.stride[1], next_group(p, l, p.q, h), q);
        copy_raw(l, at<bf16>(p.k, b, n, h + g), l.keys, offset, p.k.stride[1], next_group(p, l, p.k, h), k);
        expect_writes<bf16>(p, p.out, l.queries, b, n, h + g);
        dot_raw(l, q, k, turned, scores + g * l.padded_queries);
      }
      const bool* valid = p.mask ? p.mask + b * p.keys : nullptr;
      softmax(p, l, lane_frame, bias_of(p, l, h), valid, offset, scores, p.lse ? lse : nullptr);
      if (p.lse) write_lse(p, l, b, n, h, count, lse);
      round_weights(l, scores, 1.0f, weights, nullptr);
      for (int64_t g = 0; g < count; ++g) {
        pack_rows(l, at<bf16>(p.v, b, n, h + g), l.keys, offset, p.v.stride[1], next_group(p, l, p.v, h), packed);
        mix_all(l, {weights + g * l.padded_queries, 1, l.lane_count, l.queries, l.keys}, packed, at<bf16>(p.out, b, n, h + g),
                p.out.stride[1], p.past_cache);
      }
    }
  }
}

template <>
I2V_INLINE void backward_of<bf16>(const Problem& p, int64_t begin, int64_t end, void* bias_grad) {
  const Lanes l(p);
  const int64_t queries = l.padded_queries * raw_row(l), keys = l.padded_keys * raw_row(l), half = l.square() / 2;
  Scratch<bf16> rows(2 * l.group * queries + (l.group + 2) * keys + 2 * l.square());
  Scratch<uint32_t> pairs(packed_size(l) + 2 * half);
  Scratch<float> lanes_memory(2 * l.square() + l.lane_count + raw_row(l) / 2 * l.lane_count);
  bf16 *q = rows.data(), *grad = q + l.group * queries, *k = grad + l.group * queries, *v = k + l.group * keys;
  bf16 *seen = v + keys, *probs_by_query = seen + keys, *grads_by_query = probs_by_query + l.square();
  uint32_t *packed = pairs.data(), *probs_by_key = packed + packed_size(l), *grads_by_key = probs_by_key + half;
  float *probs = lanes_memory.data(), *grads = probs + l.square(), *lane_frame = grads + l.square();
  float* turned = lane_frame + l.lane_count;
  const float scale = static_cast<float>(p.scale);
  fill_lane_frames(l, lane_frame);
  // A gradient of keys or values, which a head with an offset saw elsewhere than they are.
  const auto mix_to_keys = [&](const bf16* by_query, const View<4>& to, int64_t b, int64_t n, int64_t h) {
    const Weights<uint32_t> w{reinterpret_cast<const uint32_t*>(by_query), l.lane_count / 2, 1, l.keys, l.queries};
    bf16* out = at<bf16>(to, b, n, h);
    if (offset_of(p, h) == 0) return mix_all(l, w, packed, out, to.stride[1], p.past_cache);
    mix_all(l, w, packed, seen, raw_row(l), false);
    to_frames(seen, raw_row(l), l.keys, l.dim, offset_of(p, h), out, to.stride[1]);
  };
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.tokens, n = token % p.tokens;
    for (int64_t h = 0; h < p.heads; h += l.group) {
      const int64_t count = std::min(l.group, p.heads - h), offset = offset_of(p, h);
      for (int64_t g = 0; g < count; ++g) {
        bf16 *to_q = q + g * queries, *to_k = k + g * keys, *to_grad = grad + g * queries;
        copy_raw(l, at<bf16>(p.q, b, n, h + g), l.queries, 0, p.q.stride[1], next_group(p, l, p.q, h), to_q);
        copy_raw(l, at<bf16>(p.k, b, n, h + g), l.keys, offset, p.k.stride[1], next_group(p, l, p.k, h), to_k);
        copy_raw(l, at<bf16>(p.v, b, n, h + g), l.keys, offset, p.v.stride[1], next_group(p, l, p.v, h), v);
        copy_raw(l, at<bf16>(p.grad, b, n, h + g), l.queries, 0, p.grad.stride[1], next_group(p, l, p.grad, h), to_grad);
        expect_writes<bf16>(p, p.dv, l.keys, b, n, h + g);
        dot_raw(l, to_q, to_k, turned, probs + g * l.padded_queries);
        expect_writes<bf16>(p, p.dk, l.keys, b, n, h + g);
        dot_raw(l, to_grad, v, turned, grads + g * l.padded_queries);
      }
      const bool* valid = p.mask ? p.mask + b * p.keys : nullptr;
      softmax(p, l, lane_frame, bias_of(p, l, h), valid, offset, probs, static_cast<float*>(nullptr));
      score_gradients(p, l, lane_frame, valid, offset, probs, grads);
      round_weights(l, probs, 1.0f, probs_by_key, probs_by_query);
      round_weights(l, grads, scale, grads_by_key, grads_by_query);
      for (int64_t g = 0; g < count; ++g) {
        const int64_t lane = g * l.padded_queries;
        expect_writes<bf16>(p, p.dq, l.queries, b, n, h + g);
        pack_rows(l, grad + g * queries, l.queries, 0, raw_row(l), 0, packed);
        mix_to_keys(probs_by_query + lane, p.dv, b, n, h + g);
        pack_rows(l, q + g * queries, l.queries, 0, raw_row(l), 0, packed);
        mix_to_keys(grads_by_query + lane, p.dk, b, n, h + g);
        pack_rows(l, k + g * keys, l.keys, 0, raw_row(l), 0, packed);
        mix_all(l, {grads_by_key + lane, 1, l.lane_count, l.queries, l.keys}, packed, at<bf16>(p.dq, b, n, h + g),
                p.dq.stride[1], p.past_cache);
        if (bias_grad) add_bias_gradient(l, grads + lane, static_cast<float*>(bias_grad) + (h + g) * p.queries * p.keys);
      }
    }
  }
}
