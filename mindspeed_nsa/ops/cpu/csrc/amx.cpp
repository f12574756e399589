// AMX with bfloat16, beside AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "support.h"
#include "table.h"

// To the end of the file, where templates are made.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define NSA_ISA amx
#define NSA_WIDTH 16
#define NSA_AMX
#include "functions.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
