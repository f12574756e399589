// The functions of kernels.h, once for each instruction set.
#pragma once
#include "kernels.h"

namespace nsa {

struct Table {
    decltype(&nsa_compress_forward) compress_forward;
    decltype(&nsa_compress_backward) compress_backward;
    decltype(&nsa_window_forward) window_forward;
    decltype(&nsa_window_backward) window_backward;
    decltype(&nsa_select_forward) select_forward;
    decltype(&nsa_select_backward) select_backward;
    decltype(&nsa_compress_attention_forward) compress_attention_forward;
    decltype(&nsa_compress_attention_backward) compress_attention_backward;
    decltype(&nsa_block_scores) block_scores;
    decltype(&nsa_sparse_attention_forward) sparse_attention_forward;
    decltype(&nsa_gated_sum_forward) gated_sum_forward;
    decltype(&nsa_gated_sum_backward) gated_sum_backward;
};

namespace generic {
extern const Table table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
namespace amx {
extern const Table table;
}
#endif

} // namespace nsa
