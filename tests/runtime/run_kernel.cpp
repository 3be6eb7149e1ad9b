// Reads weights and inputs from a file and writes the results of every form of the kernel, for processors that Python's
// tests do not run on. See tests/runtime/test_neon.py for the layout.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "packed.h"

extern "C" {
const char* lit_prune_instructions(int form);
void lit_prune_multiply(const packed::Weight*, const float* x, int tokens, int inputs, float* y, int threads, int form);
void lit_prune_expand(const packed::Weight*, int first, int last, int inputs, float* out, int threads, int form);
}

template <class T>
std::vector<T> read(FILE* file, size_t count) {
    std::vector<T> items(count);
    if (std::fread(items.data(), sizeof(T), count, file) != count) std::abort();
    return items;
}

int main(int, char** arguments) {
    FILE *from = std::fopen(arguments[1], "rb"), *to = std::fopen(arguments[2], "wb");
    int32_t sizes[10];  // outputs, chunks, groups, kind, kept_of_8, inputs, tokens; bytes of values, mask and scales
    while (std::fread(sizes, 4, 10, from) == 10) {
        const auto values = read<uint8_t>(from, sizes[7]), mask = read<uint8_t>(from, sizes[8]);
        const auto offsets = read<int64_t>(from, sizes[0]);
        const auto scales = read<uint16_t>(from, sizes[9] / 2);
        const int outputs = sizes[0], inputs = sizes[5], tokens = sizes[6];
        const auto x = read<float>(from, size_t(tokens) * inputs);
        const packed::Weight weight{mask.empty() ? nullptr : mask.data(), values.data(), offsets.data(),
                                    scales.empty() ? nullptr : scales.data(), outputs, sizes[1], sizes[2], sizes[3],
                                    sizes[4]};
        std::vector<float> y(size_t(tokens) * outputs), whole(size_t(outputs) * inputs);
        for (int form = 0; const char* name = lit_prune_instructions(form); form++) {
            if (!*name) continue;
            std::printf("%s\n", name);
            lit_prune_multiply(&weight, x.data(), tokens, inputs, y.data(), 1, form);
            lit_prune_expand(&weight, 0, outputs, inputs, whole.data(), 1, form);
            std::fwrite(y.data(), 4, y.size(), to);
            std::fwrite(whole.data(), 4, whole.size(), to);
        }
    }
    return std::fclose(to);
}
