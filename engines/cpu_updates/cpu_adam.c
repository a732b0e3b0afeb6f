/* Adam on a compressed gradient, and AdamW on weights, each in one pass over its memory. cpu_adam.py and adamw.py
   beside this file say what is computed and have the same operations in torch; cpu_adam.py compiles it.

   HAZARD: all must give the same bits. Each operation is rounded once, in the order written there: no
   contraction to fused multiply-adds (-ffp-contract=off), nothing that -ffast-math would allow. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PART 32768 /* a multiple of GROUP; elements that a thread takes at a time: 0.6 MB, which fit into its second-level cache */

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

/* --- AdamW on weights: adamw.py ------------------------------------------------------------------------ */

#define GROUP 128 /* elements of 8-bit moments that share a scale */

typedef struct {
    Factors adam;
    float keep_weight, rate;
    uint32_t key;
} Step;

enum { FP32, BF16, INT8 };

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* 32 bits that look random: the end of MurmurHash3. */
static inline uint32_t noise(uint32_t key, uint32_t index) {
    uint32_t x = index ^ key;
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    return x ^ (x >> 16);
}

/* The low half is signed: together they are the bits of the fp32 weight, and the high half is that weight rounded
   to bf16, halves away from zero. */
static inline float joined(uint16_t high, uint16_t rest) {
    return float_of(((uint32_t)high << 16) + (uint32_t)(int32_t)(int16_t)rest);
}

typedef struct {
    void *weight;
    uint16_t *rest;
    void *moment, *variance;
    float *moment_scales, *variance_scales;
    const void *gradient;
} Memory;

#define CHUNK 1024 /* elements whose moments are fp32 in the first-level cache while they are at work */

static void update_fp32(float *restrict weight, const float *restrict gradient, float *restrict moment,
                        float *restrict variance, int64_t n, Step f) {
    for (int64_t i = 0; i < n; i++) {
        float way = direction(gradient[i], moment + i, variance + i, &f.adam);
        weight[i] = weight[i] * f.keep_weight - way * f.rate;
    }
}

static void update_bf16(uint16_t *restrict high, uint16_t *restrict rest, const uint16_t *restrict gradient,
                        float *restrict moment, float *restrict variance, int64_t n, Step f) {
    for (int64_t i = 0; i < n; i++) {
        float way = direction(widen(gradient[i]), moment + i, variance + i, &f.adam);
        uint32_t bits = bits_of(joined(high[i], rest[i]) * f.keep_weight - way * f.rate);
        high[i] = (uint16_t)((bits + 0x8000u) >> 16);
        rest[i] = (uint16_t)bits;
    }
}

static void widen_all(const uint16_t *restrict from, float *restrict to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
}

static void narrow_moment(const float *restrict from, uint16_t *restrict to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = narrow(from[i]);
}

/* Up or down, by chance: a change of 0.1 % would never reach the nearest. */
static void narrow_variance(const float *restrict from, uint16_t *restrict to, int64_t n, uint32_t key, uint32_t first) {
    for (int64_t i = 0; i < n; i++)
        to[i] = (uint16_t)((bits_of(from[i]) + (noise(key, first + (uint32_t)i) & 0xffffu)) >> 16);
}

static void open_moment(const int8_t *restrict from, float *restrict to, int64_t n, float scale) {
    float unit = scale * (1.0f / 16129.0f);
    for (int64_t i = 0; i < n; i++) {
        float root = (float)from[i];
        to[i] = root * fabsf(root) * unit;
    }
}

static void open_variance(const uint8_t *restrict from, float *restrict to, int64_t n, float scale) {
    float unit = scale * (1.0f / 4228250625.0f);
    for (int64_t i = 0; i < n; i++) {
        float root = (float)from[i], square = root * root;
        to[i] = square * square * unit;
    }
}

/* Of numbers that are not negative, the larger has the larger bits. */
static float largest(const float *restrict values, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = bits_of(values[i]) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    return float_of(most);
}

static void close_moment(const float *restrict from, int8_t *restrict to, int64_t n, float by, uint32_t key, uint32_t first) {
    for (int64_t i = 0; i < n; i++) {
        float chance = (float)(int32_t)(noise(key, first + (uint32_t)i) >> 16) * (1.0f / 65536.0f);
        int32_t root = (int32_t)(sqrtf(fabsf(from[i]) / by) * 127.0f + chance);
        to[i] = (int8_t)(from[i] < 0.0f ? -root : root);
    }
}

/* What is not zero stays at two steps or more: the moment, whose smallest step is 1 / 16129 of its largest, is
   divided by the root of this, 1 / 16256 of its largest then. */
static void close_variance(const float *restrict from, uint8_t *restrict to, int64_t n, float by, uint32_t key, uint32_t first) {
    for (int64_t i = 0; i < n; i++) {
        float chance = (float)(int32_t)(noise(key, first + (uint32_t)i) & 0xffffu) * (1.0f / 65536.0f);
        int32_t root = (int32_t)(sqrtf(sqrtf(from[i] / by)) * 255.0f + chance);
        to[i] = (uint8_t)(from[i] > 0.0f && root < 2 ? 2 : root);
    }
}

static void update(const Memory *a, int bf16, int64_t begin, int64_t n, float *moment, float *variance, Step f) {
    if (bf16)
        update_bf16((uint16_t *)a->weight + begin, a->rest + begin, (const uint16_t *)a->gradient + begin, moment,
                    variance, n, f);
    else
        update_fp32((float *)a->weight + begin, (const float *)a->gradient + begin, moment, variance, n, f);
}

static void chunk(const Memory *a, int bf16, int kind, int64_t begin, int64_t n, Step f) {
    float moment[CHUNK], variance[CHUNK];
    uint32_t first = (uint32_t)begin;
    if (kind == BF16) {
        uint16_t *m = (uint16_t *)a->moment + begin, *v = (uint16_t *)a->variance + begin;
        widen_all(m, moment, n);
        widen_all(v, variance, n);
        update(a, bf16, begin, n, moment, variance, f);
        narrow_moment(moment, m, n);
        narrow_variance(variance, v, n, f.key, first);
        return;
    }
    int8_t *m = (int8_t *)a->moment + begin;
    uint8_t *v = (uint8_t *)a->variance + begin;
    float *m_scales = a->moment_scales + begin / GROUP, *v_scales = a->variance_scales + begin / GROUP;
    for (int64_t i = 0; i < n; i += GROUP) {
        int64_t size = n - i < GROUP ? n - i : GROUP;
        open_moment(m + i, moment + i, size, m_scales[i / GROUP]);
        open_variance(v + i, variance + i, size, v_scales[i / GROUP]);
    }
    update(a, bf16, begin, n, moment, variance, f);
    for (int64_t i = 0; i < n; i += GROUP) {
        int64_t size = n - i < GROUP ? n - i : GROUP;
        float m_scale = largest(moment + i, size), v_scale = largest(variance + i, size);
        m_scales[i / GROUP] = m_scale;
        v_scales[i / GROUP] = v_scale;
        close_moment(moment + i, m + i, size, m_scale > 0.0f ? m_scale : 1.0f, f.key, first + (uint32_t)i);
        close_variance(variance + i, v + i, size, v_scale > 0.0f ? v_scale : 1.0f, f.key, first + (uint32_t)i);
    }
}

void adamw(Memory memory, int bf16, int kind, int64_t n, Step f, int threads) {
    int64_t parts = (n + PART - 1) / PART;
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t part = 0; part < parts; part++) {
        int64_t begin = part * PART, end = n - begin < PART ? n : begin + PART;
        if (kind == FP32) {
            update(&memory, bf16, begin, end - begin, (float *)memory.moment + begin, (float *)memory.variance + begin, f);
            continue;
        }
        for (int64_t i = begin; i < end; i += CHUNK)
            chunk(&memory, bf16, kind, i, end - i < CHUNK ? end - i : CHUNK, f);
    }
}
