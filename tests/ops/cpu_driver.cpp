// Calls the native kernels on made-up inputs and writes what they return to stdout, for processors that Python does not run on here.
// test_cpu_emulated.py makes the same inputs and holds the results to the reference. Values are multiples of 1/64, exact in every type.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

constexpr int64_t kTokens = 150, kHeads = 6, kKvHeads = 2, kQk = 40, kV = 24, kCount = 3, kWindows = 35;
constexpr int64_t kEnds[] = {21, kTokens}, kWindowEnds[] = {4, kWindows}, kBlockEnds[] = {2, 11}, kOffsets[] = {0, 0};
constexpr int64_t kBlock = 16, kCompressBlock = 8, kStride = 4;

uint32_t state = 1;

float next() {
    state = state * 1103515245u + 12345u;
    return (static_cast<int>(state >> 16 & 127) - 64) / 64.0f;
}

struct Array {
    std::vector<uint8_t> bytes;
    NsaTensor view;

    Array(int32_t type, int64_t tokens, int64_t heads, int64_t dim) : bytes(tokens * heads * dim * (type ? 2 : 4)) {
        view = {bytes.data(), heads * dim, dim};
    }

    static Array filled(int32_t type, int64_t tokens, int64_t heads, int64_t dim) {
        Array array(type, tokens, heads, dim);
        for (int64_t i = 0; i < tokens * heads * dim; ++i) array.put(type, i, next());
        return array;
    }

    void put(int32_t type, int64_t i, float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        uint16_t half = bits >> 16;  // exact, as bfloat16
        if (type == NSA_FLOAT16) {
            const uint32_t exponent = bits >> 23 & 255;
            half = value == 0 ? 0 : (bits >> 16 & 0x8000) | (exponent - 112) << 10 | (bits >> 13 & 1023);
        }
        if (type == NSA_FLOAT32) {
            std::memcpy(bytes.data() + 4 * i, &value, 4);
        } else {
            std::memcpy(bytes.data() + 2 * i, &half, 2);
        }
    }

    void *data() { return bytes.data(); }
};

void write(const void *data, size_t size) { std::fwrite(data, 1, size, stdout); }
void write(const Array &array) { write(array.bytes.data(), array.bytes.size()); }

int run(int32_t type) {
    auto query = Array::filled(type, kTokens, kHeads, kQk), key = Array::filled(type, kTokens, kKvHeads, kQk);
    auto value = Array::filled(type, kTokens, kKvHeads, kV), grad = Array::filled(type, kTokens, kHeads, kV);
    auto few_keys = Array::filled(type, kWindows, kKvHeads, kQk), few_values = Array::filled(type, kWindows, kKvHeads, kV);
    auto gate = Array::filled(type, kTokens, kHeads, 3), weight = Array::filled(type, 1, kCompressBlock, kKvHeads);
    Array out(type, kTokens, kHeads, kV), grad_query(type, kTokens, kHeads, kQk), grad_key(type, kTokens, kKvHeads, kQk);
    Array grad_value(type, kTokens, kKvHeads, kV), pooled(type, kWindows, kKvHeads, kQk);
    std::vector<float> row_max(kTokens * kHeads), row_sum(kTokens * kHeads);
    std::vector<int32_t> ids(kTokens * kKvHeads * kCount);
    NsaAttention at = {type, 2, kHeads, kKvHeads, kQk, kV, 0.25, 2, kEnds, kEnds, kOffsets};
    int failed = nsa_compress_forward(type, 2, kKvHeads, kQk, kCompressBlock, kStride, 2, kEnds, &key.view, weight.data(),
                                      pooled.data());
    write(pooled);
    failed |= nsa_window_forward(&at, 40, &query.view, &key.view, &value.view, out.data(), row_max.data(), row_sum.data());
    failed |= nsa_window_backward(&at, 40, &grad.view, &query.view, &key.view, &value.view, &out.view, row_max.data(),
                                  row_sum.data(), grad_query.data(), grad_key.data(), grad_value.data());
    for (const Array *array : {&out, &grad_query, &grad_key, &grad_value}) write(*array);

    NsaAttention over_windows = at;
    over_windows.kv_end = kWindowEnds;
    NsaCompressed compressed = {kCompressBlock, kStride, kBlock, kCount, 1, 1, 1, NSA_IMPORTANCE_ASCEND, kBlockEnds};
    failed |= nsa_compress_attention_forward(&over_windows, &compressed, &query.view, &few_keys.view, &few_values.view,
                                             out.data(), ids.data(), row_max.data(), row_sum.data());
    write(out);
    write(ids.data(), ids.size() * 4);

    NsaSelected selected = {kBlock, kCount, 1, 0, ids.data()};
    failed |= nsa_select_forward(&at, &selected, &query.view, &key.view, &value.view, out.data(), row_max.data(), row_sum.data());
    failed |= nsa_select_backward(&at, &selected, &grad.view, &query.view, &key.view, &value.view, &out.view, row_max.data(),
                                  row_sum.data(), grad_query.data(), grad_key.data(), grad_value.data());
    for (const Array *array : {&out, &grad_query, &grad_key, &grad_value}) write(*array);

    const NsaTensor branches[] = {grad.view, grad.view, grad.view};
    failed |= nsa_gated_sum_forward(type, type, 2, kTokens, kHeads, kV, gate.data(), branches, out.data());
    write(out);

    const NsaTensor keys[] = {few_keys.view, key.view, key.view}, values[] = {few_values.view, value.view, value.view};
    Array compress(type, kTokens, kHeads, kV), select(type, kTokens, kHeads, kV), window(type, kTokens, kHeads, kV);
    void *attentions[] = {compress.data(), select.data(), window.data()};
    std::vector<float> statistics(6 * row_max.size());
    float *row_maxes[3], *row_sums[3];
    for (int j = 0; j < 3; ++j) {
        row_maxes[j] = statistics.data() + 2 * j * row_max.size();
        row_sums[j] = row_maxes[j] + row_max.size();
    }
    failed |= nsa_sparse_attention_forward(&over_windows, kEnds, &compressed, 40, &query.view, keys, values, type, gate.data(),
                                           out.data(), ids.data(), attentions, row_maxes, row_sums);
    for (const Array *array : {&out, &compress, &select, &window}) write(*array);
    return failed;
}

}  // namespace

int main() {
    std::fprintf(stderr, "%s\n", nsa_isa() ? nsa_isa() : "none");
    return run(NSA_FLOAT32) | run(NSA_FLOAT16) | run(NSA_BFLOAT16);
}
