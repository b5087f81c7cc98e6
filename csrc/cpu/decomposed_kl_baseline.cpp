#define VGS_LEVEL baseline
#include "decomposed_kl_kernels.h"
