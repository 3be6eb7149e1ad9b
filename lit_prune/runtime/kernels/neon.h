// The form for NEON on 64-bit ARM: as for AVX2, a table gives a byte shuffle for every mask byte.

#pragma once

#include "packed.h"

#if defined(__aarch64__)
#include "shuffles.h"

#include <arm_neon.h>

namespace packed {

struct Neon {
    static constexpr const char* NAME = "NEON";

    static bool available() { return true; }  // every processor of the family has it

    static void prepare(const Weight& w, const float* x, int inputs, Inputs& in) {
        is_16_bits(w.kind) ? copy_inputs(x, inputs, in) : round_inputs(x, inputs, in);
    }

    // Reads a row's values 8 inputs at a time, at most 16 bytes from the end of the values at the latest: see `Weight`.
    template <bool MASKED, int KIND>
    struct Reader {
        const uint8_t* values;
        const uint8_t* mask;
        uint64_t half = 0;  // place of the next 4-bit value, in halves of bytes

        Reader(const Weight& w, int row) : values(w.values_of(row)), mask(w.mask_of(row)) {}

        // The next values of 16 bits.
        float32x4x2_t next_words() {
            uint8x16_t bytes = vld1q_u8(values);
            const unsigned keep = MASKED ? *mask++ : 255;
            if (MASKED) bytes = vqtbl1q_u8(bytes, vld1q_u8(SHUFFLES.words[keep]));
            values += 2 * __builtin_popcount(keep);
            const uint16x8_t words = vreinterpretq_u16_u8(bytes);
            if (KIND == FLOAT16) {
                const float16x8_t halves = vreinterpretq_f16_u16(words);
                return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
            }
            return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
                    vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))};
        }

        // The next values of 8 or 4 bits, as bytes.
        int8x8_t next_bytes() {
            const unsigned keep = MASKED ? *mask++ : 255;
            const uint8x8_t places = vld1_u8(SHUFFLES.bytes[0][keep]);
            if (KIND == INT8) {
                const uint8x8_t bytes = vld1_u8(values);
                values += __builtin_popcount(keep);
                return vreinterpret_s8_u8(MASKED ? vtbl1_u8(bytes, places) : bytes);
            }
            uint64_t packed;
            std::memcpy(&packed, values + half / 2, 8);
            const uint8x8_t bytes = vcreate_u8(packed >> half % 2 * 4);
            half += __builtin_popcount(keep);
            const uint8x8_t halves = vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
            const uint8x8_t moved = MASKED ? vtbl1_u8(halves, places) : halves;
            // From 0 ... 15 to 0 ... 7, -8 ... -1.
            return vsub_s8(vreinterpret_s8_u8(veor_u8(moved, vdup_n_u8(8))), vdup_n_s8(8));
        }
    };

    template <bool MASKED, int KIND, int TOKENS>
    static void rows(const Weight& w, const Inputs& in, float* y, int first, int last) {
        for (int r = first; r < last; r++) {
            Reader<MASKED, KIND> reader(w, r);
            float32x4_t sums[TOKENS];
            for (int t = 0; t < TOKENS; t++) sums[t] = vdupq_n_f32(0.0f);
            for (int c = 0; c < w.chunks; c++) {
                if (is_16_bits(KIND)) {
                    multiply_words(reader, in, c, sums);
                } else {
                    multiply_bytes(reader, in, c, w.scale_of(r, c), sums);
                }
            }
            for (int t = 0; t < TOKENS; t++) y[size_t(t) * w.outputs + r] = vaddvq_f32(sums[t]);
        }
    }

    template <bool MASKED, int KIND, int TOKENS>
    static void multiply_words(
        Reader<MASKED, KIND>& reader, const Inputs& in, int chunk, float32x4_t (&sums)[TOKENS]) {
        for (int k = 0; k < CHUNK / 8; k++) {
            const float32x4x2_t values = reader.next_words();
            for (int t = 0; t < TOKENS; t++) {
                const float* x = &in.floats[size_t(t) * in.width + chunk * CHUNK + 8 * k];
                sums[t] = vfmaq_f32(sums[t], values.val[0], vld1q_f32(x));
                sums[t] = vfmaq_f32(sums[t], values.val[1], vld1q_f32(x + 4));
            }
        }
    }

    template <bool MASKED, int KIND, int TOKENS>
    static void multiply_bytes(
        Reader<MASKED, KIND>& reader, const Inputs& in, int chunk, float scale, float32x4_t (&sums)[TOKENS]) {
        for (int h = 0; h < 2; h++) {
            int8x8_t values[4];
            for (int k = 0; k < 4; k++) values[k] = reader.next_bytes();
            for (int t = 0; t < TOKENS; t++) {
                const int8_t* x = &in.rounded[size_t(t) * in.width + chunk * CHUNK + PART * h];
                int32x4_t total = vdupq_n_s32(0);
                for (int k = 0; k < 4; k += 2) {  // two products of at most 127 · 128 fit in 16 bits
                    const int16x8_t products = vmull_s8(values[k], vld1_s8(x + 8 * k));
                    total = vpadalq_s16(total, vmlal_s8(products, values[k + 1], vld1_s8(x + 8 * k + 8)));
                }
                sums[t] = vfmaq_n_f32(sums[t], vcvtq_f32_s32(total), scale * in.scales_of(t, chunk)[h]);
            }
        }
    }

    template <bool MASKED, int KIND>
    static void expand(const Weight& w, int first, int last, int inputs, float* out) {
        for (int r = first; r < last; r++, out += inputs) {
            Reader<MASKED, KIND> reader(w, r);
            float buffer[CHUNK];
            for (int c = 0; c < w.chunks; c++) {
                const float scale = w.scale_of(r, c);
                for (int k = 0; k < CHUNK; k += 8) {
                    float32x4x2_t values;
                    if (is_16_bits(KIND)) {
                        values = reader.next_words();
                    } else {
                        const int16x8_t words = vmovl_s8(reader.next_bytes());
                        values.val[0] = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), scale);
                        values.val[1] = vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(words)), scale);
                    }
                    vst1q_f32(buffer + k, values.val[0]);
                    vst1q_f32(buffer + k + 4, values.val[1]);
                }
                const int count = inputs - c * CHUNK < CHUNK ? inputs - c * CHUNK : CHUNK;
                std::memcpy(out + c * CHUNK, buffer, sizeof(float) * count);
            }
        }
    }

    static Rows rows_for(const Weight& w, int tokens) { return rows_of<Neon>(w, tokens); }

    static Expand expand_for(const Weight& w) { return expand_of<Neon>(w); }
};

}  // namespace packed
#endif
