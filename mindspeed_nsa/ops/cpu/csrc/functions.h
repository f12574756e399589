// All functions for one instruction set. Its file defines NSA_WIDTH (floats of a vector), NSA_ISA (the namespace) and, where
// there is AMX, NSA_AMX; it includes the standard library before it says which instructions may be used, as other files share
// the library's inline functions.

namespace nsa {
namespace NSA_ISA {

#include "simd.h"
#ifdef NSA_AMX
#include "amx.h"
#endif
#include "packing.h"
#include "forward.h"
#include "backward.h"
#include "dense.h"
#include "compressed.h"
#include "select.h"
#include "elementwise.h"
#include "whole.h"

namespace {

template <class Run> int guarded(const Run &run) {
    try {
        run();
    } catch (const std::bad_alloc &) {
        return NSA_NO_MEMORY;
    }
    return NSA_OK;
}

// Run with the engine for a type.
template <class Run> int with_engine(int32_t type, const Run &run) {
    (void)type;
    return guarded([&] {
#ifdef NSA_AMX
        if (type == NSA_BFLOAT16) return run(Amx());
#endif
        run(Simd());
    });
}

int window_forward(const NsaAttention *at, int64_t window_size, const NsaTensor *query, const NsaTensor *key,
                   const NsaTensor *value, void *attention, float *row_max, float *row_sum) {
    return with_engine(at->type, [&](auto engine) {
        nsa::NSA_ISA::window_forward<decltype(engine)>(Problem(*at), window_size, *query, *key, *value, {attention, row_max, row_sum});
    });
}

int window_backward(const NsaAttention *at, int64_t window_size, const NsaTensor *grad, const NsaTensor *query,
                    const NsaTensor *key, const NsaTensor *value, const NsaTensor *attention, const float *row_max,
                    const float *row_sum, void *grad_query, void *grad_key, void *grad_value) {
    return with_engine(at->type, [&](auto engine) {
        int64_t span = std::max<int64_t>(2 * window_size, 512);
        Problem problem(*at);
        Gradients from(problem, *grad, *query, *attention, row_max, row_sum);
        dense_backward<decltype(engine)>(problem, Sight{window_size, 0, 0}, span, from, *key, *value, grad_query, grad_key,
                                         grad_value);
    });
}

int select_forward(const NsaAttention *at, const NsaSelected *selected, const NsaTensor *query, const NsaTensor *key,
                   const NsaTensor *value, void *attention, float *row_max, float *row_sum) {
    return with_engine(at->type, [&](auto engine) {
        nsa::NSA_ISA::select_forward<decltype(engine)>(Problem(*at), *selected, *query, *key, *value, {attention, row_max, row_sum});
    });
}

int select_backward(const NsaAttention *at, const NsaSelected *selected, const NsaTensor *grad, const NsaTensor *query,
                    const NsaTensor *key, const NsaTensor *value, const NsaTensor *attention, const float *row_max,
                    const float *row_sum, void *grad_query, void *grad_key, void *grad_value) {
    return with_engine(at->type, [&](auto engine) {
        Problem problem(*at);
        Gradients from(problem, *grad, *query, *attention, row_max, row_sum);
        nsa::NSA_ISA::select_backward<decltype(engine)>(problem, *selected, from, *key, *value, grad_query, grad_key, grad_value);
    });
}

int64_t most_blocks(const NsaAttention &at, const NsaCompressed &compressed) {
    int64_t most = 0;
    for (int64_t b = 0; b < at.samples; b++) most = std::max(most, compressed.sel_end[b] - (b ? compressed.sel_end[b - 1] : 0));
    return most;
}

int compress_attention_forward(const NsaAttention *at, const NsaCompressed *compressed, const NsaTensor *query,
                               const NsaTensor *key, const NsaTensor *value, void *attention, int32_t *ids, float *row_max,
                               float *row_sum) {
    return with_engine(at->type, [&](auto engine) {
        Problem problem(*at);
        int32_t *chosen = compressed->select_block_count ? ids : nullptr;
        CompressedPass pass{*compressed, 0, problem.queries(), most_blocks(*at, *compressed), chosen, nullptr, true};
        compressed_pass<decltype(engine)>(problem, pass, *query, *key, *value, {attention, row_max, row_sum});
    });
}

int compress_attention_backward(const NsaAttention *at, const NsaCompressed *compressed, const NsaTensor *grad,
                                const NsaTensor *query, const NsaTensor *key, const NsaTensor *value,
                                const NsaTensor *attention, const float *row_max, const float *row_sum, void *grad_query,
                                void *grad_key, void *grad_value) {
    return with_engine(at->type, [&](auto engine) {
        Problem problem(*at);
        // Few spans, as each has memory for all windows before it.
        int64_t span = std::max<int64_t>(ceil_div(problem.queries(), 16), 1024);
        Sight sight{0, compressed->compress_block_size, compressed->compress_stride};
        Gradients from(problem, *grad, *query, *attention, row_max, row_sum);
        dense_backward<decltype(engine)>(problem, sight, span, from, *key, *value, grad_query, grad_key, grad_value);
    });
}

int block_scores(const NsaAttention *at, const NsaCompressed *compressed, const NsaTensor *query, const NsaTensor *key,
                 int64_t first_row, int64_t last_row, float *scores) {
    return with_engine(at->type, [&](auto engine) {
        CompressedPass pass{*compressed, first_row, last_row, most_blocks(*at, *compressed), nullptr, scores, false};
        compressed_pass<decltype(engine)>(Problem(*at), pass, *query, *key, NsaTensor{}, {});
    });
}

int compress_forward(int32_t type, int32_t threads, int64_t heads, int64_t dim, int64_t block_size, int64_t stride,
                     int64_t samples, const int64_t *seq_end, const NsaTensor *input, const void *weight, void *out) {
    return guarded([&] {
        nsa::NSA_ISA::compress_forward({type, threads, heads, dim, block_size, stride, samples, seq_end}, *input, weight, out);
    });
}

int compress_backward(int32_t type, int32_t threads, int64_t heads, int64_t dim, int64_t block_size, int64_t stride,
                      int64_t samples, const int64_t *seq_end, const NsaTensor *grad, const NsaTensor *input,
                      const void *weight, void *grad_input, void *grad_weight) {
    return guarded([&] {
        Pooling at(type, threads, heads, dim, block_size, stride, samples, seq_end);
        compress_backward_input(at, *grad, floats(type, weight, block_size * heads), grad_input);
        compress_backward_weight(at, *grad, *input, grad_weight);
    });
}

int sparse_attention_forward(const NsaAttention *at, const int64_t *token_end, const NsaCompressed *compressed, int64_t window_size,
                             const NsaTensor *query, const NsaTensor *keys, const NsaTensor *values, int32_t gate_type,
                             const void *gate, void *out, int32_t *ids, void *const *attentions, float *const *row_maxes,
                             float *const *row_sums) {
    return with_engine(at->type, [&](auto engine) {
        WholeProblem problem(*at, token_end);
        int32_t *chosen = compressed->select_block_count ? ids : nullptr;
        CompressedPass pass{*compressed, 0, problem.tokens.queries(), most_blocks(*at, *compressed), chosen, nullptr, true};
        Gated gated{at->type, gate_type, at->threads, pass.last_row, at->query_heads, at->v_dim, gate, nullptr};
        Results to[3];
        for (int j = 0; j < 3; j++) to[j] = {attentions[j], row_maxes[j], row_sums[j]};
        nsa::NSA_ISA::sparse_attention_forward<decltype(engine)>(problem, pass, window_size, *query, keys, values, gated, out, to);
    });
}

int gated_sum_forward(int32_t type, int32_t gate_type, int32_t threads, int64_t tokens, int64_t heads, int64_t dim,
                      const void *gate, const NsaTensor *branches, void *out) {
    return guarded([&] {
        nsa::NSA_ISA::gated_sum_forward({type, gate_type, threads, tokens, heads, dim, gate, branches}, out);
    });
}

int gated_sum_backward(int32_t type, int32_t gate_type, int32_t threads, int64_t tokens, int64_t heads, int64_t dim,
                       const NsaTensor *grad, const void *gate, const NsaTensor *branches, void *grad_gate,
                       void *const *grad_branches) {
    return guarded([&] {
        nsa::NSA_ISA::gated_sum_backward({type, gate_type, threads, tokens, heads, dim, gate, branches}, *grad, grad_gate,
                                         grad_branches);
    });
}

} // namespace

extern const Table table;
const Table table = {compress_forward, compress_backward, window_forward, window_backward, select_forward, select_backward,
                     compress_attention_forward, compress_attention_backward, block_scores, sparse_attention_forward,
                     gated_sum_forward, gated_sum_backward};

} // namespace NSA_ISA
} // namespace nsa
