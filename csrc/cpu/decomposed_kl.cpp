// CPU implementation of decomposed_kl: checks, threads, and the arithmetic of whole rows. The loops over the vocabulary
// are in decomposed_kl_kernels.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace vgs {
namespace {

using torch::stable::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Settings {
  Decomposition decomposition;
  int64_t vocab_size;
  double temperature, student_scale, teacher_scale, student_softcap, teacher_softcap;
};

struct Problem {
  Streams streams;
  Settings settings;
  int64_t rows;
  bool is_double;
};

Stream make_stream(const Tensor& logits, double scale, double softcap, double temperature) {
  if (softcap == 0.0) return {logits.data_ptr(), logits.stride(0), scale / temperature, 0.0, 0.0};
  return {logits.data_ptr(), logits.stride(0), scale, scale / softcap, softcap / temperature};
}

Problem make_problem(const Tensor& student, const Tensor& teacher, const Tensor& masked_teacher,
                     const std::optional<Tensor>& masked_student, const Settings& settings) {
  STD_TORCH_CHECK(settings.decomposition >= 0 && settings.decomposition < kDecompositions, "unknown decomposition ",
                  static_cast<int>(settings.decomposition));
  STD_TORCH_CHECK(masked_student.has_value() == (settings.decomposition != kTeacherPrior),
                  "masked_student must be given for bayes and matched, and only for them");
  Problem problem{};
  problem.settings = settings;
  problem.rows = student.size(0);
  problem.streams.element = element_of(student, "student");
  problem.is_double = problem.streams.element == kFloat64;
  const Tensor* tensors[kStreams] = {&student, &teacher, &masked_teacher,
                                     masked_student ? &*masked_student : nullptr};
  const char* names[kStreams] = {"student", "teacher", "masked_teacher", "masked_student"};
  for (int s = 0; s < kStreams; ++s) {
    if (!tensors[s]) continue;
    const Tensor& logits = *tensors[s];
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) == problem.rows && logits.size(1) >= settings.vocab_size,
                    names[s], " must have ", problem.rows, " rows of at least ", settings.vocab_size, " logits");
    STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) == 1, names[s], " must have unit stride along the vocabulary");
    STD_TORCH_CHECK(element_of(logits, names[s]) == problem.streams.element, names[s], " must have the student's dtype");
    const bool is_teacher = s == kQ || s == kR;
    problem.streams.stream[s] =
        make_stream(logits, is_teacher ? settings.teacher_scale : settings.student_scale,
                    is_teacher ? settings.teacher_softcap : settings.student_softcap, settings.temperature);
  }
  return problem;
}

// A row-wise operand in the accumulation dtype, (rows, columns), contiguous.
class Operand {
 public:
  Operand(const Tensor& tensor, int64_t rows, int64_t columns, bool is_double, const char* name)
      : data_(tensor.data_ptr()), columns_(columns), is_double_(is_double) {
    STD_TORCH_CHECK(tensor.numel() == rows * columns && tensor.is_contiguous(), name, " must be contiguous, with ", rows,
                    " x ", columns, " entries");
    const auto wanted = is_double ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
    STD_TORCH_CHECK(tensor.scalar_type() == wanted, name, " must have the accumulation dtype of the logits");
  }
  double get(int64_t row, int64_t column) const {
    const int64_t i = row * columns_ + column;
    return is_double_ ? static_cast<const double*>(data_)[i] : static_cast<const float*>(data_)[i];
  }
  void set(int64_t row, int64_t column, double value) const {
    const int64_t i = row * columns_ + column;
    if (is_double_) static_cast<double*>(data_)[i] = value;
    else static_cast<float*>(data_)[i] = static_cast<float>(value);
  }
  bool is_zero(int64_t row) const {
    for (int64_t c = 0; c < columns_; ++c)
      if (get(row, c) != 0.0) return false;
    return true;
  }

 private:
  void* data_;
  int64_t columns_;
  bool is_double_;
};

RowState empty_state() {
  RowState state{};
  std::fill_n(state.maximum, kStreams, -kInfinity);
  std::fill_n(state.hole, kValues, -kInfinity);
  return state;
}

void merge(RowState& total, RowState& part) {
  double maximum[kStreams], anchor[kValues];
  for (int s = 0; s < kStreams; ++s) maximum[s] = std::max(total.maximum[s], part.maximum[s]);
  for (int c = 0; c < kValues; ++c)
    anchor[c] = (part.maximum[kBase[c]] > total.maximum[kBase[c]] ? part : total).anchor[c];
  rescale(total, maximum, anchor);
  rescale(part, maximum, anchor);
  for (int s = 0; s < kStreams; ++s) total.sum[s] += part.sum[s];
  for (int c = 0; c < kValues; ++c) {
    total.moment[c] += part.moment[c];
    total.hole[c] = std::max(total.hole[c], part.hole[c]);
  }
}

void finish_row(const Problem& problem, const RowState& state, int64_t row, const Operand& values,
                const Operand& statistics) {
  double log_sum[kStreams], maximum[kStreams], inverse_sum[kStreams], mean[kValues];
  for (int s = 0; s < kStreams; ++s) {
    const bool empty = state.sum[s] == 0.0;
    log_sum[s] = empty ? -kInfinity : std::log(state.sum[s]);
    inverse_sum[s] = empty ? 0.0 : 1.0 / state.sum[s];
    maximum[s] = state.maximum[s] == -kInfinity ? 0.0 : state.maximum[s];
  }
  for (int c = 0; c < kValues; ++c) {
    mean[c] = state.moment[c] * inverse_sum[kBase[c]];
    statistics.set(row, kMean + c, mean[c]);
    if (c > 0) statistics.set(row, kAnchor + c - 1, state.anchor[c]);
  }
  for (int i = 0; i < 2; ++i) {
    statistics.set(row, kMaximum + i, maximum[i ? kP0 : kP]);
    statistics.set(row, kInverseSum + i, inverse_sum[i ? kP0 : kP]);
  }
  // The mean difference, less the same at the base's maximum: log p = -log sum_base there. The mass of a hole counts
  // where it is a positive number of the accumulation dtype, as in the reference.
  const auto divergence = [&](int column) {
    const int base = kBase[column], other = kOther[column];
    if (state.sum[base] == 0.0) return 0.0;
    const double mass = std::exp(state.hole[column] - maximum[base] - log_sum[base]);
    if ((problem.is_double ? mass : static_cast<float>(mass)) > 0.0) return kInfinity;
    return mean[column] - log_sum[base] + (log_sum[other] + (maximum[other] - state.anchor[column]));
  };
  const bool has_prior = problem.settings.decomposition != kMatched;
  const bool has_masked = problem.settings.decomposition != kTeacherPrior;
  values.set(row, kEntropy, state.sum[kP] == 0.0 ? 0.0 : log_sum[kP] - mean[kEntropy]);
  values.set(row, kFull, divergence(kFull));
  values.set(row, kPrior, has_prior ? divergence(kPrior) : 0.0);
  values.set(row, kShift, has_prior && has_masked ? divergence(kShift) : 0.0);
  values.set(row, kMasked, has_masked ? divergence(kMasked) : 0.0);
}

// What one thread does without the others. The arithmetic of a row is that of its segments, whichever it is.
enum Share {
  kRows,  // rows, a segment after the other
  kSegments,  // segments of rows, where there are too few rows for that
  kColumns,  // segments, one row after the other, where sums over the rows are wanted as well
};

struct Walk {
  Share share;
  int64_t rows, vocab, segment, segments;

  Walk(const Problem& problem, bool sums_columns)
      : rows(problem.rows), vocab(problem.settings.vocab_size), segment(sums_columns ? kColumnSegment : kSegment),
        segments((vocab + segment - 1) / segment) {
    const bool few = rows < 2 * static_cast<int64_t>(torch::stable::get_num_threads()) && segments > 1;
    share = sums_columns ? kColumns : few ? kSegments : kRows;
  }

  // Partial results that exist at a time, where those of a row are not all of one thread.
  int64_t parts() const { return share == kRows ? 0 : rows * segments; }
  int64_t part(int64_t row, int64_t index) const { return row * segments + index; }

  // Call `run(index, span)` for all segments of all rows, and then `finish(row)`.
  template <class Run, class Finish>
  void operator()(const Run& run, const Finish& finish) const {
    const auto run_one = [&](int64_t row, int64_t index) {
      const int64_t begin = index * segment, end = std::min(vocab, begin + segment);
      if (share != kColumns) return run(index, Span{row, begin, end, row, end});
      run(index, row + 1 < rows ? Span{row, begin, end, row + 1, begin} : Span{row, begin, end, 0, end});
    };
    if (share == kRows) {
      torch::stable::parallel_for(0, rows, std::max<int64_t>(1, segment / vocab), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t index = 0; index < segments; ++index) run_one(row, index);
          finish(row);
        }
      });
      return;
    }
    if (share == kSegments) {
      torch::stable::parallel_for(0, rows * segments, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run_one(i / segments, i % segments);
      });
    } else {
      torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index)
          for (int64_t row = 0; row < rows; ++row) run_one(row, index);
      });
    }
    for (int64_t row = 0; row < rows; ++row) finish(row);
  }
};

void divergences(const Tensor& student, const Tensor& teacher, const Tensor& masked_teacher,
                 const std::optional<Tensor>& masked_student, const std::optional<Tensor>& token_weights,
                 int64_t decomposition, int64_t vocab_size, double temperature, double student_scale,
                 double teacher_scale, double student_softcap, double teacher_softcap, Tensor values, Tensor statistics) {
  const Problem problem = make_problem(student, teacher, masked_teacher, masked_student,
                                       {static_cast<Decomposition>(decomposition), vocab_size, temperature,
                                        student_scale, teacher_scale, student_softcap, teacher_softcap});
  const DecomposedKLKernels& kernels = vgs::kernels().decomposed_kl;
  const Operand out_values(values, problem.rows, kValues, problem.is_double, "values");
  const Operand out_statistics(statistics, problem.rows, kStatistics, problem.is_double, "statistics");
  std::optional<Operand> weights;
  if (token_weights) weights.emplace(*token_weights, problem.rows, 1, problem.is_double, "token_weights");
  const auto is_skipped = [&](int64_t row) { return weights && weights->is_zero(row); };

  const Walk walk(problem, false);
  std::vector<RowState> parts(walk.parts());
  const auto finish = [&](int64_t row, RowState& state) {
    finish_row(problem, state, row, out_values, out_statistics);
  };
  const auto skip = [&](int64_t row) {
    for (int c = 0; c < kValues; ++c) out_values.set(row, c, 0.0);
    for (int s = 0; s < kStatistics; ++s) out_statistics.set(row, s, 0.0);
  };
  thread_local RowState total, part;
  walk(
      [&](int64_t index, const Span& span) {
        if (is_skipped(span.row)) return;
        RowState& state = parts.empty() ? part : parts[walk.part(span.row, index)];
        state = empty_state();
        kernels.divergences(problem.streams, problem.settings.decomposition, span.row, span.begin, span.end, state);
        if (!parts.empty()) return;
        if (index == 0) total = empty_state();
        merge(total, state);
      },
      [&](int64_t row) {
        if (is_skipped(row)) return skip(row);
        if (!parts.empty()) {
          total = empty_state();
          for (int64_t index = 0; index < walk.segments; ++index) merge(total, parts[walk.part(row, index)]);
        }
        finish(row, total);
      });
}

GradientRow make_gradient_row(const Operand& values, const Operand& statistics, const Operand& coefficients,
                              const std::optional<Operand>& second_coefficients, bool wants_gramian, int64_t row) {
  GradientRow g{};
  for (int i = 0; i < 2; ++i) {
    g.maximum[i ? kP0 : kP] = statistics.get(row, kMaximum + i);
    g.inverse_sum[i ? kP0 : kP] = statistics.get(row, kInverseSum + i);
  }
  for (int c = 0; c < kValues; ++c) {
    const double value = values.get(row, c);
    const double weight = coefficients.get(row, c);
    const double second = second_coefficients ? second_coefficients->get(row, c) : 0.0;
    const bool unused = weight == 0.0 && second == 0.0 && !wants_gramian;
    g.absent[c] = std::isinf(value) || (std::isnan(value) && unused);
    if (g.absent[c]) continue;
    g.weight[c] = weight;
    g.second_weight[c] = second;
    g.mean[c] = statistics.get(row, kMean + c);
    if (c > 0) g.anchor[c] = statistics.get(row, kAnchor + c - 1);
  }
  return g;
}

struct Output {
  char* data = nullptr;
  int64_t row_bytes = 0, width = 0, size = 0;

  Output() = default;
  Output(const Tensor& tensor, const Problem& problem, Element element, const char* name)
      : data(static_cast<char*>(tensor.data_ptr())), width(tensor.size(1)), size(element_size(element)) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == problem.rows && width >= problem.settings.vocab_size, name,
                    " must have ", problem.rows, " rows of at least ", problem.settings.vocab_size, " entries");
    STD_TORCH_CHECK(tensor.stride(1) == 1 || width == 1, name, " must have unit stride along the vocabulary");
    STD_TORCH_CHECK(element_of(tensor, name) == element, name, " must have the dtype of out_student");
    row_bytes = tensor.stride(0) * size;
  }
  void* row(int64_t index) const { return data ? data + index * row_bytes : nullptr; }
  void zero(int64_t index, int64_t from) const {
    if (data) std::memset(data + index * row_bytes + from * size, 0, (width - from) * size);
  }
};

void logit_gradients(const Tensor& student, const Tensor& teacher, const Tensor& masked_teacher,
                     const std::optional<Tensor>& masked_student, const Tensor& values, const Tensor& statistics,
                     const Tensor& coefficients, const std::optional<Tensor>& second_coefficients,
                     int64_t decomposition, int64_t vocab_size, double temperature, double student_scale,
                     double teacher_scale, double student_softcap, double teacher_softcap, Tensor out_student,
                     std::optional<Tensor> out_masked_student, std::optional<Tensor> out_second,
                     std::optional<Tensor> row_gramian, std::optional<Tensor> column_squares) {
  const Problem problem = make_problem(student, teacher, masked_teacher, masked_student,
                                       {static_cast<Decomposition>(decomposition), vocab_size, temperature,
                                        student_scale, teacher_scale, student_softcap, teacher_softcap});
  STD_TORCH_CHECK(out_second.has_value() == second_coefficients.has_value(),
                  "out_second and second_coefficients must be given together");
  STD_TORCH_CHECK(!out_masked_student || masked_student, "out_masked_student needs masked_student");
  const DecomposedKLKernels& kernels = vgs::kernels().decomposed_kl;
  const bool is_double = problem.is_double;
  const Operand in_values(values, problem.rows, kValues, is_double, "values");
  const Operand in_statistics(statistics, problem.rows, kStatistics, is_double, "statistics");
  const Operand in_coefficients(coefficients, problem.rows, kValues, is_double, "coefficients");
  std::optional<Operand> in_second, gramian;
  if (second_coefficients) in_second.emplace(*second_coefficients, problem.rows, kValues, is_double, "second_coefficients");
  if (row_gramian) gramian.emplace(*row_gramian, problem.rows, 3, is_double, "row_gramian");
  const Element element = element_of(out_student, "out_student");
  const Output outputs[kOutputs] = {
      Output(out_student, problem, element, "out_student"),
      out_masked_student ? Output(*out_masked_student, problem, element, "out_masked_student") : Output(),
      out_second ? Output(*out_second, problem, element, "out_second") : Output()};
  GradientOutputs row_outputs{{}, {}, element};
  if (column_squares) {
    float* squares = static_cast<float*>(column_squares->data_ptr());
    const int64_t vocab = problem.settings.vocab_size, given = 1 + out_masked_student.has_value() + out_second.has_value();
    STD_TORCH_CHECK(column_squares->is_contiguous() && column_squares->numel() == given * vocab &&
                        element_of(*column_squares, "column_squares") == kFloat32,
                    "column_squares must be contiguous float32, with ", given, " rows of ", vocab, " entries");
    std::fill_n(squares, given * vocab, 0.0f);
    for (int i = 0; i < kOutputs; ++i)
      if (outputs[i].data) row_outputs.squares[i] = squares, squares += vocab;
  }
  const auto is_skipped = [&](int64_t row) {
    return in_coefficients.is_zero(row) && (!in_second || in_second->is_zero(row));
  };

  struct Gram { double sums[3]; };
  const Walk walk(problem, column_squares.has_value());
  std::vector<Gram> parts(gramian ? walk.parts() : 0);
  thread_local Gram total;
  walk(
      [&](int64_t index, const Span& span) {
        if (is_skipped(span.row)) return;
        Gram part{};
        GradientOutputs out = row_outputs;
        for (int i = 0; i < kOutputs; ++i) out.row[i] = outputs[i].row(span.row);
        kernels.gradients(
            problem.streams, problem.settings.decomposition,
            make_gradient_row(in_values, in_statistics, in_coefficients, in_second, gramian.has_value(), span.row),
            span, out, gramian ? part.sums : nullptr);
        if (!gramian) return;
        if (!parts.empty()) {
          parts[walk.part(span.row, index)] = part;
          return;
        }
        if (index == 0) total = Gram{};
        for (int i = 0; i < 3; ++i) total.sums[i] += part.sums[i];
      },
      [&](int64_t row) {
        const bool skipped = is_skipped(row);
        for (const Output& output : outputs) output.zero(row, skipped ? 0 : problem.settings.vocab_size);
        if (!gramian) return;
        if (!parts.empty() || skipped) total = Gram{};
        if (!parts.empty() && !skipped)
          for (int64_t index = 0; index < walk.segments; ++index)
            for (int i = 0; i < 3; ++i) total.sums[i] += parts[walk.part(row, index)].sums[i];
        for (int i = 0; i < 3; ++i) gramian->set(row, i, total.sums[i]);
      });
}

}  // namespace

}  // namespace vgs

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CPU, m) {
  m.impl("divergences", TORCH_BOX(&vgs::divergences));
  m.impl("logit_gradients", TORCH_BOX(&vgs::logit_gradients));
}
