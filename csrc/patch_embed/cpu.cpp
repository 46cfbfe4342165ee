// What patch_embed needs of C++ on a CPU, around products that are the library's: patches gathered from uint8 frames as the
// rows of a matrix (i2v_kernels/ops/patch_embed/blocks.py), and weights as digits for a product of whole numbers (digits.py).
#include <vector>

#include "../common/cpu.h"

namespace i2v {

struct Problem {
  int64_t frames, grid_height, grid_width, patch_height, patch_width;  // frames: of a clip
  const uint8_t* data;
  int64_t stride[4];   // of clips, frames, pixel rows and pixels: of any sign, in bytes
  const void* centre;  // [patch_width * 3], in the type of the sums: what pixels are measured from
  void* rows;          // [patches, patch_height * patch_width * 3]
  int64_t first;       // the patch of the first row
};

struct Digits {
  int64_t channels, size;
  const float* weight;    // [channels, size]
  const int32_t* offset;  // [size]
  int8_t* digits;         // [3, channels, size], the highest first
  int32_t* correction;    // [3, channels]
  float* scale;           // [channels]
  bool* fits;             // [channels]
};

struct Joined {
  int64_t channels;
  const int32_t* sums;        // [rows, 3, channels]
  const int32_t* correction;  // [3, channels]
  const float *scale, *bias;  // [channels]
  float* out;                 // [rows, channels]
};

}  // namespace i2v

#define I2V_KERNELS "../patch_embed/cpu_kernels.h"
#include "../common/for_each_isa.h"

namespace i2v {
namespace {

void patch_rows(const Tensor& frames, const std::vector<int64_t> centre, int64_t patch_height, int64_t patch_width,
                int64_t first, const Tensor& rows) {
  STD_TORCH_CHECK(frames.dim() == 5 && frames.is_cpu() && frames.scalar_type() == ScalarType::Byte && frames.size(4) == 3 &&
                      frames.stride(4) == 1,
                  "patch_rows: frames must be a uint8 CPU tensor [B, T, H, W, 3] whose last stride is 1");
  STD_TORCH_CHECK(centre.size() == 3, "patch_rows: centre must have 3 numbers");
  STD_TORCH_CHECK(patch_height >= 1 && patch_width >= 1 && frames.size(2) % patch_height == 0 &&
                      frames.size(3) % patch_width == 0,
                  "patch_rows: patches of ", patch_height, " x ", patch_width, " do not divide the frames");
  const int64_t grid_height = frames.size(2) / patch_height, grid_width = frames.size(3) / patch_width;
  const int64_t run = patch_width * 3, patches = frames.size(0) * frames.size(1) * grid_height * grid_width;
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_cpu() && rows.is_contiguous() && rows.size(1) == patch_height * run,
                  "patch_rows: rows must be contiguous on the CPU, [patches, ", patch_height * run, "]");
  STD_TORCH_CHECK(first >= 0 && rows.size(0) <= patches - first, "patch_rows: patches ", first, " to ", first + rows.size(0),
                  " of ", patches);
  const auto run_kernel = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    Scratch<A> by_byte(run);
    for (int64_t i = 0; i < run; ++i) by_byte.data()[i] = static_cast<A>(centre[i % 3]);
    const Problem p{frames.size(1), grid_height, grid_width, patch_height, patch_width,
                    static_cast<const uint8_t*>(frames.data_ptr()),
                    {frames.stride(0), frames.stride(1), frames.stride(2), frames.stride(3)},
                    by_byte.data(), rows.data_ptr(), first};
    const auto kernel = I2V_PICK(gather, T);
    const int64_t items = rows.size(0);
    for_pieces(items, piece_count(items, rows.size(1) * (1 + rows.element_size())),
               [&](int64_t, int64_t begin, int64_t end) { kernel(p, begin, end); });
  };
  if (rows.scalar_type() == ScalarType::Char) run_kernel(static_cast<int8_t*>(nullptr));
  else for_dtype(rows.scalar_type(), run_kernel);
}

bool split_weight(const Tensor& weight, const std::vector<int64_t> centre, const Tensor& digits, const Tensor& correction,
                  const Tensor& scale) {
  STD_TORCH_CHECK(weight.dim() == 2 && centre.size() == 3, "split_weight: weight must be [channels, size], centre 3 numbers");
  const int64_t channels = weight.size(0), size = weight.size(1);
  check_contiguous(weight, channels * size, ScalarType::Float, "weight");
  check_contiguous(digits, 3 * channels * size, ScalarType::Char, "digits");
  check_contiguous(correction, 3 * channels, ScalarType::Int, "correction");
  check_contiguous(scale, channels, ScalarType::Float, "scale");
  Scratch<int32_t> offset(size + 16);  // a vector is read beyond the end
  for (int64_t k = 0; k < size; ++k) offset.data()[k] = static_cast<int32_t>(128 - centre[k % 3]);
  Scratch<bool> fits(channels);
  const Digits p{channels, size, static_cast<const float*>(weight.data_ptr()), offset.data(),
                 static_cast<int8_t*>(digits.data_ptr()), static_cast<int32_t*>(correction.data_ptr()),
                 static_cast<float*>(scale.data_ptr()), fits.data()};
  const auto kernel = I2V_PICK(split, float);
  for_pieces(channels, piece_count(channels, 7 * size), [&](int64_t, int64_t begin, int64_t end) { kernel(p, begin, end); });
  return std::all_of(fits.data(), fits.data() + channels, [](bool fit) { return fit; });
}

void join_digits(const Tensor& sums, const Tensor& correction, const Tensor& scale, const Tensor& bias, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 2, "join_digits: out must be [rows, channels]");
  const int64_t rows = out.size(0), channels = out.size(1);
  check_contiguous(out, rows * channels, ScalarType::Float, "out");
  check_contiguous(sums, 3 * rows * channels, ScalarType::Int, "sums");
  check_contiguous(correction, 3 * channels, ScalarType::Int, "correction");
  check_contiguous(scale, channels, ScalarType::Float, "scale");
  check_contiguous(bias, channels, ScalarType::Float, "bias");
  const Joined p{channels, static_cast<const int32_t*>(sums.data_ptr()), static_cast<const int32_t*>(correction.data_ptr()),
                 static_cast<const float*>(scale.data_ptr()), static_cast<const float*>(bias.data_ptr()),
                 static_cast<float*>(out.data_ptr())};
  const auto kernel = I2V_PICK(join, float);
  for_pieces(rows, piece_count(rows, 16 * channels), [&](int64_t, int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def("patch_rows(Tensor frames, int[] centre, int patch_height, int patch_width, int first, Tensor(a!) rows) -> ()");
  m.def("split_weight(Tensor weight, int[] centre, Tensor(a!) digits, Tensor(b!) correction, Tensor(c!) scale) -> bool");
  m.def("join_digits(Tensor sums, Tensor correction, Tensor scale, Tensor bias, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) { 
  m.impl("patch_rows", TORCH_BOX(&patch_rows));
  m.impl("split_weight", TORCH_BOX(&split_weight));
  m.impl("join_digits", TORCH_BOX(&join_digits));
}

}  // namespace i2v
