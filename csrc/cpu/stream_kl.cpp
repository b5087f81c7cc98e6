// CPU implementation of stream_kl: checks, threads, and the arithmetic of whole rows. The loops over the vocabulary are in
// stream_kl_kernels.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace vgs::stream_kl {
namespace {

using torch::stable::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Settings {
  int64_t vocab_size;
  double temperature, student_scale, teacher_scale, student_softcap, teacher_softcap, ratio_bound, ratio_floor;
  double teacher_smoothing;

  bool guards() const { return ratio_bound != 0.0 || ratio_floor != 0.0; }
};

struct Problem {
  Streams streams;
  Settings settings;
  int64_t rows;
  bool is_double;

  bool guarded() const { return streams.kind == kVisual && settings.guards(); }
};

Stream make_stream(const Tensor& logits, double scale, double softcap, double temperature) {
  if (softcap == 0.0) return {logits.data_ptr(), logits.stride(0), scale / temperature, 0.0, 0.0, 0.0, nullptr};
  return {logits.data_ptr(), logits.stride(0), scale, scale / softcap, softcap / temperature, 0.0, nullptr};
}

Problem make_problem(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& masked_teacher,
                     const std::optional<Tensor>& masked_student, const Tensor& statistics, const Settings& settings) {
  STD_TORCH_CHECK(masked_teacher || !masked_student, "masked_student needs masked_teacher");
  Problem problem{};
  problem.settings = settings;
  problem.rows = student.size(0);
  problem.streams.element = element_of(student, "student");
  problem.streams.kind = masked_student ? kVisual : masked_teacher ? kPrior : kReverse;
  problem.is_double = problem.streams.element == kFloat64;
  const Tensor* tensors[kStreams] = {&student, &teacher, masked_teacher ? &*masked_teacher : nullptr,
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
    if (!is_teacher) continue;
    problem.streams.stream[s].share = settings.teacher_smoothing / static_cast<double>(settings.vocab_size);
    problem.streams.stream[s].normalizer =
        static_cast<const char*>(statistics.data_ptr()) + (kNormalizer + s - kQ) * (problem.is_double ? 8 : 4);
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
  state.target_maximum = -kInfinity;
  return state;
}

void merge(Kind kind, RowState& total, RowState& part) {
  double maximum[kStreams], anchor[kAnchors];
  for (int s = 0; s < kStreams; ++s) maximum[s] = std::max(total.maximum[s], part.maximum[s]);
  for (int a = 0; a < kAnchors; ++a)
    anchor[a] = (part.maximum[kAnchoredAt[a]] > total.maximum[kAnchoredAt[a]] ? part : total).anchor[a];
  rescale(total, kind, maximum, anchor);
  rescale(part, kind, maximum, anchor);
  raise_target(total, part.target_maximum);
  raise_target(part, total.target_maximum);
  for (int s = 0; s < kStreams; ++s) total.sum[s] += part.sum[s];
  for (int c = 0; c < kValues; ++c) {
    total.moment[c] += part.moment[c];
    total.hole[c] = std::max(total.hole[c], part.hole[c]);
  }
  total.target_sum += part.target_sum;
  total.improper |= part.improper;
}

// The results of a row from its sums. Those of a guarded q* are not among them: see `finish_target`.
class Finished {
 public:
  Finished(const Problem& problem, const RowState& state) : problem_(problem), state_(state) {
    for (int s = 0; s < kStreams; ++s) {
      const bool empty = state.sum[s] == 0.0;
      log_sum_[s] = empty ? -kInfinity : std::log(state.sum[s]);
      maximum_[s] = state.maximum[s] == -kInfinity ? 0.0 : state.maximum[s];
    }
  }

  double maximum(int s) const { return maximum_[s]; }
  double inverse_sum(int s) const { return state_.sum[s] == 0.0 ? 0.0 : 1.0 / state_.sum[s]; }
  double mean(int column) const { return state_.moment[column] * inverse_sum(kBase[column]); }
  double entropy() const { return state_.sum[kP] == 0.0 ? 0.0 : log_sum_[kP] - mean(kEntropy); }

  // Of log sum exp of the other stream's distances from its anchor.
  double divergence(int column, double log_sum_of_distances) const {
    const int base = kBase[column];
    if (state_.sum[base] == 0.0) return 0.0;
    const double mass = std::exp(state_.hole[column] - maximum_[base] - log_sum_[base]);
    if (mass >= smallest_mass()) return kInfinity;
    // The mean difference, less the same at the base's maximum: log p = -log sum_base there.
    return mean(column) - log_sum_[base] + log_sum_of_distances;
  }
  double distances(int s, int anchor) const { return log_sum_[s] + (maximum_[s] - state_.anchor[anchor]); }
  double target_divergence() const {
    if (state_.improper) return kInfinity;
    const bool empty = state_.target_sum == 0.0;
    return divergence(kThird, empty ? -kInfinity : std::log(state_.target_sum) + state_.target_maximum);
  }

 private:
  double smallest_mass() const {
    return problem_.is_double ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  }

  const Problem& problem_;
  const RowState& state_;
  double log_sum_[kStreams], maximum_[kStreams];
};

void finish_row(const Problem& problem, const RowState& state, int64_t row, const Operand& values,
                const Operand& statistics) {
  const Finished finished(problem, state);
  const Kind kind = problem.streams.kind;
  const bool has_target = kind == kVisual && !problem.guarded();
  values.set(row, kEntropy, finished.entropy());
  values.set(row, kStandard, finished.divergence(kStandard, finished.distances(kQ, kQAtP)));
  values.set(row, kThird, kind == kPrior ? finished.divergence(kThird, finished.distances(kR, kRAtP))
                          : has_target   ? finished.target_divergence()
                                         : 0.0);
  values.set(row, kLanguage, kind == kVisual ? finished.divergence(kLanguage, finished.distances(kR, kRAtP0)) : 0.0);
  values.set(row, kDependency, kind == kVisual ? finished.divergence(kDependency, finished.distances(kR, kRAtQ)) : 0.0);
  statistics.set(row, kMaximum, finished.maximum(kP));
  statistics.set(row, kInverseSum, finished.inverse_sum(kP));
  for (int c = 0; c < kCoefficients; ++c) statistics.set(row, kMean + c, finished.mean(c));
  for (int s = kQ; s < kStreams; ++s) {
    const bool given = problem.streams.stream[s].data;
    const int anchor = kQAtP + s - kQ;
    statistics.set(row, kAnchor + s - kQ, state.anchor[anchor]);
    statistics.set(row, kLogSum + s - kQ, given ? finished.distances(s, anchor) : 0.0);
    if (s != kP0) statistics.set(row, kTop + s - kQ, given ? state.maximum[s] - state.anchor[anchor] : 0.0);
  }
}

// How the distance of q* is formed in a row whose statistics are known.
Target target_of(const Problem& problem, const Operand& statistics, int64_t row) {
  Target target{};
  for (int i = 0; i < 3; ++i) target.anchor[i] = statistics.get(row, kAnchor + i);
  target.guarded = problem.guarded();
  if (!target.guarded) return target;
  const double ratio = statistics.get(row, kLogSum + 2) - statistics.get(row, kLogSum + 1);
  target.log_ratio = std::isinf(ratio) ? 0.0 : ratio;  // of a stream without mass: what it has is -inf anyway
  const Settings& settings = problem.settings;
  target.bound = settings.ratio_bound == 0.0 ? kInfinity : settings.ratio_bound;
  target.least = settings.ratio_floor == 0.0 ? -kInfinity
                                             : statistics.get(row, kTop) + std::log(settings.ratio_floor);
  return target;
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

// Form the state of every row that is not skipped, by `run(row, begin, end, state)` from `begin_row(row)`, and hand it to
// `finish(row, state)`.
template <class IsSkipped, class Begin, class Run, class Finish>
void for_each_state(const Problem& problem, const IsSkipped& is_skipped, const Begin& begin_row, const Run& run,
                    const Finish& finish) {
  const Walk walk(problem, false);
  const Kind kind = problem.streams.kind;
  std::vector<RowState> parts(walk.parts());
  thread_local RowState total, part;
  walk(
      [&](int64_t index, const Span& span) {
        if (is_skipped(span.row)) return;
        RowState& state = parts.empty() ? part : parts[walk.part(span.row, index)];
        state = begin_row(span.row);
        run(span.row, span.begin, span.end, state);
        if (!parts.empty()) return;
        if (index == 0) total = begin_row(span.row);
        merge(kind, total, state);
      },
      [&](int64_t row) {
        if (is_skipped(row)) return;
        if (!parts.empty()) {
          total = begin_row(row);
          for (int64_t index = 0; index < walk.segments; ++index) merge(kind, total, parts[walk.part(row, index)]);
        }
        finish(row, total);
      });
}

void stream_divergences(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& masked_teacher,
                        const std::optional<Tensor>& masked_student, const std::optional<Tensor>& token_weights,
                        int64_t vocab_size, double temperature, double student_scale, double teacher_scale,
                        double student_softcap, double teacher_softcap, double ratio_bound, double ratio_floor,
                        double teacher_smoothing, Tensor values, Tensor statistics) {
  const Problem problem = make_problem(student, teacher, masked_teacher, masked_student, statistics,
                                       {vocab_size, temperature, student_scale, teacher_scale, student_softcap,
                                        teacher_softcap, ratio_bound, ratio_floor, teacher_smoothing});
  const StreamKLKernels& kernels = vgs::kernels().stream_kl;
  const Operand out_values(values, problem.rows, kValues, problem.is_double, "values");
  const Operand out_statistics(statistics, problem.rows, kStatistics, problem.is_double, "statistics");
  std::optional<Operand> weights;
  if (token_weights) weights.emplace(*token_weights, problem.rows, 1, problem.is_double, "token_weights");
  const auto is_skipped = [&](int64_t row) { return weights && weights->is_zero(row); };
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (!is_skipped(row)) continue;
    for (int c = 0; c < kValues; ++c) out_values.set(row, c, 0.0);
    for (int s = 0; s < kStatistics; ++s) out_statistics.set(row, s, 0.0);
  }

  for_each_state(
      problem, is_skipped, [](int64_t) { return empty_state(); },
      [&](int64_t row, int64_t begin, int64_t end, RowState& state) {
        kernels.divergences(problem.streams, !problem.guarded(), row, begin, end, state);
      },
      [&](int64_t row, const RowState& state) { finish_row(problem, state, row, out_values, out_statistics); });
  if (!problem.guarded()) return;
  // A guarded q* is known only with the log sums of p0 and r: a second walk.
  for_each_state(
      problem, is_skipped,
      [&](int64_t row) {
        RowState state = empty_state();
        state.maximum[kP] = out_statistics.get(row, kMaximum);
        return state;
      },
      [&](int64_t row, int64_t begin, int64_t end, RowState& state) {
        kernels.target(problem.streams, target_of(problem, out_statistics, row), row, begin, end, state);
      },
      [&](int64_t row, RowState& state) {
        const double inverse_sum = out_statistics.get(row, kInverseSum);
        state.sum[kP] = inverse_sum == 0.0 ? 0.0 : 1.0 / inverse_sum;
        const Finished finished(problem, state);
        out_values.set(row, kThird, finished.target_divergence());
        out_statistics.set(row, kMean + static_cast<int>(kThird), finished.mean(kThird));
      });
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
    STD_TORCH_CHECK(element_of(tensor, name) == element, name, " must have the dtype of out");
    row_bytes = tensor.stride(0) * size;
  }
  void* row(int64_t index) const { return data ? data + index * row_bytes : nullptr; }
  void zero(int64_t index, int64_t from) const {
    if (data) std::memset(data + index * row_bytes + from * size, 0, (width - from) * size);
  }
};

GradientRow make_gradient_row(const Problem& problem, const Operand& values, const Operand& statistics,
                              const Operand* const coefficients[2], int64_t row) {
  GradientRow g{};
  g.maximum = statistics.get(row, kMaximum);
  g.inverse_sum = statistics.get(row, kInverseSum);
  g.target = target_of(problem, statistics, row);
  bool used[kCoefficients];
  for (int c = 0; c < kCoefficients; ++c) {
    // Towards an infinite value there is no direction.
    const bool counts = !std::isinf(values.get(row, c));
    for (int i = 0; i < 2; ++i) g.weight[i][c] = counts && coefficients[i] ? coefficients[i]->get(row, c) : 0.0;
    used[c] = g.weight[0][c] != 0.0 || g.weight[1][c] != 0.0;
    g.mean[c] = used[c] ? statistics.get(row, kMean + c) : 0.0;
  }
  g.uses_standard = used[kStandard];
  g.uses_third = used[kThird] && problem.streams.kind != kReverse;
  return g;
}

void stream_gradients(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& masked_teacher,
                      const std::optional<Tensor>& masked_student, const Tensor& values, const Tensor& statistics,
                      const Tensor& coefficients, const std::optional<Tensor>& second_coefficients, int64_t vocab_size,
                      double temperature, double student_scale, double teacher_scale, double student_softcap,
                      double teacher_softcap, double ratio_bound, double ratio_floor, double teacher_smoothing, Tensor out,
                      std::optional<Tensor> out_second, std::optional<Tensor> column_squares) {
  const Problem problem = make_problem(student, teacher, masked_teacher, masked_student, statistics,
                                       {vocab_size, temperature, student_scale, teacher_scale, student_softcap,
                                        teacher_softcap, ratio_bound, ratio_floor, teacher_smoothing});
  STD_TORCH_CHECK(out_second.has_value() == second_coefficients.has_value(),
                  "out_second and second_coefficients must be given together");
  const StreamKLKernels& kernels = vgs::kernels().stream_kl;
  const bool is_double = problem.is_double;
  const Operand in_values(values, problem.rows, kValues, is_double, "values");
  const Operand in_statistics(statistics, problem.rows, kStatistics, is_double, "statistics");
  const Operand in_coefficients(coefficients, problem.rows, kCoefficients, is_double, "coefficients");
  std::optional<Operand> in_second;
  if (second_coefficients)
    in_second.emplace(*second_coefficients, problem.rows, kCoefficients, is_double, "second_coefficients");
  const Operand* const of_objectives[2] = {&in_coefficients, in_second ? &*in_second : nullptr};
  const Element element = element_of(out, "out");
  const Output outputs[2] = {Output(out, problem, element, "out"),
                             out_second ? Output(*out_second, problem, element, "out_second") : Output()};
  GradientOutputs shared{{}, {}, element};
  if (column_squares) {
    float* const squares = static_cast<float*>(column_squares->data_ptr());
    const int64_t given = out_second ? 2 : 1;
    STD_TORCH_CHECK(column_squares->is_contiguous() && column_squares->numel() == given * vocab_size &&
                        element_of(*column_squares, "column_squares") == kFloat32,
                    "column_squares must be contiguous float32, with ", given, " rows of ", vocab_size, " entries");
    std::fill_n(squares, given * vocab_size, 0.0f);
    for (int64_t i = 0; i < given; ++i) shared.squares[i] = squares + i * vocab_size;
  }
  const auto is_skipped = [&](int64_t row) {
    return in_coefficients.is_zero(row) && (!in_second || in_second->is_zero(row));
  };

  const Walk walk(problem, column_squares.has_value());
  walk(
      [&](int64_t, const Span& span) {
        if (is_skipped(span.row)) return;
        GradientOutputs here = shared;
        for (int i = 0; i < 2; ++i) here.row[i] = outputs[i].row(span.row);
        kernels.gradients(problem.streams,
                          make_gradient_row(problem, in_values, in_statistics, of_objectives, span.row), span, here);
      },
      [&](int64_t row) {
        for (const Output& output : outputs) output.zero(row, is_skipped(row) ? 0 : vocab_size);
      });
}

}  // namespace
}  // namespace vgs::stream_kl

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CPU, m) {
  m.impl("stream_divergences", TORCH_BOX(&vgs::stream_kl::stream_divergences));
  m.impl("stream_gradients", TORCH_BOX(&vgs::stream_kl::stream_gradients));
}
