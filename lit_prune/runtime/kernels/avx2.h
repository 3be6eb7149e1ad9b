// The form for AVX2: for every mask byte, a table gives the byte shuffle that moves the next kept values to their
// places among 8 inputs, and zeros to the other places.

#pragma once

#include "packed.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define AVX2_INLINE AVX2 __attribute__((always_inline)) inline

namespace packed {

// Byte shuffles by mask byte; 0x80 gives zero.
struct Shuffles {
    alignas(64) uint8_t words[256][16];     // for 8 values of 16 bits
    alignas(64) uint8_t upper[256][32];     // the same, to the upper halves of 32 bits: that makes floats of bfloat16
    alignas(64) uint8_t bytes[3][256][8];   // for 8 values of 8 bits that follow 0, 4 or 8 others
    alignas(64) uint64_t halves[256];       // bits to deposit 4-bit values in the low halves of 8 bytes

    Shuffles() {
        for (int m = 0; m < 256; m++) {
            int kept = 0;
            halves[m] = 0;
            for (int j = 0; j < 8; j++) {
                bool keep = m >> j & 1;
                words[m][2 * j] = uint8_t(keep ? 2 * kept : 0x80);
                words[m][2 * j + 1] = uint8_t(keep ? 2 * kept + 1 : 0x80);
                std::memset(&upper[m][4 * j], 0x80, 2);
                std::memcpy(&upper[m][4 * j + 2], &words[m][2 * j], 2);
                for (int k = 0; k < 3; k++) bytes[k][m][j] = uint8_t(keep ? kept + 4 * k : 0x80);
                halves[m] |= keep ? uint64_t(15) << 8 * j : 0;
                kept += keep;
            }
        }
    }
};
const Shuffles SHUFFLES;

// FOUR: every mask byte keeps four weights, as in 2:4 and 4:8, and nothing has to be counted.
template <bool FOUR>
struct Avx2Rows {
    // Reads a row's values, at most 16 bytes at a time, from the end of the values at the latest: see `Weight`.
    template <bool MASKED, int KIND>
    struct Reader {
        const uint8_t* values;
        const uint8_t* mask;
        uint64_t half = 0;  // place of the next 4-bit value, in halves of bytes

        AVX2_INLINE void start(const Weight& w, int row) {
            values = w.values_of(row);
            mask = w.mask_of(row);
        }

        AVX2_INLINE void fetch_ahead() const {
            _mm_prefetch(reinterpret_cast<const char*>(values + half / 2) + 2048, _MM_HINT_T0);
            if (MASKED) _mm_prefetch(reinterpret_cast<const char*>(mask) + 512, _MM_HINT_T0);
        }

        // The next 8 inputs' values of 16 bits.
        AVX2_INLINE __m256 next_words() {
            const __m128i* from = reinterpret_cast<const __m128i*>(values);
            const uint64_t keep = MASKED ? next_mask() : 255;
            values += 2 * (FOUR ? 4 : MASKED ? __builtin_popcountll(keep) : 8);
            if (KIND == FLOAT16) {
                const __m128i* places = reinterpret_cast<const __m128i*>(SHUFFLES.words[keep]);
                const __m128i words = _mm_loadu_si128(from);
                return _mm256_cvtph_ps(MASKED ? _mm_shuffle_epi8(words, _mm_load_si128(places)) : words);
            }
            if (!MASKED) {
                return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16));
            }
            const __m256i* places = reinterpret_cast<const __m256i*>(SHUFFLES.upper[keep]);
            const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
            return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256(places)));
        }

        AVX2_INLINE uint64_t next_mask() {
            uint64_t keep = *mask++;
            __asm__("" : "+r"(keep));  // a register: the compiler would read it once more for every use
            return keep;
        }

        // The next 16 inputs' values of 8 or 4 bits, as bytes.
        AVX2_INLINE __m128i next_bytes() { return KIND == INT8 ? next_whole_bytes() : next_halves(); }

        AVX2_INLINE __m128i next_whole_bytes() {
            if (!MASKED) {
                values += 16;
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values - 16));
            }
            const uint64_t low = next_mask(), high = next_mask();
            if (FOUR) {
                const __m128i kept = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
                values += 8;
                return _mm_shuffle_epi8(kept, join(SHUFFLES.bytes[0][low], SHUFFLES.bytes[1][high]));
            }
            const uint8_t* second = values + __builtin_popcountll(low);
            const __m128i kept = join(values, second);
            const __m128i places = join(SHUFFLES.bytes[0][low], SHUFFLES.bytes[2][high]);
            values = second + __builtin_popcountll(high);
            return _mm_shuffle_epi8(kept, places);
        }

        // A vector of twice 8 bytes.
        AVX2_INLINE static __m128i join(const uint8_t* low, const uint8_t* high) {
            const __m128 first = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)));
            return _mm_castps_si128(_mm_loadh_pi(first, reinterpret_cast<const __m64*>(high)));
        }

        AVX2_INLINE __m128i next_halves() {
            uint64_t parts[2];
            for (int k = 0; k < 2; k++) {
                const uint64_t keep = MASKED ? next_mask() : 255;
                uint64_t packed;
                std::memcpy(&packed, values + half / 2, 8);
                parts[k] = _pdep_u64(FOUR ? packed : packed >> half % 2 * 4, SHUFFLES.halves[keep]);
                half += FOUR ? 4 : MASKED ? __builtin_popcountll(keep) : 8;
            }
            const __m128i signs = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
            return _mm_shuffle_epi8(signs, _mm_set_epi64x(int64_t(parts[1]), int64_t(parts[0])));
        }
    };

    template <bool MASKED, int KIND, int TOKENS>
    AVX2 static void rows(const Weight& w, const Inputs& in, float* y, int first, int last) {
        // Several rows at once, far apart: long streams from several places hide the latency of the memory.
        constexpr int TOGETHER = TOKENS == 1 && !MASKED ? 4 : TOKENS <= 2 ? 2 : 1;
        const int apart = (last - first) / TOGETHER, rest = first + apart * TOGETHER;
        for (int r = first; r < first + apart; r++) some_rows<MASKED, KIND, TOKENS, TOGETHER>(w, in, y, r, apart);
        for (int r = rest; r < last; r++) some_rows<MASKED, KIND, TOKENS, 1>(w, in, y, r, 0);
    }

    template <bool MASKED, int KIND, int TOKENS, int ROWS>
    AVX2_INLINE static void some_rows(const Weight& w, const Inputs& in, float* y, int first, int apart) {
        Reader<MASKED, KIND> readers[ROWS];
        __m256 sums[ROWS][TOKENS];
        for (int r = 0; r < ROWS; r++) {
            readers[r].start(w, first + r * apart);
            for (int t = 0; t < TOKENS; t++) sums[r][t] = _mm256_setzero_ps();
        }
        for (int c = 0; c < w.chunks; c++) {
            if (is_16_bits(KIND)) {
                multiply_words(readers, in, c, sums);
            } else {
                multiply_bytes(w, readers, in, first, apart, c, sums);
            }
            for (int r = 0; r < ROWS; r++) readers[r].fetch_ahead();
        }
        for (int r = 0; r < ROWS; r++) {
            const float scale = KIND == INT8 ? w.scale_of(first + r * apart, 0) : 1.0f;
            for (int t = 0; t < TOKENS; t++) y[size_t(t) * w.outputs + first + r * apart] = scale * sum_of(sums[r][t]);
        }
    }

    template <bool MASKED, int KIND, int TOKENS, int ROWS>
    AVX2_INLINE static void multiply_words(
        Reader<MASKED, KIND> (&readers)[ROWS], const Inputs& in, int chunk, __m256 (&sums)[ROWS][TOKENS]) {
        for (int k = 0; k < CHUNK / 8; k++) {
            for (int r = 0; r < ROWS; r++) {
                const __m256 values = readers[r].next_words();
                for (int t = 0; t < TOKENS; t++) {
                    const float* x = &in.floats[size_t(t) * in.width + chunk * CHUNK + 8 * k];
                    sums[r][t] = _mm256_fmadd_ps(values, _mm256_loadu_ps(x), sums[r][t]);
                }
            }
        }
    }

    template <bool MASKED, int KIND, int TOKENS, int ROWS>
    AVX2_INLINE static void multiply_bytes(
        const Weight& w, Reader<MASKED, KIND> (&readers)[ROWS], const Inputs& in, int first, int apart, int chunk,
        __m256 (&sums)[ROWS][TOKENS]) {
        const __m256i ones = _mm256_set1_epi16(1);
        for (int h = 0; h < 2; h++) {
            for (int r = 0; r < ROWS; r++) {
                const __m128i low = readers[r].next_bytes(), high = readers[r].next_bytes();
                const __m256i values = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
                const float scale = KIND == INT8 ? 1.0f : w.scale_of(first + r * apart, chunk);
                for (int t = 0; t < TOKENS; t++) {
                    const size_t at = size_t(t) * in.width + chunk * CHUNK + PART * h;
                    const __m256i x = load_bytes(&in.rounded[at]), size = load_bytes(&in.sizes[at]);
                    // |x| · (w with the sign of x): the instruction takes one unsigned factor.
                    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(values, x));
                    const __m256 total = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
                    const __m256 factor = _mm256_set1_ps(scale * in.scales_of(t, chunk)[h]);
                    sums[r][t] = _mm256_fmadd_ps(total, factor, sums[r][t]);
                }
            }
        }
    }

    AVX2_INLINE static __m256i load_bytes(const int8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }

    AVX2_INLINE static float sum_of(__m256 v) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }

    template <bool MASKED, int KIND>
    AVX2 static void expand(const Weight& w, int first, int last, int inputs, float* out) {
        for (int r = first; r < last; r++, out += inputs) {
            Reader<MASKED, KIND> reader;
            reader.start(w, r);
            alignas(32) float buffer[CHUNK];
            for (int c = 0; c < w.chunks; c++) {
                const int count = inputs - c * CHUNK;
                float* to = count >= CHUNK ? out + c * CHUNK : buffer;
                if (is_16_bits(KIND)) {
                    for (int k = 0; k < 8; k++) _mm256_storeu_ps(to + 8 * k, reader.next_words());
                } else {
                    const __m256 scale = _mm256_set1_ps(w.scale_of(r, c));
                    for (int k = 0; k < 4; k++) {
                        const __m128i bytes = reader.next_bytes();
                        const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                        const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
                        _mm256_storeu_ps(to + 16 * k, _mm256_mul_ps(low, scale));
                        _mm256_storeu_ps(to + 16 * k + 8, _mm256_mul_ps(high, scale));
                    }
                }
                if (count < CHUNK) std::memcpy(out + c * CHUNK, buffer, sizeof(float) * count);
            }
        }
    }
};

struct Avx2 {
    static constexpr const char* NAME = "AVX2";

    static bool available() {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    }

    AVX2 static void prepare(const Weight& w, const float* x, int inputs, Inputs& in) {
        is_16_bits(w.kind) ? copy_inputs(x, inputs, in) : round_inputs(x, inputs, in);
    }

    static Rows rows_for(const Weight& w, int tokens) {
        if (w.kept_of_8 == 4) return rows_of<Avx2Rows<true>, true>(w.kind, tokens);
        return rows_of<Avx2Rows<false>>(w, tokens);
    }

    static Expand expand_for(const Weight& w) { return expand_of<Avx2Rows<false>>(w); }
};

}  // namespace packed
#endif
