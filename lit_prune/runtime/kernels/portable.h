// The portable form of the kernel, and the meaning of the others.

#pragma once

#include "packed.h"

namespace packed {

inline float widen_float16(uint16_t bits) {
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

struct Portable {
    static constexpr const char* NAME = "portable";

    static bool available() { return true; }

    static void prepare(const Weight& w, const float* x, int inputs, Inputs& in) {
        is_16_bits(w.kind) ? copy_inputs(x, inputs, in) : round_inputs(x, inputs, in);
    }

    // Reads a row's kept values one after the other.
    struct Reader {
        const Weight& weight;
        const uint8_t* values;
        int64_t position = 0;

        Reader(const Weight& w, int row) : weight(w), values(w.values_of(row)) {}

        float next() {
            const int64_t at = position++;
            switch (weight.kind) {
                case BFLOAT16: return widen_bfloat16(reinterpret_cast<const uint16_t*>(values)[at]);
                case FLOAT16: return widen_float16(reinterpret_cast<const uint16_t*>(values)[at]);
                case INT8: return reinterpret_cast<const int8_t*>(values)[at];
                default: {
                    int half = values[at / 2] >> (at % 2 * 4) & 15;
                    return float(half < 8 ? half : half - 16);
                }
            }
        }

        // Writes the next chunk as 64 floats, without its scale.
        void next_chunk(const uint8_t* mask, float* out) {
            for (int j = 0; j < CHUNK; j++) out[j] = !mask || (mask[j / 8] >> (j % 8) & 1) ? next() : 0.0f;
        }
    };

    static void rows(const Weight& w, const Inputs& in, float* y, int first, int last) {
        float values[CHUNK];
        for (int r = first; r < last; r++) {
            Reader reader(w, r);
            float sums[MOST_TOKENS] = {};
            for (int c = 0; c < w.chunks; c++) {
                reader.next_chunk(w.mask ? w.mask_of(r) + 8 * c : nullptr, values);
                const float scale = w.scale_of(r, c);
                for (int t = 0; t < in.tokens; t++) {
                    size_t at = size_t(t) * in.width + c * CHUNK;
                    if (is_16_bits(w.kind)) {
                        for (int j = 0; j < CHUNK; j++) sums[t] += values[j] * in.floats[at + j];
                        continue;
                    }
                    for (int h = 0; h < CHUNK / PART; h++, at += PART) {
                        float sum = 0.0f;
                        for (int j = 0; j < PART; j++) sum += values[h * PART + j] * float(in.rounded[at + j]);
                        sums[t] += sum * scale * in.scales_of(t, c)[h];
                    }
                }
            }
            for (int t = 0; t < in.tokens; t++) y[size_t(t) * w.outputs + r] = sums[t];
        }
    }

    static void expand(const Weight& w, int first, int last, int inputs, float* out) {
        float values[CHUNK];
        for (int r = first; r < last; r++, out += inputs) {
            Reader reader(w, r);
            for (int c = 0; c < w.chunks; c++) {
                reader.next_chunk(w.mask ? w.mask_of(r) + 8 * c : nullptr, values);
                const int count = inputs - c * CHUNK < CHUNK ? inputs - c * CHUNK : CHUNK;
                const float scale = w.scale_of(r, c);
                for (int j = 0; j < count; j++) out[c * CHUNK + j] = values[j] * scale;
            }
        }
    }

    static Rows rows_for(const Weight&, int) { return rows; }

    static Expand expand_for(const Weight&) { return expand; }
};

}  // namespace packed
