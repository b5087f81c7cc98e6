#define VGS_LEVEL avx2
#include "combine_gradients_kernels.h"
