// Chooses the instruction set, once a process, and sends each call there.
#include <cstdlib>
#include <cstring>
#include <string>

#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nsa {
namespace {

struct Isa {
    const char *name;
    const Table *table;
    bool here;
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_amx() {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kAvx512Bf16 = 1u << 5;
    unsigned a, b, c, d;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
    constexpr int kAskPermission = 0x1023, kTileData = 18; // Linux lets a process use tiles when it has asked
    return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
}
#endif

// Best last.
const Isa *isas(int *count) {
    static const Isa all[] = {
        {"generic", &generic::table, true},
#if defined(__x86_64__)
        {"avx2", &avx2::table, has_avx2()},
        {"avx512", &avx512::table, has_avx512()},
        {"amx", &amx::table, has_amx()},
#endif
    };
    *count = sizeof all / sizeof *all;
    return all;
}

const Isa *choose() {
    int count;
    const Isa *all = isas(&count), *best = nullptr;
    const char *wanted = std::getenv("NSA_CPU_ISA");
    for (int i = 0; i < count; i++)
        if (all[i].here && (!wanted || !*wanted || !std::strcmp(wanted, all[i].name))) best = &all[i];
    return best;
}

const Isa *chosen() {
    static const Isa *const isa = choose();
    return isa;
}

template <auto member, class... Arguments> int call(Arguments... arguments) {
    return chosen() ? (chosen()->table->*member)(arguments...) : NSA_NO_ISA;
}

} // namespace
} // namespace nsa

using nsa::call;
using nsa::Table;

const char *nsa_isa(void) { return nsa::chosen() ? nsa::chosen()->name : nullptr; }

const char *nsa_isas(void) {
    static const std::string names = [] {
        std::string all;
        int count;
        const nsa::Isa *isas = nsa::isas(&count);
        for (int i = 0; i < count; i++)
            if (isas[i].here) all += (all.empty() ? "" : " ") + std::string(isas[i].name);
        return all;
    }();
    return names.c_str();
}

int nsa_compress_forward(int32_t type, int32_t threads, int64_t heads, int64_t dim, int64_t block_size, int64_t stride,
                         int64_t samples, const int64_t *seq_end, const NsaTensor *input, const void *weight, void *out) {
    return call<&Table::compress_forward>(type, threads, heads, dim, block_size, stride, samples, seq_end, input, weight, out);
}

int nsa_compress_backward(int32_t type, int32_t threads, int64_t heads, int64_t dim, int64_t block_size, int64_t stride,
                          int64_t samples, const int64_t *seq_end, const NsaTensor *grad, const NsaTensor *input,
                          const void *weight, void *grad_input, void *grad_weight) {
    return call<&Table::compress_backward>(type, threads, heads, dim, block_size, stride, samples, seq_end, grad, input,
                                           weight, grad_input, grad_weight);
}

int nsa_window_forward(const NsaAttention *at, int64_t window_size, const NsaTensor *query, const NsaTensor *key,
                       const NsaTensor *value, void *attention, float *row_max, float *row_sum) {
    return call<&Table::window_forward>(at, window_size, query, key, value, attention, row_max, row_sum);
}

int nsa_window_backward(const NsaAttention *at, int64_t window_size, const NsaTensor *grad, const NsaTensor *query,
                        const NsaTensor *key, const NsaTensor *value, const NsaTensor *attention, const float *row_max,
                        const float *row_sum, void *grad_query, void *grad_key, void *grad_value) {
    return call<&Table::window_backward>(at, window_size, grad, query, key, value, attention, row_max, row_sum, grad_query,
                                         grad_key, grad_value);
}

int nsa_select_forward(const NsaAttention *at, const NsaSelected *selected, const NsaTensor *query, const NsaTensor *key,
                       const NsaTensor *value, void *attention, float *row_max, float *row_sum) {
    return call<&Table::select_forward>(at, selected, query, key, value, attention, row_max, row_sum);
}

int nsa_select_backward(const NsaAttention *at, const NsaSelected *selected, const NsaTensor *grad, const NsaTensor *query,
                        const NsaTensor *key, const NsaTensor *value, const NsaTensor *attention, const float *row_max,
                        const float *row_sum, void *grad_query, void *grad_key, void *grad_value) {
    return call<&Table::select_backward>(at, selected, grad, query, key, value, attention, row_max, row_sum, grad_query,
                                         grad_key, grad_value);
}

int nsa_compress_attention_forward(const NsaAttention *at, const NsaCompressed *compressed, const NsaTensor *query,
                                   const NsaTensor *key, const NsaTensor *value, void *attention, int32_t *ids, float *row_max,
                                   float *row_sum) {
    return call<&Table::compress_attention_forward>(at, compressed, query, key, value, attention, ids, row_max, row_sum);
}

int nsa_compress_attention_backward(const NsaAttention *at, const NsaCompressed *compressed, const NsaTensor *grad,
                                    const NsaTensor *query, const NsaTensor *key, const NsaTensor *value,
                                    const NsaTensor *attention, const float *row_max, const float *row_sum, void *grad_query,
                                    void *grad_key, void *grad_value) {
    return call<&Table::compress_attention_backward>(at, compressed, grad, query, key, value, attention, row_max, row_sum,
                                                     grad_query, grad_key, grad_value);
}

int nsa_block_scores(const NsaAttention *at, const NsaCompressed *compressed, const NsaTensor *query, const NsaTensor *key,
                     int64_t first_row, int64_t last_row, float *scores) {
    return call<&Table::block_scores>(at, compressed, query, key, first_row, last_row, scores);
}

int nsa_sparse_attention_forward(const NsaAttention *at, const int64_t *token_end, const NsaCompressed *compressed,
                                 int64_t window_size, const NsaTensor *query, const NsaTensor *keys, const NsaTensor *values,
                                 int32_t gate_type, const void *gate, void *out, int32_t *ids, void *const *attentions,
                                 float *const *row_maxes, float *const *row_sums) {
    return call<&Table::sparse_attention_forward>(at, token_end, compressed, window_size, query, keys, values, gate_type, gate,
                                                  out, ids, attentions, row_maxes, row_sums);
}

int nsa_gated_sum_forward(int32_t type, int32_t gate_type, int32_t threads, int64_t tokens, int64_t heads, int64_t dim,
                          const void *gate, const NsaTensor *branches, void *out) {
    return call<&Table::gated_sum_forward>(type, gate_type, threads, tokens, heads, dim, gate, branches, out);
}

int nsa_gated_sum_backward(int32_t type, int32_t gate_type, int32_t threads, int64_t tokens, int64_t heads, int64_t dim,
                           const NsaTensor *grad, const void *gate, const NsaTensor *branches, void *grad_gate,
                           void *const *grad_branches) {
    return call<&Table::gated_sum_backward>(type, gate_type, threads, tokens, heads, dim, grad, gate, branches, grad_gate,
                                            grad_branches);
}
