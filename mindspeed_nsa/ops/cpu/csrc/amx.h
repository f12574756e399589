// The engine of processors with AMX: bfloat16 tiles, sums in fp32. B holds pairs of rows side by side: [k / 2][16 columns][2].

struct Amx {
    using In = uint16_t;
    static constexpr bool kRough = true;

    // Of the product of four tiles of C: of one, two or four tiles of rows and four, two or one panels.
    struct Operands {
        const In *a[4];
        int64_t stride[2]; // four tiles have the first
        const In *b[4];
        float *c[4];
    };

    // Tiles of 16 rows of 64 bytes, for the life of the object.
    struct Session : FlushToZero {
        Session() {
            struct alignas(64) {
                uint8_t palette = 1, start = 0, reserved[14] = {};
                uint16_t bytes[16] = {};
                uint8_t rows[16] = {};
            } shape;
            for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
            __asm__ volatile("" : : "r"(&shape) : "memory"); // the intrinsic says it reads 8 bytes
            _tile_loadconfig(&shape);
        }
        ~Session() { _tile_release(); }
    };

    static bool direct(int32_t) { return true; }
    static void convert(int32_t, const void *from, int64_t count, bool negate, In *to) {
        memcpy(to, from, count * 2);
        if (negate)
            for (int64_t i = 0; i < count; i++) to[i] ^= 0x8000;
    }
    static void pack_columns(const In *const *columns, int64_t k, In *to) {
        const uint32_t *pairs[16];
        for (int i = 0; i < 16; i++) pairs[i] = reinterpret_cast<const uint32_t *>(columns[i]);
        for (int64_t i = 0; i < k / 2; i += 16) transpose(pairs, i, reinterpret_cast<uint32_t *>(to) + i * kLanes, kLanes);
    }
    static void pack_rows(const In *const *rows, int64_t dim, In *to, int64_t panel) {
        const __m512i low = pairing(0), high = pairing(16);
        for (int64_t j = 0; j < dim; j += 32)
            for (int i = 0; i < 16; i += 2) {
                __m512i x = _mm512_loadu_si512(rows[i] + j), y = _mm512_loadu_si512(rows[i + 1] + j);
                In *at = to + j / 16 * panel + i * kLanes;
                _mm512_storeu_si512(at, _mm512_permutex2var_epi16(x, low, y));
                _mm512_storeu_si512(at + panel, _mm512_permutex2var_epi16(x, high, y));
            }
    }
    static void put_pair(In *panel, int64_t i, int, vf x, vf y) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); // the 16 of x, then the 16 of y
        _mm512_store_si512(panel + i * kLanes, _mm512_permutexvar_epi16(interleaving(), both));
    }
    static void put_row(In *row, int, vf x, vf y) { _mm512_store_si512(row, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x)); }

    template <int panels, bool accumulate>
    static void multiply(const In *a, int64_t stride, int64_t m, int64_t k, const In *const *b, float *const *c) {
        __asm__ volatile("" ::: "memory"); // the tile loads read what was stored before
        int64_t i = 0, tile = kLanes * kLanes;
        if (panels == 2)
            for (; i + 32 <= m; i += 32)
                block<2, accumulate>({{a + i * stride, a + (i + 16) * stride}, {stride, stride}, {b[0], b[1]},
                                      {c[0] + i * 16, c[1] + i * 16, c[0] + i * 16 + tile, c[1] + i * 16 + tile}}, k);
        for (int j = 0; j < panels; j++) {
            int64_t row = i;
            for (; row + 64 <= m; row += 64) {
                const In *from = a + row * stride;
                float *to = c[j] + row * kLanes;
                block<4, accumulate>({{from, from + 16 * stride, from + 32 * stride, from + 48 * stride}, {stride}, {b[j]},
                                      {to, to + tile, to + 2 * tile, to + 3 * tile}}, k);
            }
            for (; row < m; row += 16) single<accumulate>(a + row * stride, stride, k, b[j], c[j] + row * kLanes);
        }
    }
    template <bool accumulate> static void multiply(const Times<In> &x) {
        __asm__ volatile("" ::: "memory");
        int64_t j = 0, width = x.a[1] ? 2 : 4;
        for (; j + width <= x.panels; j += width)
            x.a[1] ? block<2, accumulate>(operands(x, j), x.k) : block<1, accumulate>(operands(x, j), x.k);
        for (; j < x.panels; j++) single<accumulate>(x.a[0], x.stride[0], x.k, x.panel(j), x.result(0, j));
    }

  private:
    static __m512i pairing(int from) { // x[from], y[from], x[from + 1], ...
        alignas(64) int16_t at[32];
        for (int i = 0; i < 16; i++) at[2 * i] = int16_t(from + i), at[2 * i + 1] = int16_t(from + i + 32);
        return _mm512_load_si512(at);
    }
    static __m512i interleaving() {
        alignas(64) static const int16_t at[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return _mm512_load_si512(at);
    }

    static Operands operands(const Times<In> &x, int64_t j) {
        if (!x.a[1])
            return {{x.a[0]}, {x.stride[0]}, {x.panel(j), x.panel(j + 1), x.panel(j + 2), x.panel(j + 3)},
                    {x.result(0, j), x.result(0, j + 1), x.result(0, j + 2), x.result(0, j + 3)}};
        return {{x.a[0], x.a[1]}, {x.stride[0], x.stride[1]}, {x.panel(j), x.panel(j + 1)},
                {x.result(0, j), x.result(0, j + 1), x.result(1, j), x.result(1, j + 1)}};
    }
    template <bool accumulate> static void begin(const Operands &of) {
        if (accumulate) {
            _tile_loadd(0, of.c[0], 64);
            _tile_loadd(1, of.c[1], 64);
            _tile_loadd(2, of.c[2], 64);
            _tile_loadd(3, of.c[3], 64);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    // Adds the products of 32 columns of A, from i on, and rows of B.
    template <int tiles> static void add(const Operands &of, int64_t i) {
        const In *b = of.b[0] + i * kLanes;
        _tile_loadd(6, b, 64);
        _tile_loadd(4, of.a[0] + i, of.stride[0] * 2);
        if (tiles == 1) {
            _tile_loadd(7, of.b[1] + i * kLanes, 64);
            _tile_loadd(5, of.b[2] + i * kLanes, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(6, of.b[3] + i * kLanes, 64);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 6);
        } else if (tiles == 2) {
            _tile_loadd(7, of.b[1] + i * kLanes, 64);
            _tile_loadd(5, of.a[1] + i, of.stride[1] * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_loadd(5, of.a[1] + i, of.stride[0] * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(4, of.a[2] + i, of.stride[0] * 2);
            _tile_loadd(5, of.a[3] + i, of.stride[0] * 2);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    static void end(const Operands &of) {
        _tile_stored(0, of.c[0], 64);
        _tile_stored(1, of.c[1], 64);
        _tile_stored(2, of.c[2], 64);
        _tile_stored(3, of.c[3], 64);
    }
    template <int tiles, bool accumulate> static void block(const Operands &of, int64_t k) {
        begin<accumulate>(of);
        for (int64_t i = 0; i < k; i += 32) add<tiles>(of, i);
        end(of);
    }
    template <bool accumulate> static void single(const In *a, int64_t stride, int64_t k, const In *b, float *c) {
        if (accumulate)
            _tile_loadd(0, c, 64);
        else
            _tile_zero(0);
        for (int64_t i = 0; i < k; i += 32) {
            _tile_loadd(4, a + i, stride * 2);
            _tile_loadd(6, b + i * kLanes, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, c, 64);
    }
};
