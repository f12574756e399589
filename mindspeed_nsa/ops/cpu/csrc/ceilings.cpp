// What this processor could do at most, for `mindspeed-nsa bench`: products and sums a second, from registers alone.
#include "kernels.h"

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kRounds = 300000;

double thread_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

// The best of a few: what it could do, not what others left it.
template <class Run>
double per_second(double operations, Run run) {
    double best = 0;
    for (int i = 0; i < 8; ++i) {
        const double start = thread_seconds();
        run();
        best = std::max(best, operations / (thread_seconds() - start));
    }
    return best;
}

// Twelve independent sums hide the latency of a multiply-add; the empty asm keeps the compiler from working them out.
void multiply_add_generic() {
    typedef float Vector __attribute__((vector_size(16)));
    const Vector factor = {0.5f, 0.5f, 0.5f, 0.5f};
    Vector sums[12] = {};
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (auto &sum : sums) sum = sum * factor + factor;
    }
    for (auto &sum : sums) asm volatile("" : : "m"(sum));
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void multiply_add_avx2() {
    __m256 factor = _mm256_set1_ps(0.5f), sums[12];
    for (auto &sum : sums) sum = factor;
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (auto &sum : sums) sum = _mm256_fmadd_ps(sum, factor, factor);
    }
    for (auto &sum : sums) asm volatile("" : : "x"(sum));
}

__attribute__((target("avx512f"))) void multiply_add_avx512() {
    __m512 factor = _mm512_set1_ps(0.5f), sums[12];
    for (auto &sum : sums) sum = factor;
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (auto &sum : sums) sum = _mm512_fmadd_ps(sum, factor, factor);
    }
    for (auto &sum : sums) asm volatile("" : : "v"(sum));
}

__attribute__((target("amx-tile,amx-bf16"))) void multiply_tiles() {
    // Static: some compilers believe that the instruction reads eight bytes alone, and would drop the others from the stack.
    static const struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    _tile_loadconfig(&shapes);
    for (int64_t i = 0; i < kRounds; ++i) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
    }
    _tile_release();
}
#endif

}  // namespace

// Floating point operations a second of the calling thread, with the instruction set in use: of bfloat16 tiles where `tiles` and
// the set is amx, else of float32.
extern "C" NSA_EXPORT double nsa_peak(int32_t tiles) {
    const char *isa = nsa_isa();
    if (isa == nullptr) return 0;
#if defined(__x86_64__)
    if (tiles && !std::strcmp(isa, "amx")) return per_second(kRounds * 4 * 2 * 16 * 16 * 32.0, multiply_tiles);
    if (!std::strcmp(isa, "amx") || !std::strcmp(isa, "avx512")) return per_second(kRounds * 12 * 2 * 16.0, multiply_add_avx512);
    if (!std::strcmp(isa, "avx2")) return per_second(kRounds * 12 * 2 * 8.0, multiply_add_avx2);
#endif
    return per_second(kRounds * 12 * 2 * 4.0, multiply_add_generic);
}
