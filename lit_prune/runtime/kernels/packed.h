// What all forms of the kernel share: the packed weight, the prepared inputs, and the choice of a function at run time.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace packed {

constexpr int CHUNK = 64;
constexpr int PART = 32;  // inputs that share a scale
constexpr int MOST_TOKENS = 8;

enum Kind : int32_t { BFLOAT16 = 0, FLOAT16 = 1, INT8 = 2, INT4 = 3 };

constexpr bool is_16_bits(int kind) { return kind == BFLOAT16 || kind == FLOAT16; }

// One packed weight. All pointers are borrowed.
struct Weight {
    const uint8_t* mask;      // [outputs, 8 * chunks], least significant bit first; null = every weight is kept
    const void* values;       // kept values, row by row, with 64 bytes of slack; 4-bit values two per byte, low half first
    const int64_t* offsets;   // [outputs], index of each row's first value; for 4-bit values, rows start at a byte
    const uint16_t* scales;   // [outputs, groups] bfloat16, one for a row or one for a chunk; null for 16-bit values
    int32_t outputs, chunks, groups;
    int32_t kind;
    int32_t kept_of_8;  // number of values of every mask byte, if it is the same for all; else 0

    const uint8_t* mask_of(int row) const { return mask ? mask + int64_t(row) * chunks * 8 : nullptr; }

    const uint8_t* values_of(int row) const {
        return static_cast<const uint8_t*>(values) + (is_16_bits(kind) ? 2 : 1) * offsets[row];
    }

    float scale_of(int row, int chunk) const;
};

inline float widen_bfloat16(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline float Weight::scale_of(int row, int chunk) const {
    return scales ? widen_bfloat16(scales[int64_t(row) * groups + (groups == 1 ? 0 : chunk)]) : 1.0f;
}

// Activations, padded to whole chunks: as they are for 16-bit values, rounded to 8 bits for integers.
struct Inputs {
    int tokens, width;
    std::vector<float> floats;    // [tokens, width]
    std::vector<int8_t> rounded;  // [tokens, width]
    std::vector<int8_t> sizes;    // [tokens, width], absolute values of `rounded`
    std::vector<float> scales;    // [tokens, 2 * chunks]

    const float* scales_of(int token, int chunk) const { return &scales[2 * (size_t(token) * (width / CHUNK) + chunk)]; }
};

using Prepare = void (*)(const Weight& w, const float* x, int inputs, Inputs& in);
using Rows = void (*)(const Weight& w, const Inputs& in, float* y, int first, int last);
using Expand = void (*)(const Weight& w, int first, int last, int inputs, float* out);

inline void copy_inputs(const float* x, int inputs, Inputs& in) {
    in.floats.assign(size_t(in.tokens) * in.width, 0.0f);
    for (int t = 0; t < in.tokens; t++) {
        std::memcpy(&in.floats[size_t(t) * in.width], x + size_t(t) * inputs, sizeof(float) * inputs);
    }
}

// Rounds the inputs. One body for all forms, compiled once for the instructions of each.
__attribute__((always_inline)) inline void round_inputs(const float* x, int inputs, Inputs& in) {
    const int parts = in.width / PART;
    in.rounded.assign(size_t(in.tokens) * in.width, 0);
    in.sizes.assign(size_t(in.tokens) * in.width, 0);
    in.scales.assign(size_t(in.tokens) * parts, 0.0f);
    for (int t = 0; t < in.tokens; t++) {
        for (int p = 0; p * PART < inputs; p++) {
            float from[PART] = {};
            const int count = inputs - p * PART < PART ? inputs - p * PART : PART;
            std::memcpy(from, x + size_t(t) * inputs + p * PART, sizeof(float) * count);
            uint32_t bits[PART], most = 0;  // as integers, absolute values have the order of floats, and NaN the last place
            std::memcpy(bits, from, sizeof(bits));
            for (int j = 0; j < PART; j++) most = (bits[j] & 0x7fffffff) > most ? bits[j] & 0x7fffffff : most;
            float largest;
            std::memcpy(&largest, &most, 4);
            in.scales[size_t(t) * parts + p] = largest / 127.0f;
            // Of zeros nothing is left to round, and of NaN and infinity the scale alone makes the result NaN.
            const float factor = 127.0f / largest;
            if (!std::isfinite(largest) || !std::isfinite(factor)) continue;
            int8_t* rounded = &in.rounded[size_t(t) * in.width + p * PART];
            int8_t* sizes = &in.sizes[size_t(t) * in.width + p * PART];
            for (int j = 0; j < PART; j++) {
                const float whole = __builtin_nearbyintf(from[j] * factor);
                rounded[j] = int8_t(whole);
                sizes[j] = int8_t(std::fabs(whole));
            }
        }
    }
}

// The functions of a form, which has `rows<MASKED, KIND, TOKENS>` and `expand<MASKED, KIND>`, for a weight.
template <class Form, bool MASKED, int TOKENS>
Rows rows_of(int kind) {
    switch (kind) {
        case BFLOAT16: return Form::template rows<MASKED, BFLOAT16, TOKENS>;
        case FLOAT16: return Form::template rows<MASKED, FLOAT16, TOKENS>;
        case INT8: return Form::template rows<MASKED, INT8, TOKENS>;
        default: return Form::template rows<MASKED, INT4, TOKENS>;
    }
}

template <class Form, bool MASKED>
Rows rows_of(int kind, int tokens) {
    switch (tokens) {
        case 1: return rows_of<Form, MASKED, 1>(kind);
        case 2: return rows_of<Form, MASKED, 2>(kind);
        case 3: return rows_of<Form, MASKED, 3>(kind);
        case 4: return rows_of<Form, MASKED, 4>(kind);
        case 5: return rows_of<Form, MASKED, 5>(kind);
        case 6: return rows_of<Form, MASKED, 6>(kind);
        case 7: return rows_of<Form, MASKED, 7>(kind);
        default: return rows_of<Form, MASKED, 8>(kind);
    }
}

template <class Form>
Rows rows_of(const Weight& w, int tokens) {
    return w.mask ? rows_of<Form, true>(w.kind, tokens) : rows_of<Form, false>(w.kind, tokens);
}

template <class Form, bool MASKED>
Expand expand_of(int kind) {
    switch (kind) {
        case BFLOAT16: return Form::template expand<MASKED, BFLOAT16>;
        case FLOAT16: return Form::template expand<MASKED, FLOAT16>;
        case INT8: return Form::template expand<MASKED, INT8>;
        default: return Form::template expand<MASKED, INT4>;
    }
}

template <class Form>
Expand expand_of(const Weight& w) {
    return w.mask ? expand_of<Form, true>(w.kind) : expand_of<Form, false>(w.kind);
}

}  // namespace packed
