// Products of a chunk of tokens with a head, where torch has none or only a slow one: checks and threads.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "products_amx.h"
#include "tensors.h"
#if defined(VGS_HAVE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vgs {
namespace {

using torch::stable::Tensor;

// Transpose an 8 x 8 tile. The three rounds of interleaving compile to unpack instructions of any 128-bit vector unit.
typedef uint16_t Row8 __attribute__((vector_size(16)));

inline void interleave(Row8 tile[8]) {
  Row8 mixed[8];
  for (int i = 0; i < 4; ++i) {
    mixed[2 * i] = __builtin_shufflevector(tile[i], tile[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    mixed[2 * i + 1] = __builtin_shufflevector(tile[i], tile[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  std::memcpy(tile, mixed, sizeof(mixed));
}

template <class T>
void transpose_tile(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
  if constexpr (sizeof(T) == 2) {
    if (rows == 8 && columns == 8) {
      Row8 tile[8];
      for (int i = 0; i < 8; ++i) std::memcpy(&tile[i], in + i * in_stride, 16);
      for (int round = 0; round < 3; ++round) interleave(tile);
      for (int i = 0; i < 8; ++i) std::memcpy(out + i * out_stride, &tile[i], 16);
      return;
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
}

// A cache line of T by a cache line of T at a time: every line is fetched once and written whole.
template <class T>
void transpose_matrix(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t bands = (columns + kLine - 1) / kLine;
  torch::stable::parallel_for(0, bands, std::max<int64_t>(1, 32768 / (kLine * rows + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) {
      const int64_t last = std::min(columns, (band + 1) * kLine);
      for (int64_t i = 0; i < rows; i += kLine)
        for (int64_t ii = i; ii < std::min(rows, i + kLine); ii += 8)
          for (int64_t j = band * kLine; j < last; j += 8)
            transpose_tile(in + ii * in_stride + j, in_stride, out + j * out_stride + ii, out_stride,
                           std::min<int64_t>(8, rows - ii), std::min<int64_t>(8, last - j));
    }
  });
}

void transpose(const Tensor& input, Tensor out) {
  STD_TORCH_CHECK(input.dim() == 2 && out.dim() == 2 && input.size(0) == out.size(1) && input.size(1) == out.size(0),
                  "out must have the transposed shape of input");
  STD_TORCH_CHECK((input.stride(1) == 1 || input.size(1) == 1) && (out.stride(1) == 1 || out.size(1) == 1),
                  "input and out must have unit stride in the last dimension");
  STD_TORCH_CHECK(input.scalar_type() == out.scalar_type(), "out must have the dtype of input");
  const int64_t rows = input.size(0), columns = input.size(1);
  switch (element_size(element_of(input, "input"))) {
    case 2:
      return transpose_matrix(static_cast<const uint16_t*>(input.data_ptr()), input.stride(0),
                              static_cast<uint16_t*>(out.data_ptr()), out.stride(0), rows, columns);
    case 4:
      return transpose_matrix(static_cast<const uint32_t*>(input.data_ptr()), input.stride(0),
                              static_cast<uint32_t*>(out.data_ptr()), out.stride(0), rows, columns);
    default:
      return transpose_matrix(static_cast<const uint64_t*>(input.data_ptr()), input.stride(0),
                              static_cast<uint64_t*>(out.data_ptr()), out.stride(0), rows, columns);
  }
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Memory from a cache line on: a vector or tile that lies across two takes both.
template <class T>
std::unique_ptr<T[], decltype(&std::free)> cache_lines(int64_t size) {
  void* const memory = std::aligned_alloc(64, round_up(std::max<int64_t>(size, 1) * sizeof(T), 64));
  if (!memory) throw std::bad_alloc();
  return {static_cast<T*>(memory), std::free};
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

void check_product(std::initializer_list<const Tensor*> matrices, bool fit) {
  for (const Tensor* matrix : matrices) {
    STD_TORCH_CHECK(matrix->dim() == 2 && matrix->scalar_type() == torch::headeronly::ScalarType::Float &&
                        (matrix->stride(1) == 1 || matrix->size(1) == 1),
                    "operands must be float32 matrices with unit stride in the last dimension");
  }
  STD_TORCH_CHECK(fit, "the shapes of the operands do not fit");
}

// out (v, w) = or += gradient (n, v)^T hidden (n, w), float32. Every entry is one sum over n in order, whichever thread
// computes it.
void head_gradient(const Tensor& gradient, const Tensor& hidden, bool accumulate, Tensor out) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocab = gradient.size(1);
  check_product({&gradient, &hidden, &out}, gradient.size(0) == n && out.size(0) == vocab && out.size(1) == width);
  const ProductKernels& kernels = vgs::kernels().products;
  const auto panels = cache_lines<float>(n * round_up(width, kernels.panel_columns));
  kernels.pack_hidden(floats(hidden), hidden.stride(0), n, width, panels.get());
  const int64_t bands = (vocab + kernels.tile_rows - 1) / kernels.tile_rows;
  torch::stable::parallel_for(0, bands, 16, [&](int64_t begin, int64_t end) {
    const auto scratch = cache_lines<float>(n * kernels.tile_rows);
    kernels.head_gradient(floats(gradient), gradient.stride(0), panels.get(), n, width,
                          static_cast<float*>(out.data_ptr()), out.stride(0), begin * kernels.tile_rows,
                          std::min(vocab, end * kernels.tile_rows), accumulate, scratch.get());
  });
}

// out (n, w) = gradient (n, v) weight (v, w), float32. Threads share the width; every entry is one sum over v in order.
void hidden_gradient(const Tensor& gradient, const Tensor& weight, Tensor out) {
  const int64_t n = gradient.size(0), vocab = gradient.size(1), width = weight.size(1);
  check_product({&gradient, &weight, &out}, weight.size(0) == vocab && out.size(0) == n && out.size(1) == width);
  const ProductKernels& kernels = vgs::kernels().products;
  if (n == 0) return;
  const int64_t panels = round_up(width, kernels.panel_columns) / kernels.panel_columns;
  const int64_t scratch_rows = n + kernels.tile_rows + kernels.panel_columns;
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = cache_lines<float>(scratch_rows * kernels.band + kernels.tile_rows * kernels.panel_columns);
    kernels.hidden_gradient(floats(gradient), gradient.stride(0), floats(weight), weight.stride(0), n, vocab,
                            static_cast<float*>(out.data_ptr()), out.stride(0), begin * kernels.panel_columns,
                            std::min(width, end * kernels.panel_columns), scratch.get());
  });
}

// out (n, v) = hidden (n, w) weight (v, w)^T, float32. Threads share the vocabulary.
void logits(const Tensor& hidden, const Tensor& weight, Tensor out) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocab = weight.size(0);
  check_product({&hidden, &weight, &out}, weight.size(1) == width && out.size(0) == n && out.size(1) == vocab);
  const ProductKernels& kernels = vgs::kernels().products;
  const int64_t padded = round_up(n, kernels.group) * width;
  const auto panels = cache_lines<float>(padded);
  std::fill_n(panels.get(), padded, 0.0f);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t k = 0; k < width; ++k)
      panels[(row / kernels.group * width + k) * kernels.group + row % kernels.group] =
          floats(hidden)[row * hidden.stride(0) + k];
  const int64_t bands = round_up(vocab, kernels.logit_band) / kernels.logit_band;
  torch::stable::parallel_for(0, bands, 4, [&](int64_t begin, int64_t end) {
    const auto scratch = cache_lines<float>(kernels.logit_band * kernels.group);
    kernels.logits(panels.get(), floats(weight), weight.stride(0), n, width, static_cast<float*>(out.data_ptr()),
                   out.stride(0), begin * kernels.logit_band, std::min(vocab, end * kernels.logit_band),
                   scratch.get());
  });
}

// Whether the CPU has a matrix unit for bfloat16 and Linux lends it to this process.
bool has_matrix_unit() {
#if defined(VGS_HAVE_AMX) && defined(__linux__)
  static const bool available = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (highest_level() < 2 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = d >> 24 & 1, products = d >> 22 & 1;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    const bool rounding = a >> 5 & 1;
    constexpr int kRequestPermission = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
    return tiles && products && rounding && syscall(SYS_arch_prctl, kRequestPermission, kTiles) == 0;
  }();
  return available;
#else
  return false;
#endif
}

// Operands of the matrix unit, whose tiles want a `width` of the head in whole blocks.
void check_bfloat16(std::initializer_list<const Tensor*> matrices, int64_t width, bool fit) {
  for (const Tensor* matrix : matrices)
    STD_TORCH_CHECK(matrix->dim() == 2 && matrix->scalar_type() == torch::headeronly::ScalarType::BFloat16 &&
                        (matrix->stride(1) == 1 || matrix->size(1) == 1),
                    "operands must be bfloat16 matrices with unit stride in the last dimension");
  STD_TORCH_CHECK(has_matrix_unit(), "this CPU, system or build has no matrix unit for bfloat16");
  STD_TORCH_CHECK(fit && width % amx::kBlock == 0,
                  "the shapes of the operands do not fit, or the width is no multiple of ", amx::kBlock);
}

// out (n, v) = hidden (n, w) weight (v, w)^T, bfloat16, on the matrix unit. Threads share the vocabulary.
void matrix_unit_logits(const Tensor& hidden, const Tensor& weight, Tensor out) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocab = weight.size(0);
  check_bfloat16({&hidden, &weight, &out}, width,
                 weight.size(1) == width && out.size(0) == n && out.size(1) == vocab);
#if defined(VGS_HAVE_AMX)
  const auto panels = cache_lines<uint16_t>(round_up(n, amx::kBlock) * width);
  amx::pack_hidden(static_cast<const uint16_t*>(hidden.data_ptr()), hidden.stride(0), n, width, panels.get());
  torch::stable::parallel_for(0, round_up(vocab, amx::kBlock) / amx::kBlock, 8, [&](int64_t begin, int64_t end) {
    const auto scratch = cache_lines<float>(amx::scratch_size(n));
    amx::logits(panels.get(), static_cast<const uint16_t*>(weight.data_ptr()), weight.stride(0), n, width,
                static_cast<uint16_t*>(out.data_ptr()), out.stride(0), begin * amx::kBlock,
                std::min(vocab, end * amx::kBlock), scratch.get());
  });
#endif
}

// out (n, w) = gradient (n, k) weight[columns], bfloat16, on the matrix unit. The gathered rows of the weight never exist as
// a whole. Threads share the width; every entry is one sum over the columns in order.
void matrix_unit_hidden_gradient(const Tensor& gradient, const Tensor& weight, const Tensor& columns, Tensor out) {
  const int64_t n = gradient.size(0), width = weight.size(1), count = columns.numel();
  check_bfloat16({&gradient, &weight, &out}, width,
                 gradient.size(1) == count && out.size(0) == n && out.size(1) == width);
  const int64_t* const column = checked_indices(columns, weight.size(0));
#if defined(VGS_HAVE_AMX)
  const int64_t padded = round_up(n, amx::kBlock), bands = round_up(count, amx::kGathered) / amx::kGathered;
  const auto left = cache_lines<uint16_t>(bands * padded * amx::kGathered);
  torch::stable::parallel_for(0, padded, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t band = 0; band < bands; ++band) {
        uint16_t* const to = left.get() + (band * padded + row) * amx::kGathered;
        const int64_t first = band * amx::kGathered, here = row < n ? std::min(count - first, amx::kGathered) : 0;
        std::copy_n(static_cast<const uint16_t*>(gradient.data_ptr()) + row * gradient.stride(0) + first, here, to);
        std::fill(to + here, to + amx::kGathered, 0);
      }
  });
  torch::stable::parallel_for(0, width / amx::kBlock, 4, [&](int64_t begin, int64_t end) {
    const auto sums = cache_lines<float>(amx::gathered_sums(padded));
    const auto tiles = cache_lines<uint16_t>(amx::gathered_tiles());
    amx::gathered_product(left.get(), static_cast<const uint16_t*>(weight.data_ptr()), weight.stride(0), column, count, n,
                          static_cast<uint16_t*>(out.data_ptr()), out.stride(0), nullptr, begin * amx::kBlock,
                          end * amx::kBlock, sums.get(), tiles.get());
  });
#endif
}

// out[columns] += gradient (n, k)^T hidden (n, w), bfloat16, on the matrix unit: added before it is rounded. No column may
// be there twice. Threads share the columns; every entry is one sum over n in order.
void matrix_unit_head_gradient(const Tensor& gradient, const Tensor& hidden, const Tensor& columns, Tensor out) {
  const int64_t n = gradient.size(0), width = hidden.size(1), count = columns.numel();
  check_bfloat16({&gradient, &hidden, &out}, width,
                 gradient.size(1) == count && hidden.size(0) == n && out.size(1) == width);
  const int64_t* const column = checked_indices(columns, out.size(0));
#if defined(VGS_HAVE_AMX)
  if (n == 0 || count == 0) return;
  constexpr int64_t kMostRows = 256;  // of out, at a time: their sums are half of a second-level cache
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::min(kMostRows, round_up((count + threads - 1) / threads, amx::kBlock));
  const int64_t bands = round_up(n, amx::kGathered) / amx::kGathered;
  std::vector<int64_t> tokens(n);
  std::iota(tokens.begin(), tokens.end(), 0);
  torch::stable::parallel_for(0, (count + most - 1) / most, 1, [&](int64_t begin, int64_t end) {
    const auto left = cache_lines<uint16_t>(bands * most * amx::kGathered);
    const auto sums = cache_lines<float>(amx::gathered_sums(most));
    const auto tiles = cache_lines<uint16_t>(amx::gathered_tiles());
    for (int64_t first = begin * most; first < std::min(count, end * most); first += most) {
      const int64_t rows = std::min(count - first, most), padded = round_up(rows, amx::kBlock);
      std::fill_n(left.get(), bands * padded * amx::kGathered, 0);
      for (int64_t band = 0; band < bands; ++band)
        transpose_matrix(static_cast<const uint16_t*>(gradient.data_ptr()) + band * amx::kGathered * gradient.stride(0) + first,
                         gradient.stride(0), left.get() + band * padded * amx::kGathered, amx::kGathered,
                         std::min(n - band * amx::kGathered, amx::kGathered), rows);
      amx::gathered_product(left.get(), static_cast<const uint16_t*>(hidden.data_ptr()), hidden.stride(0), tokens.data(), n,
                            rows, static_cast<uint16_t*>(out.data_ptr()), out.stride(0), column + first, 0, width,
                            sums.get(), tiles.get());
    }
  });
#endif
}

}  // namespace
}  // namespace vgs

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CPU, m) {
  m.impl("transpose", TORCH_BOX(&vgs::transpose));
  m.impl("head_gradient", TORCH_BOX(&vgs::head_gradient));
  m.impl("hidden_gradient", TORCH_BOX(&vgs::hidden_gradient));
  m.impl("logits", TORCH_BOX(&vgs::logits));
  m.impl("matrix_unit_logits", TORCH_BOX(&vgs::matrix_unit_logits));
  m.impl("matrix_unit_hidden_gradient", TORCH_BOX(&vgs::matrix_unit_hidden_gradient));
  m.impl("matrix_unit_head_gradient", TORCH_BOX(&vgs::matrix_unit_head_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("has_matrix_unit", TORCH_BOX(&vgs::has_matrix_unit));
}
