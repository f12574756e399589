// 128-bit vectors, which every 64-bit processor has.
#include "support.h"
#include "table.h"

#define NSA_ISA generic
#define NSA_WIDTH 4
#include "functions.h"
