// The kernels of one instruction-set level, and the switch between levels.
//
// kernels.cpp is compiled once a level (setup.py), into a namespace of its own. What it includes has plain data and
// function pointers only, no torch headers and no library templates: an inline function emitted under -mavx512f could be
// the one that the linker keeps for an older machine.
#pragma once

#include "combine_gradients.h"
#include "gradient_gramian.h"
#include "products.h"
#include "stream_kl.h"

namespace vgs {

struct Kernels {
  ProductKernels products;
  GramianKernels gramian;
  CombineKernels combine;
  StreamKLKernels stream_kl;
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }

// Levels of x86-64, each with what is below it: the compiler's default; AVX2 with FMA and F16C; AVX-512 as of 2017; with
// products of bfloat16; with tiles of bfloat16 (products_amx.cpp), the other kernels being those of the level below.
enum Level { kBaseline, kAVX2, kAVX512, kAVX512BF16, kAMX };

// The level in force: the highest that this CPU and build have, unless the operator set_cpu_level chose another.
Level level();

// Its kernels.
const Kernels& kernels();

}  // namespace vgs
