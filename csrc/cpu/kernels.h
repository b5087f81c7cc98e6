// The kernels of one instruction-set level, and the switch between levels.
//
// kernels.cpp is compiled once a level (setup.py), into a namespace of its own. What it includes has plain data and
// function pointers only, no torch headers and no library templates: an inline function emitted under -mavx512f could be
// the one that the linker keeps for an older machine.
#pragma once

#include "combine_gradients.h"
#include "decomposed_kl.h"
#include "gradient_gramian.h"
#include "products.h"

namespace vgs {

struct Kernels {
  DecomposedKLKernels decomposed_kl;
  ProductKernels products;
  GramianKernels gramian;
  CombineKernels combine;
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

// The highest level that this CPU and build have: 2 AVX-512, 1 AVX2 with FMA and F16C, 0 the compiler's default.
int highest_level();

// The kernels of the level in force: the highest, unless the operator set_cpu_level chose another.
const Kernels& kernels();

}  // namespace vgs
