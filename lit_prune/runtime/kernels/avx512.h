// The form for AVX-512 with VBMI2 and VNNI: one instruction moves the kept values of a chunk to their places.

#pragma once

#include "packed.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) inline

namespace packed {

constexpr int AHEAD = 2048;  // bytes of values that are fetched before they are needed

// To unpack 4-bit values: which bytes, and how far each is shifted.
struct HalvesTables {
    alignas(64) uint8_t bytes[64];      // eight values begin in byte 4 q and end in byte 4 q + 4 at the latest
    alignas(64) uint8_t shifts[2][64];  // for rows of values that begin with a low or a high half

    HalvesTables() {
        for (int j = 0; j < 64; j++) {
            bytes[j] = uint8_t(j / 8 * 4 + j % 8);
            for (int odd = 0; odd < 2; odd++) shifts[odd][j] = uint8_t((4 * (j % 8) + 4 * odd - 4) & 63);
        }
    }
};
const HalvesTables HALVES;

constexpr int32_t EVEN_AND_ODD[] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
constexpr int32_t IN_TURN[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

struct Avx512 {
    static constexpr const char* NAME = "AVX-512";

    static bool available() {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("popcnt");
    }

    AVX512 static void prepare(const Weight& w, const float* x, int inputs, Inputs& in) {
        if (!is_16_bits(w.kind)) return round_inputs(x, inputs, in);
        copy_inputs(x, inputs, in);
        if (w.kind != BFLOAT16) return;
        for (float* pairs = in.floats.data(); pairs < in.floats.data() + in.floats.size(); pairs += 32) {
            const __m512 low = _mm512_loadu_ps(pairs), high = _mm512_loadu_ps(pairs + 16);
            _mm512_storeu_ps(pairs, _mm512_permutex2var_ps(low, load_indices(EVEN_AND_ODD), high));
            _mm512_storeu_ps(pairs + 16, _mm512_permutex2var_ps(low, load_indices(EVEN_AND_ODD + 16), high));
        }
    }

    AVX512_INLINE static __m512i load_indices(const int32_t* from) { return _mm512_loadu_si512(from); }

    // Reads a row's values chunk by chunk, 64 bytes at a time, from the end of the values at the latest: see `Weight`.
    template <bool MASKED, int KIND>
    struct Reader {
        const uint8_t* values;
        const uint8_t* mask;
        uint64_t half = 0;  // place of the next 4-bit value, in halves of bytes

        AVX512_INLINE void start(const Weight& w, int row) {
            values = w.values_of(row);
            mask = w.mask_of(row);
        }

        AVX512_INLINE uint64_t next_mask() {
            uint64_t keep = ~uint64_t(0);
            _mm_prefetch(reinterpret_cast<const char*>(values + half / 2) + AHEAD, _MM_HINT_T0);
            if (MASKED) {
                std::memcpy(&keep, mask, 8);
                mask += 8;
                _mm_prefetch(reinterpret_cast<const char*>(mask) + AHEAD / 4, _MM_HINT_T0);
            }
            return keep;
        }

        // The next 32 inputs' values of 16 bits: of float16 the first 16 and the others, of bfloat16 the even ones and
        // the odd ones, which `prepare` has done with the inputs too. Both keep work from the unit that expands.
        AVX512_INLINE void next_words(uint32_t keep, __m512& one, __m512& other) {
            __m512i words = _mm512_loadu_si512(values);
            if (MASKED) words = _mm512_maskz_expand_epi16(keep, words);
            values += 2 * (MASKED ? __builtin_popcount(keep) : 32);
            if (KIND == FLOAT16) {
                if (MASKED) __asm__("" : "+m"(words));  // by way of memory
                const __m256i* halves = reinterpret_cast<const __m256i*>(&words);
                one = _mm512_cvtph_ps(_mm256_load_si256(halves));
                other = _mm512_cvtph_ps(_mm256_load_si256(halves + 1));
            } else {
                one = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
                other = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int32_t(0xffff0000))));
            }
        }

        // The next chunk's values as bytes, which for 4 bits are 16 times the values.
        AVX512_INLINE __m512i next_bytes() {
            const uint64_t keep = next_mask();
            const int count = MASKED ? __builtin_popcountll(keep) : CHUNK;
            __m512i packed;
            if (KIND == INT8) {
                packed = _mm512_loadu_si512(values);
                values += count;
            } else {
                packed = unpack_halves();
                half += count;
            }
            return MASKED ? _mm512_maskz_expand_epi8(keep, packed) : packed;
        }

        // The next 64 values of 4 bits in the high halves of bytes.
        AVX512_INLINE __m512i unpack_halves() const {
            const uint8_t* at = values + half / 2;
            const __m512i from = MASKED ? _mm512_loadu_si512(at)
                                        : _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)at));
            const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(HALVES.bytes), from);
            const __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(HALVES.shifts[half % 2]), bytes);
            return _mm512_and_si512(shifted, _mm512_set1_epi8(int8_t(0xf0)));
        }
    };

    template <bool MASKED, int KIND, int TOKENS>
    AVX512 static void rows(const Weight& w, const Inputs& in, float* y, int first, int last) {
        // Several rows at once, far apart: long streams from several places hide the latency of the memory.
        constexpr int TOGETHER = TOKENS == 1 ? 4 : 2;
        const int apart = (last - first) / TOGETHER, rest = first + apart * TOGETHER;
        for (int r = first; r < first + apart; r++) some_rows<MASKED, KIND, TOKENS, TOGETHER>(w, in, y, r, apart);
        for (int r = rest; r < last; r++) some_rows<MASKED, KIND, TOKENS, 1>(w, in, y, r, 0);
    }

    template <bool MASKED, int KIND, int TOKENS, int ROWS>
    AVX512_INLINE static void some_rows(const Weight& w, const Inputs& in, float* y, int first, int apart) {
        Reader<MASKED, KIND> readers[ROWS];
        __m512 sums[ROWS][TOKENS];
        for (int r = 0; r < ROWS; r++) {
            readers[r].start(w, first + r * apart);
            for (int t = 0; t < TOKENS; t++) sums[r][t] = _mm512_setzero_ps();
        }
        for (int c = 0; c < w.chunks; c++) {
            if (is_16_bits(KIND)) {
                multiply_words(readers, in, c, sums);
            } else {
                multiply_bytes(w, readers, in, first, apart, c, sums);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            const float scale = KIND == INT8 ? w.scale_of(first + r * apart, 0) : 1.0f;
            for (int t = 0; t < TOKENS; t++) {
                y[size_t(t) * w.outputs + first + r * apart] = scale * _mm512_reduce_add_ps(sums[r][t]);
            }
        }
    }

    template <bool MASKED, int KIND, int TOKENS, int ROWS>
    AVX512_INLINE static void multiply_words(
        Reader<MASKED, KIND> (&readers)[ROWS], const Inputs& in, int chunk, __m512 (&sums)[ROWS][TOKENS]) {
        for (int r = 0; r < ROWS; r++) {
            const uint64_t keep = readers[r].next_mask();
            for (int h = 0; h < 2; h++) {
                __m512 one, other;
                readers[r].next_words(uint32_t(keep >> 32 * h), one, other);
                for (int t = 0; t < TOKENS; t++) {
                    const float* x = &in.floats[size_t(t) * in.width + chunk * CHUNK + 32 * h];
                    sums[r][t] = _mm512_fmadd_ps(one, _mm512_loadu_ps(x), sums[r][t]);
                    sums[r][t] = _mm512_fmadd_ps(other, _mm512_loadu_ps(x + 16), sums[r][t]);
                }
            }
        }
    }

    template <bool MASKED, int KIND, int TOKENS, int ROWS>
    AVX512_INLINE static void multiply_bytes(
        const Weight& w, Reader<MASKED, KIND> (&readers)[ROWS], const Inputs& in, int first, int apart, int chunk,
        __m512 (&sums)[ROWS][TOKENS]) {
        // The instruction wants unsigned inputs: it gets x + 128, and 128 times the sum of the values is taken off.
        const __m512i zero = _mm512_setzero_si512(), shift = _mm512_set1_epi8(int8_t(128));
        __m512i values[ROWS], start[ROWS];
        for (int r = 0; r < ROWS; r++) {
            values[r] = readers[r].next_bytes();
            start[r] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, shift, values[r]));
        }
        for (int t = 0; t < TOKENS; t++) {
            const __m512i x = _mm512_loadu_si512(&in.rounded[size_t(t) * in.width + chunk * CHUNK]);
            double pair;  // the scales of the two halves
            std::memcpy(&pair, in.scales_of(t, chunk), 8);
            const __m512i places = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
            const __m512 scales = _mm512_permutexvar_ps(places, _mm512_castpd_ps(_mm512_set1_pd(pair)));
            for (int r = 0; r < ROWS; r++) {
                const __m512i total = _mm512_dpbusd_epi32(start[r], _mm512_xor_si512(x, shift), values[r]);
                const __m512 factor =
                    KIND == INT8 ? scales : _mm512_mul_ps(scales, _mm512_set1_ps(w.scale_of(first + r * apart, chunk) / 16));
                sums[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), factor, sums[r][t]);
            }
        }
    }

    template <bool MASKED, int KIND>
    AVX512 static void expand(const Weight& w, int first, int last, int inputs, float* out) {
        for (int r = first; r < last; r++, out += inputs) {
            Reader<MASKED, KIND> reader;
            reader.start(w, r);
            for (int c = 0; c < w.chunks; c++) {
                __m512 quarters[4];
                if (is_16_bits(KIND)) {
                    const uint64_t keep = reader.next_mask();
                    for (int h = 0; h < 2; h++) {
                        __m512 one, other;
                        reader.next_words(uint32_t(keep >> 32 * h), one, other);
                        quarters[2 * h] = KIND == FLOAT16 ? one : _mm512_permutex2var_ps(one, load_indices(IN_TURN), other);
                        quarters[2 * h + 1] =
                            KIND == FLOAT16 ? other : _mm512_permutex2var_ps(one, load_indices(IN_TURN + 16), other);
                    }
                } else {
                    alignas(64) int8_t bytes[CHUNK];
                    _mm512_store_si512(bytes, reader.next_bytes());
                    const __m512 scale = _mm512_set1_ps(w.scale_of(r, c) / (KIND == INT4 ? 16 : 1));
                    for (int q = 0; q < 4; q++) {
                        const __m128i quarter = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes + 16 * q));
                        quarters[q] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter)), scale);
                    }
                }
                for (int q = 0; q < 4; q++) {
                    const int at = c * CHUNK + 16 * q, count = inputs - at;
                    const __mmask16 used = count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1;
                    _mm512_mask_storeu_ps(out + at, used, quarters[q]);
                }
            }
        }
    }

    static Rows rows_for(const Weight& w, int tokens) { return rows_of<Avx512>(w, tokens); }

    static Expand expand_for(const Weight& w) { return expand_of<Avx512>(w); }
};

}  // namespace packed
#endif
