// Products of packed weights and a few tokens on CPUs: y = x Wᵀ for W [o, i], its kept values in sequence and one mask
// bit per weight. See lit_prune/ops/packing.py for the format and lit_prune/runtime/cpu_kernel.py for the interface.
//
// The inputs of a row are processed in chunks of 64, whose mask is 8 bytes. For every mask byte, a table gives the byte
// shuffle that moves the next kept values to their places among 8 inputs and zeros to the other places. Values of 8 and
// 4 bits meet activations rounded to 8 bits with a scale per half chunk, so that their products are sums of integers.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#endif

namespace {

constexpr int CHUNK = 64;
constexpr int PART = 32;  // activations that share a scale
constexpr int MOST_TOKENS = 8;

enum Kind : int32_t { BFLOAT16 = 0, FLOAT16 = 1, INT8 = 2, INT4 = 3 };

}  // namespace

extern "C" {

// One packed weight. All pointers are borrowed.
struct Weight {
    const uint8_t* mask;      // [outputs, 8 * chunks], least significant bit first; null = every weight is kept
    const void* values;       // kept values, row by row, with 64 bytes of slack; 4-bit values two per byte, low half first
    const int64_t* offsets;   // [outputs], index of each row's first value; for 4-bit values, rows start at a byte
    const uint16_t* scales;   // [outputs, groups] bfloat16; null for 16-bit values
    int32_t outputs, chunks, groups;
    int32_t kind;
};

}  // extern "C"

namespace {

float widen_bfloat16(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

float widen_float16(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) {  // zero and subnormal numbers
        float value = std::ldexp(float(fraction), -24);
        return sign ? -value : value;
    }
    uint32_t word = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// Reads kept values one after the other.
struct Reader {
    const Weight& weight;
    int64_t position;  // in values; for 4 bits, in halves of bytes

    Reader(const Weight& w, int row) : weight(w), position(w.kind == INT4 ? 2 * w.offsets[row] : w.offsets[row]) {}

    float next() {
        int64_t at = position++;
        switch (weight.kind) {
            case BFLOAT16: return widen_bfloat16(static_cast<const uint16_t*>(weight.values)[at]);
            case FLOAT16: return widen_float16(static_cast<const uint16_t*>(weight.values)[at]);
            case INT8: return static_cast<const int8_t*>(weight.values)[at];
            default: {
                int half = static_cast<const uint8_t*>(weight.values)[at / 2] >> (at % 2 * 4) & 15;
                return float(half < 8 ? half : half - 16);
            }
        }
    }
};

// Writes a chunk of a row as 64 floats, without its scale.
void expand_chunk(Reader& reader, const uint8_t* mask, float* out) {
    for (int j = 0; j < CHUNK; j++) out[j] = !mask || (mask[j / 8] >> (j % 8) & 1) ? reader.next() : 0.0f;
}

const uint8_t* mask_of(const Weight& w, int row) {
    return w.mask ? w.mask + int64_t(row) * w.chunks * 8 : nullptr;
}

float scale_of(const Weight& w, int row, int chunk) {
    return w.scales ? widen_bfloat16(w.scales[int64_t(row) * w.groups + int64_t(chunk) * w.groups / w.chunks]) : 1.0f;
}

// Activations, padded to whole chunks.
struct Inputs {
    int tokens, width;
    std::vector<float> floats;            // [tokens, width]
    std::vector<int8_t> integers, sizes;  // [tokens, width], and their absolute values
    std::vector<float> scales;            // [tokens, 2 * chunks]

    Inputs(const float* x, int tokens, int inputs, const Weight& w) : tokens(tokens), width(w.chunks * CHUNK) {
        if (w.kind == BFLOAT16 || w.kind == FLOAT16) {
            floats.assign(size_t(tokens) * width, 0.0f);
            for (int t = 0; t < tokens; t++) std::memcpy(&floats[size_t(t) * width], x + size_t(t) * inputs, 4 * inputs);
        } else {
            quantise(x, inputs, 2 * w.chunks);
        }
    }

    void quantise(const float* x, int inputs, int parts) {
        integers.assign(size_t(tokens) * width, 0);
        sizes.assign(size_t(tokens) * width, 0);
        scales.assign(size_t(tokens) * parts, 0.0f);
        for (int t = 0; t < tokens; t++) {
            for (int c = 0; c * PART < inputs; c++) {
                const float* from = x + size_t(t) * inputs + c * PART;
                int count = inputs - c * PART < PART ? inputs - c * PART : PART;
                float largest = 0.0f;
                for (int j = 0; j < count; j++) {
                    float size = std::fabs(from[j]);
                    largest = size <= largest ? largest : size;  // not max: a NaN stays
                }
                scales[size_t(t) * parts + c] = largest / 127.0f;
                // Of zeros nothing is left to round, and of NaN and infinity the scale alone makes the result NaN.
                if (!std::isfinite(largest) || !std::isfinite(127.0f / largest)) continue;
                for (int j = 0; j < count; j++) {
                    int rounded = int(std::nearbyint(from[j] * (127.0f / largest)));
                    size_t at = size_t(t) * width + c * PART + j;
                    integers[at] = int8_t(rounded);
                    sizes[at] = int8_t(rounded < 0 ? -rounded : rounded);
                }
            }
        }
    }
};

// The portable form, and the meaning of the others.
void rows_portable(const Weight& w, const Inputs& in, float* y, int first, int last) {
    float values[CHUNK];
    for (int r = first; r < last; r++) {
        Reader reader(w, r);
        float sums[MOST_TOKENS] = {};
        for (int c = 0; c < w.chunks; c++) {
            expand_chunk(reader, w.mask ? mask_of(w, r) + 8 * c : nullptr, values);
            float scale = scale_of(w, r, c);
            for (int t = 0; t < in.tokens; t++) {
                size_t at = size_t(t) * in.width + c * CHUNK;
                if (in.integers.empty()) {
                    for (int j = 0; j < CHUNK; j++) sums[t] += values[j] * in.floats[at + j];
                    continue;
                }
                for (int h = 0; h < CHUNK / PART; h++, at += PART) {
                    float sum = 0.0f;
                    for (int j = 0; j < PART; j++) sum += values[h * PART + j] * float(in.integers[at + j]);
                    sums[t] += sum * scale * in.scales[2 * (size_t(t) * w.chunks + c) + h];
                }
            }
        }
        for (int t = 0; t < in.tokens; t++) y[size_t(t) * w.outputs + r] = sums[t];
    }
}

void expand_portable(const Weight& w, int first, int last, int inputs, float* out) {
    float values[CHUNK];
    for (int r = first; r < last; r++, out += inputs) {
        Reader reader(w, r);
        for (int c = 0; c < w.chunks; c++) {
            expand_chunk(reader, w.mask ? mask_of(w, r) + 8 * c : nullptr, values);
            int count = inputs - c * CHUNK < CHUNK ? inputs - c * CHUNK : CHUNK;
            float scale = scale_of(w, r, c);
            for (int j = 0; j < count; j++) out[c * CHUNK + j] = values[j] * scale;
        }
    }
}

#ifdef AVX2

// Byte shuffles by mask byte; 0x80 gives zero.
struct Tables {
    alignas(64) uint8_t words[256][16];  // for 8 values of 16 bits
    alignas(64) uint8_t bytes[258][8];   // for 8 values of 8 bits; the rest is read with the last row
    alignas(64) uint64_t halves[256];    // bits to deposit 4-bit values in the low halves of 8 bytes

    Tables() {
        std::memset(bytes, 0x80, sizeof(bytes));
        for (int m = 0; m < 256; m++) {
            int kept = 0;
            halves[m] = 0;
            for (int j = 0; j < 8; j++) {
                bool keep = m >> j & 1;
                words[m][2 * j] = uint8_t(keep ? 2 * kept : 0x80);
                words[m][2 * j + 1] = uint8_t(keep ? 2 * kept + 1 : 0x80);
                bytes[m][j] = uint8_t(keep ? kept : 0x80);
                halves[m] |= keep ? uint64_t(15) << 8 * j : 0;
                kept += keep;
            }
        }
    }
};
const Tables TABLES;

AVX2 inline float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

AVX2 inline __m256i load_bytes(const int8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

AVX2 inline __m256 widen(__m128i eight, bool bfloat16) {
    if (bfloat16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
    return _mm256_cvtph_ps(eight);
}

// The next 8 inputs' values of 16 bits.
template <bool MASKED>
AVX2 inline __m128i next_words(const uint16_t*& values, unsigned mask) {
    __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    if (!MASKED) {
        values += 8;
        return packed;
    }
    values += __builtin_popcount(mask);
    return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(TABLES.words[mask])));
}

template <bool MASKED, bool IS_BFLOAT16, int TOKENS>
AVX2 void rows_16_bits(const Weight& w, const Inputs& in, float* y, int first, int last) {
    for (int r = first; r < last; r++) {
        const uint16_t* values = static_cast<const uint16_t*>(w.values) + w.offsets[r];
        const uint8_t* mask = mask_of(w, r);
        __m256 sums[TOKENS], more = _mm256_setzero_ps();
        for (int t = 0; t < TOKENS; t++) sums[t] = _mm256_setzero_ps();
        const float* x = in.floats.data();
        for (int c = 0; c < w.chunks; c++, x += CHUNK) {
            for (int k = 0; k < 8; k += 2) {
                __m256 low = widen(next_words<MASKED>(values, MASKED ? mask[k] : 0), IS_BFLOAT16);
                __m256 high = widen(next_words<MASKED>(values, MASKED ? mask[k + 1] : 0), IS_BFLOAT16);
                for (int t = 0; t < TOKENS; t++) {
                    const float* at = x + size_t(t) * in.width + 8 * k;
                    sums[t] = _mm256_fmadd_ps(low, _mm256_loadu_ps(at), sums[t]);
                    __m256& other = TOKENS == 1 ? more : sums[t];  // a second chain hides the latency
                    other = _mm256_fmadd_ps(high, _mm256_loadu_ps(at + 8), other);
                }
            }
            _mm_prefetch(reinterpret_cast<const char*>(values) + 2048, _MM_HINT_T0);
            if (MASKED) {
                mask += 8;
                _mm_prefetch(reinterpret_cast<const char*>(mask) + 1024, _MM_HINT_T0);
            }
        }
        if (TOKENS == 1) sums[0] = _mm256_add_ps(sums[0], more);
        for (int t = 0; t < TOKENS; t++) y[size_t(t) * w.outputs + r] = sum_of(sums[t]);
    }
}

// The next 16 inputs' values of 8 bits.
template <bool MASKED>
AVX2 inline __m128i next_bytes(const int8_t*& values, const uint8_t* mask) {
    if (!MASKED) {
        __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        values += 16;
        return all;
    }
    __m128i parts[2];
    for (int k = 0; k < 2; k++) {
        __m128i places = _mm_loadu_si128(reinterpret_cast<const __m128i*>(TABLES.bytes[mask[k]]));
        parts[k] = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)), places);
        values += __builtin_popcount(mask[k]);
    }
    return _mm_unpacklo_epi64(parts[0], parts[1]);
}

// The next 16 inputs' values of 4 bits, as bytes.
template <bool MASKED>
AVX2 inline __m128i next_halves(const uint8_t* row, int64_t& position, const uint8_t* mask) {
    uint64_t parts[2];
    for (int k = 0; k < 2; k++) {
        unsigned bits = MASKED ? mask[k] : 255;
        uint64_t packed;
        std::memcpy(&packed, row + position / 2, 8);
        parts[k] = _pdep_u64(packed >> (position % 2 * 4), TABLES.halves[bits]);
        position += __builtin_popcount(bits);
    }
    __m128i signs = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm_shuffle_epi8(signs, _mm_set_epi64x(int64_t(parts[1]), int64_t(parts[0])));
}

template <bool MASKED, bool IS_INT8, int TOKENS>
AVX2 void rows_of_integers(const Weight& w, const Inputs& in, float* y, int first, int last) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int per_group = w.chunks / w.groups;
    for (int r = first; r < last; r++) {
        const int8_t* values = static_cast<const int8_t*>(w.values) + w.offsets[r];
        const uint8_t* row = reinterpret_cast<const uint8_t*>(values);
        const uint16_t* scales = w.scales + int64_t(r) * w.groups;
        const uint8_t* mask = mask_of(w, r);
        int64_t position = 0;
        __m256 sums[TOKENS];
        for (int t = 0; t < TOKENS; t++) sums[t] = _mm256_setzero_ps();
        for (int g = 0, c = 0; g < w.groups; g++) {
            const float scale = widen_bfloat16(scales[g]);
            for (int end = c + per_group; c < end; c++) {
                __m256i parts[2];
                for (int h = 0; h < 2; h++) {
                    __m128i low, high;
                    const uint8_t* bits = MASKED ? mask + 4 * h : nullptr;
                    if (IS_INT8) {
                        low = next_bytes<MASKED>(values, bits);
                        high = next_bytes<MASKED>(values, bits + 2 * MASKED);
                    } else {
                        low = next_halves<MASKED>(row, position, bits);
                        high = next_halves<MASKED>(row, position, bits + 2 * MASKED);
                    }
                    parts[h] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
                }
                for (int t = 0; t < TOKENS; t++) {
                    size_t at = size_t(t) * in.width + size_t(c) * CHUNK;
                    const float* factors = &in.scales[2 * (size_t(t) * w.chunks + c)];
                    for (int h = 0; h < 2; h++) {  // |x| · (w with the sign of x): maddubs takes one unsigned factor
                        __m256i x = load_bytes(&in.integers[at + 32 * h]), size = load_bytes(&in.sizes[at + 32 * h]);
                        __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(parts[h], x));
                        __m256 total = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
                        sums[t] = _mm256_fmadd_ps(total, _mm256_set1_ps(scale * factors[h]), sums[t]);
                    }
                }
                if (MASKED) mask += 8;
            }
        }
        for (int t = 0; t < TOKENS; t++) y[size_t(t) * w.outputs + r] = sum_of(sums[t]);
    }
}

template <bool MASKED, int KIND>
AVX2 void expand_rows(const Weight& w, int first, int last, int inputs, float* out) {
    alignas(32) float buffer[CHUNK];
    for (int r = first; r < last; r++, out += inputs) {
        const auto* words = static_cast<const uint16_t*>(w.values) + w.offsets[r];
        const auto* bytes = static_cast<const int8_t*>(w.values) + w.offsets[r];
        const auto* row = static_cast<const uint8_t*>(w.values) + w.offsets[r];
        const uint8_t* mask = mask_of(w, r);
        int64_t position = 0;
        for (int c = 0; c < w.chunks; c++) {
            const bool whole = (c + 1) * CHUNK <= inputs;
            float* to = whole ? out + c * CHUNK : buffer;
            __m256 scale = _mm256_set1_ps(scale_of(w, r, c));
            for (int k = 0; k < 8; k += 2) {
                const uint8_t* bits = MASKED ? mask + 8 * c + k : nullptr;
                __m256 low, high;
                if (KIND == BFLOAT16 || KIND == FLOAT16) {
                    low = widen(next_words<MASKED>(words, MASKED ? bits[0] : 0), KIND == BFLOAT16);
                    high = widen(next_words<MASKED>(words, MASKED ? bits[1] : 0), KIND == BFLOAT16);
                } else {
                    __m128i both = KIND == INT8 ? next_bytes<MASKED>(bytes, bits) : next_halves<MASKED>(row, position, bits);
                    low = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(both)), scale);
                    high = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(both, 8))), scale);
                }
                _mm256_storeu_ps(to + 8 * k, low);
                _mm256_storeu_ps(to + 8 * k + 8, high);
            }
            if (!whole) std::memcpy(out + c * CHUNK, buffer, sizeof(float) * (inputs - c * CHUNK));
        }
    }
}

using Rows = void (*)(const Weight&, const Inputs&, float*, int, int);

template <bool MASKED, int TOKENS>
Rows rows_avx2(int kind) {
    switch (kind) {
        case BFLOAT16: return rows_16_bits<MASKED, true, TOKENS>;
        case FLOAT16: return rows_16_bits<MASKED, false, TOKENS>;
        case INT8: return rows_of_integers<MASKED, true, TOKENS>;
        default: return rows_of_integers<MASKED, false, TOKENS>;
    }
}

template <bool MASKED>
auto expand_avx2(int kind) {
    switch (kind) {
        case BFLOAT16: return expand_rows<MASKED, BFLOAT16>;
        case FLOAT16: return expand_rows<MASKED, FLOAT16>;
        case INT8: return expand_rows<MASKED, INT8>;
        default: return expand_rows<MASKED, INT4>;
    }
}

template <bool MASKED>
Rows rows_avx2(int kind, int tokens) {
    switch (tokens) {
        case 1: return rows_avx2<MASKED, 1>(kind);
        case 2: return rows_avx2<MASKED, 2>(kind);
        case 3: return rows_avx2<MASKED, 3>(kind);
        case 4: return rows_avx2<MASKED, 4>(kind);
        case 5: return rows_avx2<MASKED, 5>(kind);
        case 6: return rows_avx2<MASKED, 6>(kind);
        case 7: return rows_avx2<MASKED, 7>(kind);
        default: return rows_avx2<MASKED, 8>(kind);
    }
}

#endif

bool has_avx2() {
#ifdef AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#else
    return false;
#endif
}

template <class Work>
void in_parallel(int rows, int threads, const Work& work) {
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t count = omp_get_num_threads(), mine = omp_get_thread_num();
        work(int(rows * mine / count), int(rows * (mine + 1) / count));
    }
}

}  // namespace

extern "C" {

// Returns the name of the instructions in use; `portable` asks for none.
const char* lit_prune_instructions(int portable) { return !portable && has_avx2() ? "AVX2" : "portable"; }

// y [tokens, outputs] = x [tokens, inputs] Wᵀ, for at most 8 tokens.
void lit_prune_multiply(const Weight* w, const float* x, int tokens, int inputs, float* y, int threads, int portable) {
    Inputs in(x, tokens, inputs, *w);
#ifdef AVX2
    if (!portable && has_avx2()) {
        auto rows = w->mask ? rows_avx2<true>(w->kind, tokens) : rows_avx2<false>(w->kind, tokens);
        in_parallel(w->outputs, threads, [&](int first, int last) { rows(*w, in, y, first, last); });
        return;
    }
#endif
    in_parallel(w->outputs, threads, [&](int first, int last) { rows_portable(*w, in, y, first, last); });
}

// out [last - first, inputs] = rows `first` to `last` of W, in float32.
void lit_prune_expand(const Weight* w, int first, int last, int inputs, float* out, int threads, int portable) {
    auto expand = expand_portable;
#ifdef AVX2
    if (!portable && has_avx2()) expand = w->mask ? expand_avx2<true>(w->kind) : expand_avx2<false>(w->kind);
#endif
    in_parallel(last - first, threads, [&](int from, int to) {
        expand(*w, first + from, first + to, inputs, out + int64_t(from) * inputs);
    });
}

}  // extern "C"
