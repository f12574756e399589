// AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "support.h"
#include "table.h"

// To the end of the file, where templates are made.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define NSA_ISA avx2
#define NSA_WIDTH 8
#include "functions.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
