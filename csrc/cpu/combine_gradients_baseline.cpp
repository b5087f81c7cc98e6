#define VGS_LEVEL baseline
#include "combine_gradients_kernels.h"
