#define VGS_LEVEL avx512
#include "decomposed_kl_kernels.h"
