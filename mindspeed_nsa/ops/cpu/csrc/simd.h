// Vectors of the instruction set that this is compiled for (NSA_WIDTH floats), conversions, and the fp32 engine.
// No include guard: each instruction set's file includes it once, inside its namespace.

typedef float vf __attribute__((vector_size(NSA_WIDTH * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(NSA_WIDTH * 4), aligned(4), may_alias));
constexpr int kWidth = NSA_WIDTH;
alignas(64) constexpr int32_t kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline vf load(const float *from) { return *reinterpret_cast<const vf *>(from); }
inline vi load(const int32_t *from) { return *reinterpret_cast<const vi *>(from); }
inline void store(float *to, vf x) { *reinterpret_cast<vf *>(to) = x; }
inline vf splat(float x) { return x - vf{}; }
inline vi splat(int32_t x) { return x - vi{}; }
inline vf pick(vi which, vf yes, vf no) { return which ? yes : no; }
// Where y is NaN, it is the result.
#if NSA_WIDTH == 16
inline vf larger(vf x, vf y) { return (vf)_mm512_max_ps((__m512)x, (__m512)y); }
inline vf smaller(vf x, vf y) { return (vf)_mm512_min_ps((__m512)x, (__m512)y); }
#else
inline vf larger(vf x, vf y) { return x > y ? x : y; }
inline vf smaller(vf x, vf y) { return x < y ? x : y; }
#endif
// Whether a comparison holds anywhere.
inline bool any(vi which) {
#if NSA_WIDTH == 16
    return _mm512_movepi32_mask((__m512i)which) != 0;
#else
    int32_t all = 0;
    for (int i = 0; i < kWidth; i++) all |= which[i];
    return all != 0;
#endif
}
inline float sum(vf x) {
#if NSA_WIDTH == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < kWidth; i++) total += x[i];
    return total;
#endif
}

// ---- a row of floats, kWidth at a time
// The largest of `count`; a NaN counts as none. -infinity where there is none.
inline float highest(const float *row, int64_t count) {
    vf high = splat(-INFINITY);
    for (int64_t i = 0; i < count; i += kWidth) high = larger(load(row + i), high);
#if NSA_WIDTH == 16
    return _mm512_reduce_max_ps((__m512)high);
#else
    float most = high[0];
    for (int i = 1; i < kWidth; i++) most = std::max(most, high[i]);
    return most;
#endif
}
// Where a value that is there is first.
inline int64_t find(const float *row, float value) {
    for (int64_t i = 0;; i += kWidth) {
#if NSA_WIDTH == 16
        unsigned same = _mm512_movepi32_mask((__m512i)(load(row + i) == value));
        if (same) return i + __builtin_ctz(same);
#else
        vi same = load(row + i) == value;
        for (int j = 0; j < kWidth; j++)
            if (same[j]) return i + j;
#endif
    }
}
// Replaces a value; its neighbours are written with it, so that a load of them all need not wait.
inline void put(float *row, int64_t at, float value) {
    int64_t first = at / kWidth * kWidth;
    store(row + first, pick(load(kCount) == int32_t(at - first), splat(value), load(row + first)));
}

#if NSA_WIDTH == 16
// Results too small for a normal number are 0, as long as it lives: the processor takes a hundred times longer for them.
class FlushToZero {
  public:
    FlushToZero() { _mm_setcsr(before_ | 0x8000); }
    FlushToZero(const FlushToZero &) = delete;
    ~FlushToZero() { _mm_setcsr(before_); }

  private:
    unsigned before_ = _mm_getcsr();
};
#endif

// 2 to the x, to 2e-7 or where `rough` to 4e-6, for x up to 127; below -126 it may be that of -126, or 0.
template <bool rough = false> inline vf exp2(vf x) {
#if NSA_WIDTH == 16
    vf part = (vf)_mm512_reduce_ps((__m512)x, 0x09); // x - floor(x)
#else
    x = larger(splat(-126.f), x);
    vf shifted = x - 0.5f + 12582912.f; // 1.5 * 2^23: the integer part lands in the low bits
    vf part = x - (shifted - 12582912.f);
#endif
    vf power;
    if (rough) {
        power = part * 1.35557472e-2f + 5.20323690e-2f;
        power = power * part + 2.41379763e-1f;
        power = power * part + 6.93032121e-1f;
    } else {
        power = part * 1.86713017e-3f + 9.01702978e-3f;
        power = power * part + 5.57999127e-2f;
        power = power * part + 2.40164444e-1f;
        power = power * part + 6.93151295e-1f;
    }
    power = power * part + 1.0f;
#if NSA_WIDTH == 16
    return (vf)_mm512_scalef_ps((__m512)power, (__m512)x);
#else
    return (vf)((vi)power + ((vi)shifted << 23));
#endif
}

// ---- conversions

inline float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float from_half(uint16_t half) {
    uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    uint32_t bits = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f); // exact, subnormal halves too
    if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
    return bits_to_float(bits | sign);
}
inline uint16_t to_half(float x) {
    uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u; // the sum rounds to a multiple of 2^-24
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    if (magnitude >= 0x477ff000u) half = 0x7c00u;
    if (magnitude > 0x7f800000u) half = 0x7e00u;
    return uint16_t(half | sign);
}
inline float from_bfloat(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }
inline uint16_t to_bfloat(float x) {
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

inline int64_t type_size(int32_t type) { return type == NSA_FLOAT32 ? 4 : 2; }

struct Float32 {
    using Stored = float;
    static float read(Stored x) { return x; }
    static Stored write(float x) { return x; }
};
struct Float16 {
    using Stored = uint16_t;
    static float read(Stored x) { return from_half(x); }
    static Stored write(float x) { return to_half(x); }
};
struct Bfloat16 {
    using Stored = uint16_t;
    static float read(Stored x) { return from_bfloat(x); }
    static Stored write(float x) { return to_bfloat(x); }
};

// Run with what reads and writes a type.
template <class Run> inline void with_type(int32_t type, const Run &run) {
    if (type == NSA_FLOAT32)
        run(Float32());
    else if (type == NSA_FLOAT16)
        run(Float16());
    else
        run(Bfloat16());
}

inline void read_row(int32_t type, const void *from, int64_t count, float *to) {
    with_type(type, [=](auto as) {
        auto row = static_cast<const typename decltype(as)::Stored *>(from);
        for (int64_t i = 0; i < count; i++) to[i] = as.read(row[i]);
    });
}

#ifdef NSA_AMX
template <bool past, class At> inline void write_bfloats(int64_t count, void *to, const At &at) {
    auto row = static_cast<uint16_t *>(to);
    int64_t i = 0;
    if (past && reinterpret_cast<uintptr_t>(to) % 64 == 0)
        for (; i + 32 <= count; i += 32)
            _mm512_stream_si512(reinterpret_cast<__m512i *>(row + i),
                                (__m512i)_mm512_cvtne2ps_pbh((__m512)at(i + 16), (__m512)at(i)));
    for (; i < count; i += 16) {
        __mmask16 some = count - i < 16 ? (1 << (count - i)) - 1 : 0xffff;
        _mm256_mask_storeu_epi16(row + i, some, (__m256i)_mm512_cvtneps_pbh((__m512)at(i)));
    }
}
#endif

// Write a row, which is read to the end of its last vector. `past`: the caches, where the engine can: they have better use than a
// result of the size of all queries.
template <bool past = false> inline void write_row(int32_t type, const float *from, int64_t count, void *to) {
#ifdef NSA_AMX
    if (type == NSA_BFLOAT16) return write_bfloats<past>(count, to, [=](int64_t i) { return load(from + i); });
#endif
    with_type(type, [=](auto as) {
        auto row = static_cast<typename decltype(as)::Stored *>(to);
        for (int64_t i = 0; i < count; i++) row[i] = as.write(from[i]);
    });
}
// The same of a row of which at(i) gives the elements from the i-th on, as many as a vector has.
template <bool past = false, class At> inline void write_row(int32_t type, int64_t count, void *to, const At &at) {
#ifdef NSA_AMX
    if (type == NSA_BFLOAT16) return write_bfloats<past>(count, to, at);
#endif
    constexpr int64_t kSome = 256;
    alignas(64) float some[kSome];
    for (int64_t i = 0; i < count; i += kSome) {
        int64_t n = std::min(count - i, kSome);
        for (int64_t j = 0; j < n; j += kWidth) store(some + j, at(i + j));
        write_row(type, some, n, static_cast<char *>(to) + i * type_size(type));
    }
}

inline const void *row_of(const NsaTensor &tensor, int32_t type, int64_t token, int64_t head) {
    int64_t element = token * tensor.token_stride + head * tensor.head_stride;
    return static_cast<const char *>(tensor.data) + element * type_size(type);
}
inline void *row_of(void *contiguous, int32_t type, int64_t row, int64_t dim) {
    return static_cast<char *>(contiguous) + row * dim * type_size(type);
}

// ---- 16 x 16 transposition of 4-byte elements

template <class T> inline void transpose(const T *const *rows, int64_t offset, T *to, int64_t to_stride) {
#if NSA_WIDTH == 16
    // Four columns at a time, of which memory fills the quarters of a vector: shuffles have one port, loads have others.
    for (int j = 0; j < 16; j += 4) {
        auto quarter = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[row] + offset + j)); };
        __m512i r[4], t[4];
        for (int i = 0; i < 4; i++) {
            r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(quarter(i)), quarter(i + 4), 1);
            r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], quarter(i + 8), 2), quarter(i + 12), 3);
        }
        for (int i = 0; i < 4; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 2; i++) {
            _mm512_storeu_si512(to + (j + 2 * i) * to_stride, _mm512_unpacklo_epi64(t[i], t[i + 2]));
            _mm512_storeu_si512(to + (j + 2 * i + 1) * to_stride, _mm512_unpackhi_epi64(t[i], t[i + 2]));
        }
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[i * to_stride + j] = rows[j][offset + i];
#endif
}

inline void transpose_panel(const float *panel, float *to, int64_t to_stride) { // [16][16] rows of a panel
    const float *rows[16];
    for (int i = 0; i < 16; i++) rows[i] = panel + i * kLanes;
    transpose(rows, 0, to, to_stride);
}

// Each of 16 vectors (of 16 lanes, kWidth at a time: in all [16][16 / kWidth]) reduced to one value.
template <class Reduce> inline void across(const vf *rows, const Reduce &reduce, float *to) {
#if NSA_WIDTH == 16
    auto halves = [&](int i, int by, auto low, auto high) { return reduce((vf)low(i, i + by), (vf)high(i, i + by)); };
    vf v[16]; // in registers, as all loops unroll
    auto at = [&](int i) { return (__m512)v[i]; };
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = rows[i];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v[i] = halves(i, 8, [&](int x, int y) { return _mm512_shuffle_f32x4(at(x), at(y), 0x44); },
                      [&](int x, int y) { return _mm512_shuffle_f32x4(at(x), at(y), 0xee); });
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        v[i] = halves(i, 4, [&](int x, int y) { return _mm512_shuffle_f32x4(at(x), at(y), 0x88); },
                      [&](int x, int y) { return _mm512_shuffle_f32x4(at(x), at(y), 0xdd); });
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        v[i] = halves(i, 2, [&](int x, int y) { return _mm512_shuffle_ps(at(x), at(y), 0x44); },
                      [&](int x, int y) { return _mm512_shuffle_ps(at(x), at(y), 0xee); });
    v[0] = halves(0, 1, [&](int x, int y) { return _mm512_shuffle_ps(at(x), at(y), 0x88); },
                  [&](int x, int y) { return _mm512_shuffle_ps(at(x), at(y), 0xdd); });
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    store(to, (vf)_mm512_permutexvar_ps(order, at(0)));
#else
    for (int i = 0; i < 16; i++) {
        vf all = rows[i];
        for (int j = 1; j < kWidth; j++) all = reduce(all, splat(rows[i][j]));
        to[i] = all[0];
    }
#endif
}

// One or two tiles of 16 rows times a matrix: C[i] = A[i] * B, with A[i] [16, k] at a stride, B and C[i] in panels of 16 columns.
template <class In> struct Times {
    const In *a[2]; // the second or nullptr
    int64_t stride[2], k;
    const In *b;
    int64_t panels, panel_size; // even; elements from one to the next
    float *c[2];

    const In *panel(int64_t j) const { return b + j * panel_size; }
    float *result(int i, int64_t j) const { return c[i] + j * kLanes * kLanes; }
};

// ---- the fp32 engine
//
// An engine multiplies C[j] += A * B[j]: A is [m, k], its rows at a stride, and each panel j of 16 columns has B[j] of k rows and
// C[j] of m rows.
// `In` is what it multiplies; how B lies in memory is the engine's, m is a multiple of 16 and k of 32.

struct Simd {
    using In = float;
    static constexpr bool kRough = false; // whether a weight has so few digits that a rough exponential does
#if NSA_WIDTH == 16
    using Session = FlushToZero; // what a thread needs while it works
#else
    using Session = NoSession;
#endif

    static bool direct(int32_t type) { return type == NSA_FLOAT32; }
    static void convert(int32_t type, const void *from, int64_t count, bool negate, In *to) {
        read_row(type, from, count, to);
        if (negate)
            for (int64_t i = 0; i < count; i++) to[i] = -to[i];
    }
    // B of one panel from its 16 columns, each of k.
    static void pack_columns(const In *const *columns, int64_t k, In *to) {
        for (int64_t i = 0; i < k; i += 16) transpose(columns, i, to + i * kLanes, kLanes);
    }
    // B of dim / 16 panels, `panel` elements apart, from 16 of their rows.
    static void pack_rows(const In *const *rows, int64_t dim, In *to, int64_t panel) {
        for (int64_t j = 0; j < dim / 16; j++)
            for (int i = 0; i < 16; i++) memcpy(to + j * panel + i * kLanes, rows[i] + j * 16, 64);
    }
    // Rows i and i + 1 (i even) of a panel's B, at a lane.
    static void put_pair(In *panel, int64_t i, int lane, vf x, vf y) {
        store(panel + i * kLanes + lane, x);
        store(panel + (i + 1) * kLanes + lane, y);
    }
    // 32 lanes of a row of A, at a lane of the first 16.
    static void put_row(In *row, int lane, vf x, vf y) {
        store(row + lane, x);
        store(row + kLanes + lane, y);
    }

    template <int panels, bool accumulate>
    static void multiply(const In *a, int64_t stride, int64_t m, int64_t k, const In *const *b, float *const *c) {
        for (int64_t i = 0; i < m; i += 16) tile<panels, accumulate>(a + i * stride, stride, k, b, c, i);
    }
    template <bool accumulate> static void multiply(const Times<In> &x) {
        for (int i = 0; i < 2 && x.a[i]; i++)
            for (int64_t j = 0; j < x.panels; j += 2) {
                const In *b[] = {x.panel(j), x.panel(j + 1)};
                float *c[] = {x.result(i, j), x.result(i, j + 1)};
                tile<2, accumulate>(x.a[i], x.stride[i], x.k, b, c, 0);
            }
    }

  private:
    template <int panels, bool accumulate>
    static void tile(const In *a, int64_t stride, int64_t k, const In *const *b, float *const *c, int64_t row) {
#if NSA_WIDTH == 16
        for (int64_t i = 0; i < 16; i += 8) block<8, panels, accumulate>(a + i * stride, stride, k, b, c, row + i);
#else
        for (int j = 0; j < panels; j++)
            for (int64_t i = 0; i < 16; i += 4) block<4, 1, accumulate>(a + i * stride, stride, k, b + j, c + j, row + i);
#endif
    }
    template <int height, int panels, bool accumulate>
    static void block(const In *a, int64_t stride, int64_t k, const In *const *b, float *const *c, int64_t row) {
        constexpr int in_panel = kLanes / kWidth, wide = panels * in_panel;
        vf total[height][wide];
        for (int r = 0; r < height; r++)
            for (int n = 0; n < wide; n++)
                total[r][n] = accumulate ? load(c[n / in_panel] + (row + r) * kLanes + n % in_panel * kWidth) : vf{};
        for (int64_t i = 0; i < k; i++) {
            vf column[wide];
            for (int n = 0; n < wide; n++) column[n] = load(b[n / in_panel] + i * kLanes + n % in_panel * kWidth);
            for (int r = 0; r < height; r++)
                for (int n = 0; n < wide; n++) total[r][n] += splat(a[r * stride + i]) * column[n];
        }
        for (int r = 0; r < height; r++)
            for (int n = 0; n < wide; n++) store(c[n / in_panel] + (row + r) * kLanes + n % in_panel * kWidth, total[r][n]);
    }
};
