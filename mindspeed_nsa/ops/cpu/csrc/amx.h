// The engine of processors with AMX: bfloat16 tiles, sums in fp32. B holds pairs of rows side by side: [k / 2][16 columns][2].

struct Amx {
    using In = uint16_t;

    // Tiles of 16 rows of 64 bytes, for the life of the object.
    struct Session {
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
        Session(const Session &) = delete;
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
    static void multiply(const In *a, int64_t m, int64_t k, const In *const *b, float *const *c) {
        __asm__ volatile("" ::: "memory"); // the tile loads read what was stored before
        int64_t i = 0;
        if (panels == 2)
            for (; i + 32 <= m; i += 32) block_2x2<accumulate>(a + i * k, k, b[0], b[1], c[0] + i * kLanes, c[1] + i * kLanes);
        for (int j = 0; j < panels; j++) {
            int64_t row = i;
            for (; row + 64 <= m; row += 64) block_4x1<accumulate>(a + row * k, k, b[j], c[j] + row * kLanes);
            for (; row < m; row += 16) block_1x1<accumulate>(a + row * k, k, b[j], c[j] + row * kLanes);
        }
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

    template <bool accumulate>
    static void block_2x2(const In *a, int64_t k, const In *b0, const In *b1, float *c0, float *c1) {
        if (accumulate) {
            _tile_loadd(0, c0, 64);
            _tile_loadd(1, c1, 64);
            _tile_loadd(2, c0 + 256, 64);
            _tile_loadd(3, c1 + 256, 64);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t i = 0; i < k; i += 32) {
            _tile_loadd(4, a + i, k * 2);
            _tile_loadd(6, b0 + i * kLanes, 64);
            _tile_loadd(7, b1 + i * kLanes, 64);
            _tile_loadd(5, a + 16 * k + i, k * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c0, 64);
        _tile_stored(1, c1, 64);
        _tile_stored(2, c0 + 256, 64);
        _tile_stored(3, c1 + 256, 64);
    }

    template <bool accumulate> static void block_4x1(const In *a, int64_t k, const In *b, float *c) {
        if (accumulate) {
            _tile_loadd(0, c, 64);
            _tile_loadd(1, c + 256, 64);
            _tile_loadd(2, c + 512, 64);
            _tile_loadd(3, c + 768, 64);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t i = 0; i < k; i += 32) {
            _tile_loadd(6, b + i * kLanes, 64);
            _tile_loadd(4, a + i, k * 2);
            _tile_loadd(5, a + 16 * k + i, k * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(4, a + 32 * k + i, k * 2);
            _tile_loadd(5, a + 48 * k + i, k * 2);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 5, 6);
        }
        _tile_stored(0, c, 64);
        _tile_stored(1, c + 256, 64);
        _tile_stored(2, c + 512, 64);
        _tile_stored(3, c + 768, 64);
    }

    template <bool accumulate> static void block_1x1(const In *a, int64_t k, const In *b, float *c) {
        if (accumulate)
            _tile_loadd(0, c, 64);
        else
            _tile_zero(0);
        for (int64_t i = 0; i < k; i += 32) {
            _tile_loadd(4, a + i, k * 2);
            _tile_loadd(6, b + i * kLanes, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, c, 64);
    }
};
