#define VGS_LEVEL avx512
#include "combine_gradients_kernels.h"
