// What patch_embed needs of C++ on a CPU: patches gathered from uint8 frames as the rows of a matrix product. The product
// itself is the library's (i2v_kernels/ops/patch_embed/blocks.py).
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
  for_dtype(rows.scalar_type(), [&](auto* type) {
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
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(i2v_kernels_C, m) {
  m.def("patch_rows(Tensor frames, int[] centre, int patch_height, int patch_width, int first, Tensor(a!) rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(i2v_kernels_C, CPU, m) { m.impl("patch_rows", TORCH_BOX(&patch_rows)); }

}  // namespace i2v
