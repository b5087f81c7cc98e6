#define VGS_LEVEL avx2
#include "gradient_gramian_kernels.h"
