/* The floor: what every x86-64 has (SSE2), or every aarch64 (NEON). */
#define FC_ISA "base"
#define FC_TABLE fc_kernels_base
#define FC_BYTES 16
#include "all.h"
