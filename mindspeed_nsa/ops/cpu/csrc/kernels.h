// The C interface of the native kernels: what each computes is said in ops/reference.py.
//
// Build: every .cpp of this folder into one shared library, C++17, with
//   -O3 -fPIC -fvisibility=hidden -pthread -ffp-contract=fast -fno-math-errno -fno-trapping-math
// and no -march: each instruction set has a file of its own, and the processor is asked at run time. It links to nothing but the
// standard library and pthreads.
//
// Tensors are [T, N, D] with the last dimension contiguous; strides are counted in elements. What a function writes (void *,
// float *, int32_t *) is contiguous, and wholly written: it may come from torch.empty. Statistics are float32 [T, N1], one value a row.
// Prefix sums have no leading 0. Every function returns NSA_OK, NSA_NO_MEMORY or NSA_NO_ISA. Results do not depend on `threads`.
#pragma once
#include <stdint.h>

#define NSA_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { NSA_OK = 0, NSA_NO_MEMORY = 1, NSA_NO_ISA = 2 };
enum { NSA_FLOAT32 = 0, NSA_FLOAT16 = 1, NSA_BFLOAT16 = 2 };
enum { NSA_IMPORTANCE_ASCEND = 0, NSA_IMPORTANCE_PAPER = 1 };

// [T, N, D], of the type that the call names.
typedef struct {
    const void *data;
    int64_t token_stride;
    int64_t head_stride;
} NsaTensor;

// What all attentions share. Query [T1, N1, D1], key [T2, N2, D1], value [T2, N2, D2].
typedef struct {
    int32_t type;            // of query, key, value, and of what is written for them
    int32_t threads;         // at least 1
    int64_t query_heads;     // N1, a multiple of kv_heads
    int64_t kv_heads;        // N2
    int64_t qk_dim;          // D1
    int64_t v_dim;           // D2
    double scale;            // any sign
    int64_t samples;         // B
    const int64_t *q_end;    // [B] prefix sums of query lengths
    const int64_t *kv_end;   // [B] prefix sums of key lengths (compressed attention: of windows)
    const int64_t *q_offset; // [B] position in its sample of each sample's first query
} NsaAttention;

typedef struct {
    int64_t block_size;
    int64_t count;      // ids a row
    int32_t causal;     // by block id and position
    int32_t ordered;    // a promise as in reference.Selected; nothing depends on it but speed
    const int32_t *ids; // [T1, N2, count] contiguous, ids >= 0; past the sample's end they list nothing
} NsaSelected;

// The causal rule only (reference.Compressed with causal=True): calls with masks are the caller's to send elsewhere.
typedef struct {
    int64_t compress_block_size;
    int64_t compress_stride;
    int64_t select_block_size;  // at least compress_stride
    int64_t select_block_count; // 0: choose none
    int64_t init_blocks;
    int64_t local_blocks;
    int32_t own_block;
    int32_t importance;     // NSA_IMPORTANCE_*
    const int64_t *sel_end; // [B] prefix sums of blocks
} NsaCompressed;

// Name of the instruction set in use: generic, avx2, avx512 or amx; NULL where the environment variable NSA_CPU_ISA names one
// that is unknown or that this processor lacks (all other functions then return NSA_NO_ISA). Read once a process.
NSA_EXPORT const char *nsa_isa(void);
// Names of those that this build and processor have, best last, separated by spaces.
NSA_EXPORT const char *nsa_isas(void);

// compress: input [T, N, D] and weight [block_size, N] (contiguous) -> out [windows, N, D].
NSA_EXPORT int nsa_compress_forward(int32_t type, int32_t threads, int64_t heads, int64_t dim, int64_t block_size, int64_t stride,
                                    int64_t samples, const int64_t *seq_end, const NsaTensor *input, const void *weight, void *out);
// grad [windows, N, D] -> grad_input [T, N, D], grad_weight [block_size, N].
NSA_EXPORT int nsa_compress_backward(int32_t type, int32_t threads, int64_t heads, int64_t dim, int64_t block_size, int64_t stride,
                                     int64_t samples, const int64_t *seq_end, const NsaTensor *grad, const NsaTensor *input,
                                     const void *weight, void *grad_input, void *grad_weight);

// Attention over the window_size newest tokens -> attention [T1, N1, D2], row_max and row_sum [T1, N1].
NSA_EXPORT int nsa_window_forward(const NsaAttention *at, int64_t window_size, const NsaTensor *query, const NsaTensor *key,
                                  const NsaTensor *value, void *attention, float *row_max, float *row_sum);
// grad and attention [T1, N1, D2] -> gradients in the shapes of query, key and value.
NSA_EXPORT int nsa_window_backward(const NsaAttention *at, int64_t window_size, const NsaTensor *grad, const NsaTensor *query,
                                   const NsaTensor *key, const NsaTensor *value, const NsaTensor *attention,
                                   const float *row_max, const float *row_sum, void *grad_query, void *grad_key,
                                   void *grad_value);

// Attention over listed blocks; outputs as above.
NSA_EXPORT int nsa_select_forward(const NsaAttention *at, const NsaSelected *selected, const NsaTensor *query,
                                  const NsaTensor *key, const NsaTensor *value, void *attention, float *row_max, float *row_sum);
NSA_EXPORT int nsa_select_backward(const NsaAttention *at, const NsaSelected *selected, const NsaTensor *grad,
                                   const NsaTensor *query, const NsaTensor *key, const NsaTensor *value,
                                   const NsaTensor *attention, const float *row_max, const float *row_sum, void *grad_query,
                                   void *grad_key, void *grad_value);

// Attention over compressed windows and the choice of blocks: ids [T1, N2, select_block_count] int32, best first.
NSA_EXPORT int nsa_compress_attention_forward(const NsaAttention *at, const NsaCompressed *compressed, const NsaTensor *query,
                                              const NsaTensor *key, const NsaTensor *value, void *attention, int32_t *ids,
                                              float *row_max, float *row_sum);
NSA_EXPORT int nsa_compress_attention_backward(const NsaAttention *at, const NsaCompressed *compressed, const NsaTensor *grad,
                                               const NsaTensor *query, const NsaTensor *key, const NsaTensor *value,
                                               const NsaTensor *attention, const float *row_max, const float *row_sum,
                                               void *grad_query, void *grad_key, void *grad_value);
// Importance of every block for queries first_row to last_row (exclusive) -> scores [rows, N2, most blocks of a sample] float32.
// The softmax statistics are computed anew (v_dim is not read).
NSA_EXPORT int nsa_block_scores(const NsaAttention *at, const NsaCompressed *compressed, const NsaTensor *query,
                                const NsaTensor *key, int64_t first_row, int64_t last_row, float *scores);

// What the calls for compressed attention, listed blocks and the sliding window, in this order, give one after another, and their
// nsa_gated_sum_forward: to the bit. The blocks are those just chosen, causal. `at`: for compressed attention; token_end [B]: prefix
// sums of the keys of the others. Arrays of 3: keys to row_sums, one of each attention. gate [T1, N1, 3], contiguous, of gate_type.
NSA_EXPORT int nsa_sparse_attention_forward(const NsaAttention *at, const int64_t *token_end, const NsaCompressed *compressed,
                                            int64_t window_size, const NsaTensor *query, const NsaTensor *keys,
                                            const NsaTensor *values, int32_t gate_type, const void *gate, void *out, int32_t *ids,
                                            void *const *attentions, float *const *row_maxes, float *const *row_sums);

// out [T, N, D] = sum of sigmoid(gate[..., i]) * branches[i]; gate [T, N, 3] contiguous, of gate_type; branches: an array of 3.
NSA_EXPORT int nsa_gated_sum_forward(int32_t type, int32_t gate_type, int32_t threads, int64_t tokens, int64_t heads, int64_t dim,
                                     const void *gate, const NsaTensor *branches, void *out);
// grad [T, N, D] -> grad_gate [T, N, 3], grad_branches: an array of 3 pointers to [T, N, D].
NSA_EXPORT int nsa_gated_sum_backward(int32_t type, int32_t gate_type, int32_t threads, int64_t tokens, int64_t heads, int64_t dim,
                                      const NsaTensor *grad, const void *gate, const NsaTensor *branches, void *grad_gate,
                                      void *const *grad_branches);

#ifdef __cplusplus
}
#endif
