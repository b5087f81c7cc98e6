// Products of a chunk of tokens with a head, where torch has none or only a slow one: checks and threads.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <vector>

#include "kernels.h"
#include "products_amx.h"
#include "tensors.h"

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

void check_operands(std::initializer_list<const Tensor*> matrices, bool fit) {
  for (const Tensor* matrix : matrices)
    STD_TORCH_CHECK(matrix->dim() == 2 && element_of(*matrix, "an operand") != kFloat64 &&
                        (matrix->stride(1) == 1 || matrix->size(1) <= 1),
                    "operands must be float32, bfloat16 or float16 matrices with unit stride in the last dimension");
  STD_TORCH_CHECK(fit, "the shapes of the operands do not fit");
}

Matrix matrix_of(const Tensor& tensor) { return {tensor.data_ptr(), element_of(tensor, "an operand"), tensor.stride(0)}; }

bool suits_matrix_unit(const Tensor& left, const Tensor& right, int64_t width) {
  return level() == kAMX && element_of(left, "an operand") == kBFloat16 && element_of(right, "an operand") == kBFloat16 &&
         width % amx::kBlock == 0;
}

void matrix_unit_logits(const Tensor& hidden, const Tensor& weight, const float* bias, Tensor& out) {
#if defined(VGS_HAVE_AMX)
  const int64_t n = hidden.size(0), width = hidden.size(1), vocab = weight.size(0);
  const auto panels = cache_lines<uint16_t>(round_up(n, amx::kBlock) * width);
  amx::pack_hidden(static_cast<const uint16_t*>(hidden.data_ptr()), hidden.stride(0), n, width, panels.get());
  torch::stable::parallel_for(0, round_up(vocab, amx::kBlock) / amx::kBlock, 8, [&](int64_t begin, int64_t end) {
    const auto scratch = cache_lines<float>(amx::scratch_size(n));
    amx::logits(panels.get(), static_cast<const uint16_t*>(weight.data_ptr()), weight.stride(0), n, width, bias,
                out.data_ptr(), element_of(out, "out"), out.stride(0), begin * amx::kBlock,
                std::min(vocab, end * amx::kBlock), scratch.get());
  });
#endif
}

// out (n, v) = hidden (n, w) weight (v, w)^T + bias (v,), summed in float32 and rounded once to the dtype of `out`. Threads
// share the vocabulary.
void logits(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocab = weight.size(0);
  check_operands({&hidden, &weight, &out}, weight.size(1) == width && out.size(0) == n && out.size(1) == vocab);
  STD_TORCH_CHECK(!bias || (bias->numel() == vocab && bias->is_contiguous() && element_of(*bias, "bias") == kFloat32),
                  "bias must be contiguous float32 with an entry for each row of weight");
  const float* const added = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  if (suits_matrix_unit(hidden, weight, width)) return matrix_unit_logits(hidden, weight, added, out);
  const ProductKernels& kernels = vgs::kernels().products;
  const Matrix left = matrix_of(hidden), right = matrix_of(weight);
  const bool pairs = kernels.multiplies_pairs(left.element, right.element);
  const auto panels = cache_lines<float>(round_up(n, kernels.group) * width);
  kernels.pack_rows(left, pairs, n, width, panels.get());
  const int64_t bands = round_up(vocab, kernels.logit_band) / kernels.logit_band;
  torch::stable::parallel_for(0, bands, 4, [&](int64_t begin, int64_t end) {
    const auto scratch = cache_lines<float>(kernels.logit_scratch(width));
    kernels.logits(panels.get(), pairs, right, n, width, added, out.data_ptr(), element_of(out, "out"), out.stride(0),
                   begin * kernels.logit_band, std::min(vocab, end * kernels.logit_band), scratch.get());
  });
}

// out (v, w) = or += gradient (n, v)^T hidden (n, w), summed in float32 and rounded once. Every entry is one sum over n in
// order, whichever thread computes it.
void head_gradient(const Tensor& gradient, const Tensor& hidden, bool accumulate, Tensor out,
                   std::optional<Tensor> remainder) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocab = gradient.size(1);
  check_operands({&gradient, &hidden, &out}, gradient.size(0) == n && out.size(0) == vocab && out.size(1) == width);
  const Sums sums{out.data_ptr(), remainder ? remainder->data_ptr() : nullptr, element_of(out, "out"), out.stride(0),
                  accumulate};
  STD_TORCH_CHECK(!remainder || (remainder->dim() == 2 && remainder->size(0) == vocab && remainder->size(1) == width &&
                                 remainder->stride(0) == sums.stride && (remainder->stride(1) == 1 || width <= 1) &&
                                 element_of(*remainder, "remainder") == sums.element),
                  "remainder must have the shape, the strides and the dtype of out");
  const ProductKernels& kernels = vgs::kernels().products;
  const Matrix left = matrix_of(gradient), right = matrix_of(hidden);
  const bool pairs = kernels.multiplies_pairs(left.element, right.element);
  const auto panels = cache_lines<float>(n * round_up(width, kernels.panel_columns));
  kernels.pack_columns(right, pairs, n, width, panels.get());
  const int64_t bands = round_up(vocab, kernels.tile_rows) / kernels.tile_rows;
  torch::stable::parallel_for(0, bands, 16, [&](int64_t begin, int64_t end) {
    const auto scratch = cache_lines<float>(n * kernels.tile_rows + 16);
    kernels.head_gradient(left, panels.get(), pairs, n, vocab, width, sums, begin * kernels.tile_rows,
                          std::min(vocab, end * kernels.tile_rows), scratch.get());
  });
}

// out (n, w) = gradient (n, v) weight (v, w), summed in float32 and rounded once. Threads share the width; every entry is
// one sum over v in order.
void hidden_gradient(const Tensor& gradient, const Tensor& weight, Tensor out) {
  const int64_t n = gradient.size(0), vocab = gradient.size(1), width = weight.size(1);
  check_operands({&gradient, &weight, &out}, weight.size(0) == vocab && out.size(0) == n && out.size(1) == width);
  const ProductKernels& kernels = vgs::kernels().products;
  if (n == 0) return;
  const Matrix left = matrix_of(gradient), right = matrix_of(weight);
  const Element element = element_of(out, "out");
  const bool in_place = element == kFloat32;
  const auto rounded_later = cache_lines<float>(in_place ? 0 : n * width);
  float* const sums = in_place ? static_cast<float*>(out.data_ptr()) : rounded_later.get();
  const int64_t panels = round_up(width, kernels.panel_columns) / kernels.panel_columns;
  const int64_t scratch_rows = n + kernels.tile_rows + kernels.panel_columns;
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = cache_lines<float>(scratch_rows * kernels.band + kernels.tile_rows * kernels.panel_columns);
    kernels.hidden_gradient(left, right, kernels.multiplies_pairs(left.element, right.element), n, vocab, sums,
                            in_place ? out.stride(0) : width, in_place ? sums : out.data_ptr(), element, out.stride(0),
                            begin * kernels.panel_columns, std::min(width, end * kernels.panel_columns), scratch.get());
  });
}

// Operands of a gathered product on the matrix unit, whose tiles want a `width` of the head in whole blocks.
void check_for_matrix_unit(std::initializer_list<const Tensor*> matrices, int64_t width, bool fit) {
  check_operands(matrices, fit);
  for (const Tensor* matrix : matrices)
    STD_TORCH_CHECK(element_of(*matrix, "an operand") == kBFloat16, "operands must be bfloat16");
  STD_TORCH_CHECK(level() == kAMX, "this CPU, system or build has no matrix unit for bfloat16");
  STD_TORCH_CHECK(width % amx::kBlock == 0, "the width must be a multiple of ", amx::kBlock);
}

// out (n, w) = gradient (n, k) weight[columns], bfloat16, on the matrix unit. The gathered rows of the weight never exist as
// a whole. Threads share the width; every entry is one sum over the columns in order.
void matrix_unit_hidden_gradient(const Tensor& gradient, const Tensor& weight, const Tensor& columns, Tensor out) {
  const int64_t n = gradient.size(0), width = weight.size(1), count = columns.numel();
  check_for_matrix_unit({&gradient, &weight, &out}, width,
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
  check_for_matrix_unit({&gradient, &hidden, &out}, width,
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
  m.impl("matrix_unit_hidden_gradient", TORCH_BOX(&vgs::matrix_unit_hidden_gradient));
  m.impl("matrix_unit_head_gradient", TORCH_BOX(&vgs::matrix_unit_head_gradient));
}
