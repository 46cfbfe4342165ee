// What late_interaction does on CPUs beside PyTorch's matrix products (ops/late_interaction/blocks.py): scores of a tile of
// similarities, and the gradient of the features on one side, which reads from the other side only what was largest.
#include <optional>
#include <vector>

#include "../common/cpu.h"
#include "../common/dispatch.h"

namespace i2v {

struct LateTile {
  int64_t texts, videos, rows, columns;  // rows: tokens of a text, columns: of a video
  bool both, zero;
  void* tile;  // the texts' rows below each other, the videos' columns beside each other: those of valid tokens, or all
  const int64_t *row_start, *column_start, *row_token, *column_token;  // where each begins; the token of each row and column
  void* scores;  // [texts, videos], the last dense
  int64_t scores_step;
  const void *text_weight = nullptr, *video_weight = nullptr;
  const bool *text_mask = nullptr, *video_mask = nullptr;
  char *text_best = nullptr, *video_best = nullptr;  // [texts, videos, tokens], the last dense; steps in bytes
  int64_t text_step[2] = {}, video_step[2] = {};
  int text_bytes = 0, video_bytes = 0;
};

// Of the tokens of `items`, each with `tokens`, against all of the others.
struct LateGradient {
  int64_t items, tokens, others, others_tokens, channels;
  bool both;
  void *dx = nullptr, *dweight = nullptr;
  const void *own, *other, *grad;
  int64_t dx_step[2] = {}, own_step[2] = {}, other_step[2] = {}, grad_step[2] = {};
  const void *weight = nullptr, *other_weight = nullptr;
  const bool *mask = nullptr, *other_mask = nullptr;
  const char *best = nullptr, *other_best = nullptr;  // [items, others, tokens of either], the last dense; steps in bytes
  int64_t best_step[2] = {}, other_best_step[2] = {};
  int best_bytes = 0, other_bytes = 0;
};

template <typename A>
using IndexOf = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

}  // namespace i2v

#define I2V_KERNELS "../late_interaction/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

ScalarType late_sums(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

const bool* late_mask(const std::optional<Tensor>& t, int64_t count, const char* name) {
  if (!t) return nullptr;
  check_contiguous(*t, count, ScalarType::Bool, name);
  return static_cast<const bool*>(t->const_data_ptr());
}

const void* late_weight(const std::optional<Tensor>& t, int64_t count, ScalarType dtype, const char* name) {
  if (!t) return nullptr;
  check_contiguous(*t, count, late_sums(dtype), name);
  return t->const_data_ptr();
}

// The bytes of an index of places among so many tokens; `places` is [a, b, tokens] with its last dimension dense.
int late_places(const Tensor& t, int64_t a, int64_t b, int64_t tokens, int64_t among, int64_t (&step)[2], const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3 && t.size(0) == a && t.size(1) == b && t.size(2) == tokens &&
                      (tokens <= 1 || t.stride(2) == 1), name, " must be [", a, ", ", b, ", ", tokens, "] with last stride 1");
  const ScalarType dtype = t.scalar_type();
  const int bytes = dtype == ScalarType::Byte ? 1 : dtype == ScalarType::Short ? 2 : dtype == ScalarType::Int ? 4 : 0;
  STD_TORCH_CHECK(bytes && (bytes > 1 || among <= 256) && (bytes > 2 || among <= 32768), name, " cannot count ", among, " tokens");
  step[0] = t.stride(0) * bytes, step[1] = t.stride(1) * bytes;
  return bytes;
}

// Where the tokens of each item begin, and which they are: the valid ones, or all.
struct LateTokens {
  std::vector<int64_t> start{0}, token;
  LateTokens(int64_t items, int64_t tokens, const bool* mask) {
    for (int64_t i = 0; i < items; ++i) {
      for (int64_t x = 0; x < tokens; ++x)
        if (!mask || mask[i * tokens + x]) token.push_back(x);
      start.push_back(static_cast<int64_t>(token.size()));
    }
  }
};

void late_scores_(const Tensor& scores, const Tensor& text_best, const Tensor& video_best, const Tensor& tile, int64_t text_tokens,
                  int64_t video_tokens, const std::optional<Tensor> text_weight, const std::optional<Tensor> video_weight,
                  const std::optional<Tensor> text_mask, const std::optional<Tensor> video_mask, bool both, bool zero) {
  const ScalarType dtype = tile.scalar_type();
  STD_TORCH_CHECK(scores.is_cpu() && scores.dim() == 2 && scores.scalar_type() == late_sums(dtype) &&
                      (scores.size(1) <= 1 || scores.stride(1) == 1),
                  "scores must be [texts, videos] of the sums' dtype with last stride 1");
  LateTile p{scores.size(0), scores.size(1), text_tokens, video_tokens, both, zero};
  p.text_mask = late_mask(text_mask, p.texts * p.rows, "text_mask");
  p.video_mask = late_mask(video_mask, p.videos * p.columns, "video_mask");
  const LateTokens rows(p.texts, p.rows, zero ? nullptr : p.text_mask), columns(p.videos, p.columns, zero ? nullptr : p.video_mask);
  STD_TORCH_CHECK(tile.is_cpu() && tile.dim() == 2 && tile.is_contiguous() && tile.size(0) == rows.start.back() &&
                      tile.size(1) == columns.start.back(),
                  "tile must be contiguous, ", rows.start.back(), " rows of ", columns.start.back(), " columns");
  p.row_start = rows.start.data(), p.row_token = rows.token.data();
  p.column_start = columns.start.data(), p.column_token = columns.token.data();
  p.tile = tile.data_ptr(), p.scores = scores.data_ptr(), p.scores_step = scores.stride(0);
  p.text_weight = late_weight(text_weight, p.texts * p.rows, dtype, "text_weight");
  p.video_weight = late_weight(video_weight, p.videos * p.columns, dtype, "video_weight");
  STD_TORCH_CHECK(!both || p.video_weight, "video_weight is needed for both directions");
  if (text_best.numel()) {
    p.text_bytes = late_places(text_best, p.texts, p.videos, p.rows, p.columns, p.text_step, "text_best");
    p.text_best = static_cast<char*>(text_best.data_ptr());
  }
  if (video_best.numel()) {
    p.video_bytes = late_places(video_best, p.texts, p.videos, p.columns, p.rows, p.video_step, "video_best");
    p.video_best = static_cast<char*>(video_best.data_ptr());
  }
  for_dtype(dtype, [&](auto* type) {
    const auto kernel = I2V_PICK(late_scores, std::remove_pointer_t<decltype(type)>);
    for_pieces(p.texts, piece_count(p.texts, p.rows * tile.size(1) * tile.element_size()),
               [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  });
}

void late_gradient_(const std::optional<Tensor> dx, const std::optional<Tensor> dweight, const Tensor& grad, const Tensor& own,
                    const Tensor& other, const std::optional<Tensor> weight, const std::optional<Tensor> other_weight,
                    const std::optional<Tensor> mask, const std::optional<Tensor> other_mask, const Tensor& best,
                    const Tensor& other_best, bool both) {
  check_like(own, own, "own");
  check_like(other, other, "other");
  const ScalarType dtype = own.scalar_type();
  STD_TORCH_CHECK(own.is_cpu() && own.dim() == 3 && other.dim() == 3 && other.size(2) == own.size(2) &&
                      other.scalar_type() == dtype, "own and other must be CPU tensors [items, tokens, D] of one dtype");
  LateGradient p{own.size(0), own.size(1), other.size(0), other.size(1), own.size(2), both};
  p.own = own.const_data_ptr(), p.other = other.const_data_ptr(), p.grad = grad.const_data_ptr();
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 2 && grad.size(0) == p.items && grad.size(1) == p.others &&
                      grad.scalar_type() == late_sums(dtype), "grad must be [items, others] of the sums' dtype");
  if (dx) check_like(*dx, own, "dx"), p.dx = dx->data_ptr();
  for (int i = 0; i < 2; ++i) {
    p.own_step[i] = own.stride(i), p.other_step[i] = other.stride(i), p.grad_step[i] = grad.stride(i);
    if (dx) p.dx_step[i] = dx->stride(i);
  }
  p.weight = late_weight(weight, p.items * p.tokens, dtype, "weight");
  p.other_weight = late_weight(other_weight, p.others * p.others_tokens, dtype, "other_weight");
  p.mask = late_mask(mask, p.items * p.tokens, "mask");
  p.other_mask = late_mask(other_mask, p.others * p.others_tokens, "other_mask");
  if (dweight) {
    STD_TORCH_CHECK(p.weight, "dweight needs a weight");
    check_contiguous(*dweight, p.items * p.tokens, late_sums(dtype), "dweight");
    p.dweight = dweight->data_ptr();
  }
  if (best.numel()) {
    p.best_bytes = late_places(best, p.items, p.others, p.tokens, p.others_tokens, p.best_step, "best");
    p.best = static_cast<const char*>(best.const_data_ptr());
  }
  if (other_best.numel()) {
    p.other_bytes = late_places(other_best, p.items, p.others, p.others_tokens, p.tokens, p.other_best_step, "other_best");
    p.other_best = static_cast<const char*>(other_best.const_data_ptr());
  }
  for_dtype(dtype, [&](auto* type) {
    const auto kernel = I2V_PICK(late_gradient, std::remove_pointer_t<decltype(type)>);
    const int64_t bytes = p.others * (p.tokens + p.others_tokens) * p.channels * own.element_size();
    for_pieces(p.items, piece_count(p.items, bytes), [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def(
      "late_scores_(Tensor(a!) scores, Tensor(b!) text_best, Tensor(c!) video_best, Tensor(d!) tile, int text_tokens, "
      "int video_tokens, Tensor? text_weight, Tensor? video_weight, Tensor? text_mask, Tensor? video_mask, bool both, bool zero) "
      "-> ()");
  m.def(
      "late_gradient_(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor grad, Tensor own, Tensor other, Tensor? weight, Tensor? "
      "other_weight, Tensor? mask, Tensor? other_mask, Tensor best, Tensor other_best, bool both) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) {
  m.impl("late_scores_", TORCH_BOX(&late_scores_));
  m.impl("late_gradient_", TORCH_BOX(&late_gradient_));
}

}  // namespace i2v
