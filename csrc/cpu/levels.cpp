// Which instruction-set level runs.
#include <atomic>
#include <initializer_list>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"
#if defined(VGS_HAVE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vgs {
namespace {

// Whether the CPU has a matrix unit for bfloat16 and Linux lends it to this process.
bool has_matrix_unit() {
#if defined(VGS_HAVE_AMX) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, products = d >> 22 & 1;
  constexpr int kRequestPermission = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  return tiles && products && syscall(SYS_arch_prctl, kRequestPermission, kTiles) == 0;
#else
  return false;
#endif
}

Level find_highest() {
  Level level = kBaseline;
#if defined(VGS_HAVE_AVX2) && defined(VGS_HAVE_AVX512) && defined(VGS_HAVE_AVX512BF16)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return level;
  level = kAVX2;
  for (const bool supported : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
                               __builtin_cpu_supports("avx512vl") != 0, __builtin_cpu_supports("avx512dq") != 0,
                               __builtin_cpu_supports("avx512cd") != 0})
    if (!supported) return level;
  level = kAVX512;
  if (!__builtin_cpu_supports("avx512bf16")) return level;
  level = has_matrix_unit() ? kAMX : kAVX512BF16;
#endif
  return level;
}

Level highest() {
  static const Level level = find_highest();
  return level;
}

std::atomic<int> chosen{-1};  // -1: the highest

void set_cpu_level(int64_t level) {
  STD_TORCH_CHECK(level >= kBaseline && level <= highest(), "this CPU or build has instruction-set levels 0 to ",
                  static_cast<int>(highest()), ", level ", level, " was asked for");
  chosen = static_cast<int>(level);
}

int64_t cpu_level() { return level(); }
int64_t highest_cpu_level() { return highest(); }

}  // namespace

Level level() {
  const int set = chosen.load(std::memory_order_relaxed);
  return set < 0 ? highest() : static_cast<Level>(set);
}

const Kernels& kernels() {
#if defined(VGS_HAVE_AVX2) && defined(VGS_HAVE_AVX512) && defined(VGS_HAVE_AVX512BF16)
  switch (level()) {
    case kAMX:
    case kAVX512BF16: return avx512bf16::kernels;
    case kAVX512: return avx512::kernels;
    case kAVX2: return avx2::kernels;
    case kBaseline: break;
  }
#endif
  return baseline::kernels;
}

}  // namespace vgs

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&vgs::cpu_level));
  m.impl("highest_cpu_level", TORCH_BOX(&vgs::highest_cpu_level));
  m.impl("set_cpu_level", TORCH_BOX(&vgs::set_cpu_level));
}
