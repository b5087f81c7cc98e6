// Runs the kernels of gradient_gramian and combine_gradients in the emulator, over several schedules, and compares with
// fp64. Exits with 1 and a message at the first failure. Built by tests/test_gradient_gramian_cuda.py, which also builds
// it over kernels with planted mistakes.
#define VGS_CUDA_EMULATOR
#include <math.h>
#include <stdio.h>

#include "cuda/combine_gradients.cuh"
#include "cuda/gradient_gramian.cuh"

namespace {

using namespace vgs;
using emulator::Error;
using emulator::Schedule;

constexpr Schedule kSchedules[] = {Schedule::kAscending, Schedule::kDescending, Schedule::kShuffled};
constexpr double kEpsilon[] = {1.2e-7, 7.8e-3, 9.8e-4, 2.3e-16};  // by Element

// A tensor that ends where its allocation does, `offset` entries after a multiple of 16 bytes.
class Array {
 public:
  Array(Element element, int64_t size, int64_t offset, unsigned seed)
      : element_(element), storage_(new char[cuda::size_of(element) * (size + offset)]) {
    data_ = storage_.get() + cuda::size_of(element) * offset;
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < size; ++i) cuda::write_entry<double>(data_, element, i, normal(random));
  }
  void* data() const { return data_; }
  double get(int64_t i) const { return cuda::read_entry<double>(data_, element_, i); }
  void set(int64_t i, double value) { cuda::write_entry<double>(data_, element_, i, value); }

 private:
  Element element_;
  std::unique_ptr<char[]> storage_;
  char* data_;
};

struct Spec {
  int64_t size;
  Element lang, vis, out;
  int64_t lang_offset = 0, vis_offset = 0, out_offset = 0;
  bool has_lang = true, has_vis = true, in_place = false;
};

struct Problem {
  std::vector<Array> lang, vis, out;
  std::vector<GradientPair> pairs;

  explicit Problem(const std::vector<Spec>& specs) {
    unsigned seed = 0;
    for (const Spec& spec : specs) {
      lang.emplace_back(spec.lang, spec.size, spec.lang_offset, ++seed);
      vis.emplace_back(spec.vis, spec.size, spec.vis_offset, ++seed);
      out.emplace_back(spec.out, spec.size, spec.out_offset, ++seed);
      GradientPair pair{};
      if (spec.has_lang) pair.lang = lang.back().data();
      if (spec.has_vis) pair.vis = vis.back().data();
      pair.out = spec.in_place ? lang.back().data() : out.back().data();
      pair.size = spec.size;
      pair.lang_element = spec.lang;
      pair.vis_element = spec.vis;
      pair.out_element = spec.in_place ? spec.lang : spec.out;
      pairs.push_back(pair);
    }
  }
};

void expect(bool condition, const std::string& message) {
  if (!condition) throw Error(message);
}

template <class Acc>
void check_products(Problem& problem, Schedule schedule, const char* name) {
  for (GradientPair& pair : problem.pairs) pair.out = nullptr;
  double exact[3] = {}, size[3] = {};
  for (size_t t = 0; t < problem.pairs.size(); ++t) {
    for (int64_t i = 0; i < problem.pairs[t].size; ++i) {
      const double x = problem.pairs[t].lang ? problem.lang[t].get(i) : 0.0;
      const double y = problem.pairs[t].vis ? problem.vis[t].get(i) : 0.0;
      const double products[3] = {x * x, x * y, y * y};
      for (int k = 0; k < 3; ++k) exact[k] += products[k], size[k] += fabs(products[k]);
    }
  }
  const int64_t chunk = chunk_size(problem.pairs);
  int64_t chunks = 0;
  for (const GradientPair& pair : problem.pairs) chunks += chunks_of(pair, chunk);
  std::vector<double> parts(3 * chunks, NAN);
  const int64_t done = cuda::for_each_table(problem.pairs, [&](const cuda::Table& table, int blocks, int64_t first) {
    emulator::launch(blocks, cuda::kThreads, schedule,
                     [&] { cuda::chunk_products<Acc>(table, parts.data() + 3 * first); });
  });
  expect(done == chunks, "the tables hold " + std::to_string(done) + " chunks of " + std::to_string(chunks));
  Acc result[3] = {NAN, NAN, NAN};
  emulator::launch(1, cuda::kThreads, schedule, [&] { cuda::sum_of_chunks<Acc>(parts.data(), chunks, result); });
  const double allowed = sizeof(Acc) == 8 ? 1e-13 : 1e-6;
  for (int k = 0; k < 3; ++k)
    expect(fabs(result[k] - exact[k]) <= allowed * size[k], std::string(name) + ": product " + std::to_string(k) + " is " +
                                                                std::to_string(result[k]) + ", not " + std::to_string(exact[k]));
}

template <class Acc>
void check_combination(Problem& problem, Schedule schedule, Acc u, Acc v, const char* name) {
  std::vector<std::vector<double>> exact;
  for (size_t t = 0; t < problem.pairs.size(); ++t) {
    exact.emplace_back();
    for (int64_t i = 0; i < problem.pairs[t].size; ++i) {
      const double x = problem.pairs[t].lang && u != 0 ? u * problem.lang[t].get(i) : 0.0;
      const double y = problem.pairs[t].vis && v != 0 ? v * problem.vis[t].get(i) : 0.0;
      exact.back().push_back(x + y);
    }
  }
  const std::unique_ptr<Acc[]> weights(new Acc[2]{u, v});
  cuda::for_each_table(problem.pairs, [&](const cuda::Table& table, int blocks, int64_t) {
    emulator::launch(blocks, cuda::kThreads, schedule, [&] { cuda::combine_chunks<Acc>(table, weights.get()); });
  });
  for (size_t t = 0; t < problem.pairs.size(); ++t) {
    const GradientPair& pair = problem.pairs[t];
    for (int64_t i = 0; i < pair.size; ++i) {
      const double found = cuda::read_entry<double>(pair.out, pair.out_element, i);
      const double unit = std::max(kEpsilon[pair.out_element], sizeof(Acc) == 8 ? 2.3e-16 : 1.2e-7);
      expect(fabs(found - exact[t][i]) <= unit * (fabs(exact[t][i]) + 2 * (fabs(u) + fabs(v))),
             std::string(name) + ": entry " + std::to_string(i) + " of tensor " + std::to_string(t) + " is " +
                 std::to_string(found) + ", not " + std::to_string(exact[t][i]));
    }
  }
}

template <class Acc>
void check(const char* name, const std::vector<Spec>& specs) {
  for (const Schedule schedule : kSchedules) {
    Problem products(specs);
    check_products<Acc>(products, schedule, name);
    Problem combination(specs);
    check_combination<Acc>(combination, schedule, Acc(0.3), Acc(-0.7), name);
  }
}

void check_dropped_component() {
  Problem problem({{4099, kFloat32, kBFloat16, kFloat32}});
  for (int64_t i = 0; i < 4099; ++i) problem.lang[0].set(i, i % 2 ? NAN : INFINITY);
  check_combination<float>(problem, Schedule::kAscending, 0.0f, 0.7f, "a component of weight 0");
}

void check_determinism() {
  // In float, where another order would show.
  Problem problem({{70001, kFloat32, kFloat32, kFloat32}, {4099, kFloat32, kFloat32, kFloat32, 1, 1, 1}});
  std::vector<double> results;
  for (const Schedule schedule : kSchedules) {
    std::vector<double> parts(9);
    cuda::for_each_table(problem.pairs, [&](const cuda::Table& table, int blocks, int64_t first) {
      emulator::launch(blocks, cuda::kThreads, schedule,
                       [&] { cuda::chunk_products<float>(table, parts.data() + 3 * first); });
    });
    for (const double part : parts) results.push_back(part);
  }
  for (size_t i = 0; i < results.size(); ++i) expect(results[i] == results[i % 9], "the result depends on the schedule");
}

}  // namespace

int main() {
  try {
    // Sizes around a group, around what a block reads at once, and past a chunk.
    check<float>("float32", {{1, kFloat32, kFloat32, kFloat32}, {7, kFloat32, kFloat32, kFloat32},
                             {4099, kFloat32, kFloat32, kFloat32}, {65536 + 13, kFloat32, kFloat32, kFloat32}});
    check<float>("bfloat16", {{9, kBFloat16, kBFloat16, kBFloat16}, {4111, kBFloat16, kBFloat16, kBFloat16}});
    check<float>("float16", {{4111, kFloat16, kFloat16, kFloat16}});
    check<double>("float64", {{2, kFloat64, kFloat64, kFloat64}, {4099, kFloat64, kFloat64, kFloat64, 1, 1, 1}});
    check<float>("mixed", {{4099, kBFloat16, kFloat32, kFloat16}, {1000, kFloat16, kBFloat16, kFloat64}});
    check<float>("unaligned alike", {{4099, kBFloat16, kBFloat16, kBFloat16, 3, 3, 3}});
    check<float>("unaligned apart", {{4099, kFloat32, kFloat32, kFloat32, 1, 2, 3}});
    check<float>("None", {{300, kFloat32, kFloat32, kFloat32, 0, 0, 0, false, true},
                          {300, kFloat32, kFloat32, kFloat32, 0, 0, 0, true, false},
                          {300, kFloat32, kFloat32, kFloat32, 0, 0, 0, false, false}});
    check<float>("in place", {{4099, kFloat32, kFloat32, kFloat32, 1, 1, 0, true, true, true}});
    check<float>("no tensor", {});
    check_dropped_component();
    check_determinism();
  } catch (const std::exception& error) {
    printf("FAILED: %s\n", error.what());
    return 1;
  }
  printf("all cases passed\n");
  return 0;
}
