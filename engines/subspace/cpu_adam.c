/* Adam on a compressed gradient, one pass over its memory. engines/core_adam.py says what is computed, compiles
   this file and has the same operations in torch.

   HAZARD: both must give the same bits. Each operation is rounded once, in the order written there: no
   contraction to fused multiply-adds (-ffp-contract=off), nothing that -ffast-math would allow. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PART 32768 /* elements that a thread takes at a time: 0.6 MB, which fit into its second-level cache */

typedef struct {
    float scale, keep_moment, take_moment, keep_variance, take_variance, unbias_moment, unbias_root, eps;
} Factors;

static inline float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* To nearest, ties to even; NaN becomes torch's. */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t rounded = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return value != value ? (uint16_t)0x7fc0 : rounded;
}

static inline float direction(float core, float *moment, float *variance, const Factors *f) {
    float gradient = core * f->scale;
    float m = *moment * f->keep_moment + gradient * f->take_moment;
    float v = *variance * f->keep_variance + gradient * gradient * f->take_variance;
    *moment = m;
    *variance = v;
    return m * f->unbias_moment / (sqrtf(v) * f->unbias_root + f->eps);
}

static void part_fp32(float *restrict core, float *restrict moment, float *restrict variance, int64_t n, Factors f) {
    for (int64_t i = 0; i < n; i++) core[i] = direction(core[i], moment + i, variance + i, &f);
}

static void part_bf16(uint16_t *restrict core, float *restrict moment, float *restrict variance, int64_t n, Factors f) {
    for (int64_t i = 0; i < n; i++) core[i] = narrow(direction(widen(core[i]), moment + i, variance + i, &f));
}

void core_adam(void *core, int bf16, float *moment, float *variance, int64_t n, Factors f, int threads) {
    int64_t parts = (n + PART - 1) / PART;
    /* Dynamic: a core that is taken by another thread for a while holds up one part, not all. */
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < parts; i++) {
        int64_t begin = i * PART, size = n - begin < PART ? n - begin : PART;
        if (bf16)
            part_bf16((uint16_t *)core + begin, moment + begin, variance + begin, size, f);
        else
            part_fp32((float *)core + begin, moment + begin, variance + begin, size, f);
    }
}
