// Which instruction-set level runs.
#include <atomic>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"

namespace vgs {
namespace {

std::atomic<int> level_in_force{-1};  // -1: the highest

int level() {
  const int chosen = level_in_force.load(std::memory_order_relaxed);
  return chosen < 0 ? highest_level() : chosen;
}

void set_cpu_level(int64_t level) {
  STD_TORCH_CHECK(level >= 0 && level <= highest_level(), "this CPU or build has instruction-set levels 0 to ",
                  highest_level(), ", level ", level, " was asked for");
  level_in_force = static_cast<int>(level);
}

int64_t cpu_level() { return level(); }
int64_t highest_cpu_level() { return highest_level(); }

}  // namespace

int highest_level() {
  static const int level = [] {
#if defined(VGS_HAVE_AVX512) || defined(VGS_HAVE_AVX2)
    __builtin_cpu_init();
#endif
#ifdef VGS_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
      return 2;
#endif
#ifdef VGS_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
    return 0;
  }();
  return level;
}

const Kernels& kernels() {
  switch (level()) {
#ifdef VGS_HAVE_AVX512
    case 2: return avx512::kernels;
#endif
#ifdef VGS_HAVE_AVX2
    case 1: return avx2::kernels;
#endif
    default: return baseline::kernels;
  }
}

}  // namespace vgs

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&vgs::cpu_level));
  m.impl("highest_cpu_level", TORCH_BOX(&vgs::highest_cpu_level));
  m.impl("set_cpu_level", TORCH_BOX(&vgs::set_cpu_level));
}
