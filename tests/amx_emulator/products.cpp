// The products on the matrix unit against sums in double, over the emulated tiles: logits of every dtype, with a bias and
// without, aligned and not; products of gathered rows, written and added.
#include "amx_emulator.h"

#include "cpu/products_amx.cpp"

#include <math.h>

#include <algorithm>
#include <random>
#include <type_traits>
#include <vector>

using namespace vgs;

std::mt19937 generator(0);
int failures = 0;

uint16_t half_of(float value) {
  BFloat16 entries[Simd<float>::kLanes];
  narrow(entries, FloatVec{} + value);
  return entries[0].bits;
}

float value_of(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

float value_of(float value) { return value; }

std::vector<uint16_t> normal(int64_t size) {
  std::normal_distribution<float> distribution;
  std::vector<uint16_t> made(size);
  for (uint16_t& entry : made) entry = half_of(distribution(generator));
  return made;
}

// Memory from a cache line on, `offset` entries further.
template <class T>
struct Aligned {
  T* memory;
  T* data;

  explicit Aligned(int64_t size, int64_t offset = 0)
      : memory(static_cast<T*>(aligned_alloc(64, ((size + offset) * sizeof(T) + 127) / 64 * 64))), data(memory + offset) {
    std::fill_n(reinterpret_cast<unsigned char*>(data), size * sizeof(T), 0xff);  // NaN of any dtype
  }
  ~Aligned() { free(memory); }
};

void expect(bool condition, const char* what, int64_t a, int64_t b, int64_t c) {
  if (condition) return;
  ++failures;
  printf("%s of %lld, %lld, %lld is wrong\n", what, (long long)a, (long long)b, (long long)c);
}

template <class Out>
void check_logits(int64_t n, int64_t vocab, int64_t width, int64_t padding, bool has_bias) {
  const int64_t stride = vocab + padding;
  const auto hidden = normal(n * width), weight = normal((vocab + 32) * width);
  std::vector<float> bias(vocab);
  for (float& entry : bias) entry = value_of(normal(1)[0]);
  Aligned<uint16_t> panels((n + 31) / 32 * 32 * width);
  Aligned<float> scratch(amx::scratch_size(n));
  Aligned<Out> out(n * stride, padding);
  amx::pack_hidden(hidden.data(), width, n, width, panels.data);
  const Element element = std::is_same_v<Out, float> ? kFloat32 : kBFloat16;
  const int64_t middle = vocab / 64 * 32;  // as two threads share it
  amx::logits(panels.data, weight.data(), width, n, width, has_bias ? bias.data() : nullptr, out.data, element, stride, 0,
              middle, scratch.data);
  amx::logits(panels.data, weight.data(), width, n, width, has_bias ? bias.data() : nullptr, out.data, element, stride,
              middle, vocab, scratch.data);
  bool right = true;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t v = 0; v < stride; ++v) {
      const double found = value_of(out.data[i * stride + v]);
      if (v >= vocab) {
        right &= std::isnan(found) || i + 1 == n;
        continue;
      }
      double exact = has_bias ? bias[v] : 0.0;
      for (int64_t w = 0; w < width; ++w)
        exact += static_cast<double>(value_of(hidden[i * width + w])) * value_of(weight[v * width + w]);
      right &= std::fabs(found - exact) <= 1e-4 + std::fabs(exact) * (sizeof(Out) == 4 ? 1e-6 : 1.0 / 256);
    }
  expect(right, sizeof(Out) == 4 ? "float32 logits" : "bfloat16 logits", n, vocab, width);
}

void check_gathered(int64_t n, int64_t count, int64_t width, bool adds) {
  const int64_t padded = (n + 31) / 32 * 32, bands = (count + amx::kGathered - 1) / amx::kGathered, rows = 3 * count + 1;
  const auto left = normal(n * count), right = normal(rows * width);
  Aligned<uint16_t> arranged(std::max<int64_t>(1, bands) * padded * amx::kGathered), tiles(amx::gathered_tiles());
  Aligned<float> sums(amx::gathered_sums(padded));
  std::fill_n(arranged.data, bands * padded * amx::kGathered, 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < count; ++k)
      arranged.data[(k / amx::kGathered * padded + i) * amx::kGathered + k % amx::kGathered] = left[i * count + k];
  std::vector<int64_t> gathered(count), into(n);
  for (int64_t k = 0; k < count; ++k) gathered[k] = 3 * k + 1;
  for (int64_t i = 0; i < n; ++i) into[i] = 2 * i;
  auto out = normal(2 * n * width);
  const auto before = out;
  amx::gathered_product(arranged.data, right.data(), width, gathered.data(), count, n, out.data(), width,
                        adds ? into.data() : nullptr, 0, width, sums.data, tiles.data);
  bool correct = true;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t w = 0; w < width; ++w) {
      const int64_t at = (adds ? into[i] : i) * width + w;
      double exact = adds ? value_of(before[at]) : 0.0;
      for (int64_t k = 0; k < count; ++k)
        exact += static_cast<double>(value_of(left[i * count + k])) * value_of(right[gathered[k] * width + w]);
      correct &= std::fabs(value_of(out[at]) - exact) <= 1e-4 + std::fabs(exact) / 256;
    }
  expect(correct, adds ? "an added gathered product" : "a gathered product", n, count, width);
}

int main() {
  for (const bool has_bias : {false, true})
    for (const int64_t padding : {0, 3}) {
      check_logits<float>(1, 1, 32, padding, has_bias);
      check_logits<float>(33, 96, 320, padding, has_bias);
      check_logits<float>(64, 83, 544, padding, has_bias);
      check_logits<uint16_t>(33, 96, 320, padding, has_bias);
      check_logits<uint16_t>(20, 83, 64, padding, has_bias);
    }
  for (const bool adds : {false, true}) {
    check_gathered(1, 0, 32, adds);
    check_gathered(5, 33, 1056, adds);
    check_gathered(33, 300, 64, adds);
  }
  if (failures == 0) printf("all cases passed\n");
  return failures != 0;
}
