// Tables by mask byte: how kept values get to their places among 8 inputs.

#pragma once

#include <cstdint>
#include <cstring>

namespace packed {

// Byte shuffles by mask byte; 0x80 gives zero, on x86 and on ARM.
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

}  // namespace packed
