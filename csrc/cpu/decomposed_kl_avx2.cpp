#define VGS_LEVEL avx2
#include "decomposed_kl_kernels.h"
