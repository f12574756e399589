// AVX-512 as Skylake servers have it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "support.h"
#include "table.h"

// To the end of the file, where templates are made.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define NSA_ISA avx512
#define NSA_WIDTH 16
#include "functions.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
