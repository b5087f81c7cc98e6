#define VGS_LEVEL avx512
#include "gradient_gramian_kernels.h"
