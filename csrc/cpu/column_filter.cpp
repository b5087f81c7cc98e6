// The columns of a chunk's logit gradient that are worth multiplying: which they are, and their entries side by side.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace vgs {
namespace {

using torch::stable::Tensor;

// out (n, k) = matrix[:, columns]. Few columns in a row, each a cache line of its own: they are fetched ahead.
template <class T>
void gather_entries(const Tensor& matrix, const int64_t* column, int64_t count, Tensor& out) {
  constexpr int64_t kAhead = 128;
  torch::stable::parallel_for(0, matrix.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* const from = static_cast<const T*>(matrix.data_ptr()) + row * matrix.stride(0);
      T* const to = static_cast<T*>(out.data_ptr()) + row * out.stride(0);
      for (int64_t k = 0; k < count; ++k) {
        __builtin_prefetch(from + column[std::min(k + kAhead, count - 1)]);
        to[k] = from[column[k]];
      }
    }
  });
}

void gather_columns(const Tensor& matrix, const Tensor& columns, Tensor out) {
  const int64_t count = columns.numel();
  STD_TORCH_CHECK(matrix.dim() == 2 && out.dim() == 2 && out.size(0) == matrix.size(0) && out.size(1) == count,
                  "out must have a row for each of matrix, and a column for each of columns");
  STD_TORCH_CHECK((matrix.stride(1) == 1 || matrix.size(1) == 1) && (out.stride(1) == 1 || count <= 1),
                  "matrix and out must have unit stride in the last dimension");
  STD_TORCH_CHECK(matrix.scalar_type() == out.scalar_type(), "out must have the dtype of matrix");
  const int64_t* const column = checked_indices(columns, matrix.size(1));
  switch (element_size(element_of(matrix, "matrix"))) {
    case 2: return gather_entries<uint16_t>(matrix, column, count, out);
    case 4: return gather_entries<uint32_t>(matrix, column, count, out);
    default: return gather_entries<uint64_t>(matrix, column, count, out);
  }
}

// The columns of a matrix that carry all but `first` of its Frobenius norm, from the squares of their norms, and in a
// second row of `columns` which among them carry all but `second`, a larger part; ascending. The smallest columns are
// dropped: with a histogram of the squares by their leading bits (an eighth of an octave a bin) everything below the
// largest bin edge whose sum is still at most tolerance^2 of the total. Returns how many were kept for each.
std::tuple<int64_t, int64_t> select_columns(const Tensor& squares, double first, double second, Tensor columns) {
  const int64_t width = squares.numel();
  STD_TORCH_CHECK(squares.is_contiguous() && element_of(squares, "squares") == kFloat32,
                  "squares must be contiguous float32");
  STD_TORCH_CHECK(columns.is_contiguous() && columns.numel() >= 2 * width &&
                      columns.scalar_type() == torch::headeronly::ScalarType::Long,
                  "columns must be a contiguous int64 buffer of at least two rows of the vocabulary");
  const float* const square = static_cast<const float*>(squares.data_ptr());
  int64_t* const column = static_cast<int64_t*>(columns.data_ptr());

  constexpr int kShift = 20;  // the sign, 8 exponent and 3 mantissa bits of a float remain
  const auto bin_of = [&](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits >> kShift;
  };
  constexpr size_t kBins = size_t{1} << (32 - kShift);
  std::vector<double> sums(2 * kBins, 0.0);  // of even and of odd columns: sums of one bin would wait for each other
  for (int64_t v = 0; v < width; ++v) sums[v % 2 * kBins + bin_of(square[v])] += square[v];
  double total = 0.0;
  for (size_t bin = 0; bin < kBins; ++bin) total += sums[bin] += sums[kBins + bin];
  const auto lowest_bin = [&](double tolerance) {
    // Beside NaN and inf nothing is small.
    const double most = std::isfinite(total) ? tolerance * tolerance * total : -1.0;
    uint32_t bin = 0;
    double dropped = 0.0;
    while (bin < kBins && dropped + sums[bin] <= most) dropped += sums[bin++];
    return bin;
  };
  const uint32_t lowest_of_first = lowest_bin(first), lowest_of_second = lowest_bin(second);
  int64_t* const among_them = column + width;
  int64_t count = 0, fewer = 0;
  for (int64_t v = 0; v < width; ++v) {
    column[count] = v;
    count += bin_of(square[v]) >= lowest_of_first;
  }
  for (int64_t i = 0; i < count; ++i) {
    among_them[fewer] = i;
    fewer += bin_of(square[column[i]]) >= lowest_of_second;
  }
  return {count, fewer};
}

}  // namespace
}  // namespace vgs

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CPU, m) {
  m.impl("gather_columns", TORCH_BOX(&vgs::gather_columns));
  m.impl("select_columns", TORCH_BOX(&vgs::select_columns));
}
