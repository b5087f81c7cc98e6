#define VGS_LEVEL baseline
#include "gradient_gramian_kernels.h"
