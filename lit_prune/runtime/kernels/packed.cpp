// Products of packed weights and a few tokens on CPUs: y = x Wᵀ for W [o, i], its kept values in sequence and one mask
// bit per weight. See lit_prune/ops/packing.py for the format and lit_prune/runtime/cpu_kernel.py for the interface.
//
// The inputs of a row are processed in chunks of 64, whose mask is 8 bytes. Values of 8 and 4 bits meet inputs rounded
// to 8 bits with a scale per half chunk, so that their products are sums of integers.

#include "avx2.h"
#include "avx512.h"
#include "packed.h"
#include "portable.h"

#include <omp.h>

using namespace packed;

namespace {

// The kernel for some instructions.
struct Form {
    const char* name;
    bool (*available)();
    Prepare prepare;
    Rows (*rows_for)(const Weight&, int tokens);
    Expand (*expand_for)(const Weight&);
};

template <class Instructions>
constexpr Form form_of() {
    return {Instructions::NAME, Instructions::available, Instructions::prepare, Instructions::rows_for,
            Instructions::expand_for};
}

// The fastest first.
const Form FORMS[] = {
#ifdef AVX512
    form_of<Avx512>(), form_of<Avx2>(),
#endif
    form_of<Portable>(),
};

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

// Returns the name of a form's instructions; empty if this processor does not have them, null behind the last form.
const char* lit_prune_instructions(int form) {
    if (form < 0 || form >= int(sizeof(FORMS) / sizeof(Form))) return nullptr;
    return FORMS[form].available() ? FORMS[form].name : "";
}

// y [tokens, outputs] = x [tokens, inputs] Wᵀ, for at most 8 tokens.
void lit_prune_multiply(const Weight* w, const float* x, int tokens, int inputs, float* y, int threads, int form) {
    Inputs in{tokens, w->chunks * CHUNK, {}, {}, {}, {}};
    FORMS[form].prepare(*w, x, inputs, in);
    const Rows rows = FORMS[form].rows_for(*w, tokens);
    in_parallel(w->outputs, threads, [&](int first, int last) { rows(*w, in, y, first, last); });
}

// out [last - first, inputs] = rows `first` to `last` of W, in float32.
void lit_prune_expand(const Weight* w, int first, int last, int inputs, float* out, int threads, int form) {
    const Expand expand = FORMS[form].expand_for(*w);
    in_parallel(last - first, threads, [&](int from, int to) {
        expand(*w, first + from, first + to, inputs, out + int64_t(from) * inputs);
    });
}

}  // extern "C"
