/* Adam on a compressed gradient, and AdamW on weights, each in one pass over its memory. cpu_adam.py and adamw.py
   beside this file say what is computed and have the same operations in torch; cpu_adam.py compiles it.

   HAZARD: all must give the same bits. Each operation is rounded once, in the order written there: no
   contraction to fused multiply-adds (-ffp-contract=off), nothing that -ffast-math would allow. */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef PART
#define PART 32768 /* a multiple of GROUP; elements that a thread takes at a time: 0.6 MB, which fit into its second-level cache */
#endif

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

/* --- what several processes bring, and how they let each other know: rank_updates.py ----------------------- */

/* In their order, each sum rounded to the elements' dtype. */
static void add_up(void *restrict out, const void *const *gradients, int count, int bf16, int64_t begin, int64_t n) {
    for (int from = 0; from < count; from++) {
        if (bf16) {
            const uint16_t *its = (const uint16_t *)gradients[from] + begin;
            uint16_t *sum = (uint16_t *)out;
            for (int64_t i = 0; i < n; i++) sum[i] = from ? narrow(widen(sum[i]) + widen(its[i])) : its[i];
        } else {
            const float *its = (const float *)gradients[from] + begin;
            float *sum = (float *)out;
            for (int64_t i = 0; i < n; i++) sum[i] = from ? sum[i] + its[i] : its[i];
        }
    }
}

/* What was written before a store is seen by who has loaded what it stored. */
void store_release(int64_t *place, int64_t value) { __atomic_store_n(place, value, __ATOMIC_RELEASE); }

int64_t load_acquire(const int64_t *place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }

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

/* To bf16, up or down by chance: a variance that changes by 0.1 % would never reach the nearest. */
static inline uint16_t raised_or_not(float value, uint32_t key, uint32_t index) {
    return (uint16_t)((bits_of(value) + (noise(key, index) & 0xffffu)) >> 16);
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

/* Moments in bf16, as AdamW below keeps them; `first` is the number of the first element. */
static inline __attribute__((always_inline)) void part_with_bf16_moments(
    const int bf16, void *restrict core, uint16_t *restrict moment, uint16_t *restrict variance, int64_t n, Factors f,
    uint32_t key, uint32_t first) {
    #pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float m = widen(moment[i]), v = widen(variance[i]);
        float gradient = bf16 ? widen(((uint16_t *)core)[i]) : ((float *)core)[i];
        float way = direction(gradient, &m, &v, &f);
        moment[i] = narrow(m);
        variance[i] = raised_or_not(v, key, first + (uint32_t)i);
        if (bf16) ((uint16_t *)core)[i] = narrow(way);
        else ((float *)core)[i] = way;
    }
}

/* `gradients`: of `count` processes, none of them `core`; 0: the gradient is in `core`. */
void core_adam(void *core, int bf16, void *moment, void *variance, int bf16_moments, int64_t n, Factors f, uint32_t key,
               int threads, const void *const *gradients, int count) {
    int64_t parts = (n + PART - 1) / PART;
    /* Dynamic: a core that is taken by another thread for a while holds up one part, not all. */
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < parts; i++) {
        int64_t begin = i * PART, size = n - begin < PART ? n - begin : PART;
        void *here = (char *)core + begin * (bf16 ? 2 : 4);
        if (count) add_up(here, gradients, count, bf16, begin, size);
        if (bf16_moments) {
            uint16_t *m = (uint16_t *)moment + begin, *v = (uint16_t *)variance + begin;
            if (bf16) part_with_bf16_moments(1, here, m, v, size, f, key, (uint32_t)begin);
            else part_with_bf16_moments(0, here, m, v, size, f, key, (uint32_t)begin);
        } else if (bf16) part_bf16(here, (float *)moment + begin, (float *)variance + begin, size, f);
        else part_fp32(here, (float *)moment + begin, (float *)variance + begin, size, f);
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

/* 8-bit moments, opened: the signed root squared, the fourth root to its fourth power. */
static inline float open_moment(int8_t kept, float unit) {
    float root = (float)kept;
    return root * fabsf(root) * unit;
}

static inline float open_variance(uint8_t kept, float unit) {
    float root = (float)kept, square = root * root;
    return square * square * unit;
}

/* A loop over one kind of moments and of weights: both are constants where this is called, so that each call
   becomes a loop of its own that the compiler makes vectors of. Of 8-bit moments it takes one group, and leaves
   the new ones in `m_new` and, as their roots, in `root_new`. */
static inline __attribute__((always_inline)) void pass(
    const int kind, const int bf16, void *weight, uint16_t *rest, const void *gradient, void *moment, void *variance,
    float m_unit, float v_unit, float *m_new, float *root_new, uint32_t first, int64_t n, Step step) {
    const Factors f = step.adam;
    #pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float m_old = kind == FP32 ? ((float *)moment)[i]
            : kind == BF16 ? widen(((uint16_t *)moment)[i]) : open_moment(((int8_t *)moment)[i], m_unit);
        float v_old = kind == FP32 ? ((float *)variance)[i]
            : kind == BF16 ? widen(((uint16_t *)variance)[i]) : open_variance(((uint8_t *)variance)[i], v_unit);
        float g = (bf16 ? widen(((const uint16_t *)gradient)[i]) : ((const float *)gradient)[i]) * f.scale;
        float m = m_old * f.keep_moment + g * f.take_moment;
        float v = v_old * f.keep_variance + g * g * f.take_variance;
        float root = sqrtf(v);
        float way = m * f.unbias_moment / (root * f.unbias_root + f.eps);
        if (bf16) {
            uint16_t *high = (uint16_t *)weight;
            uint32_t bits = bits_of(joined(high[i], rest[i]) * step.keep_weight - way * step.rate);
            high[i] = (uint16_t)((bits + 0x8000u) >> 16);
            rest[i] = (uint16_t)bits;
        } else {
            float *whole = (float *)weight;
            whole[i] = whole[i] * step.keep_weight - way * step.rate;
        }
        if (kind == FP32) {
            ((float *)moment)[i] = m;
            ((float *)variance)[i] = v;
        } else if (kind == BF16) {
            ((uint16_t *)moment)[i] = narrow(m);
            ((uint16_t *)variance)[i] = raised_or_not(v, step.key, first + (uint32_t)i);
        } else {
            m_new[i] = m;
            root_new[i] = root;
        }
    }
}

/* Of numbers that are not negative, the larger has the larger bits. */
static inline float largest(const float *values, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = bits_of(values[i]) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    return float_of(most);
}

/* What is not zero stays at two steps or more: the moment, whose smallest step is 1 / 16129 of its largest, is
   divided by the root of this, 1 / 16256 of its largest then. */
static inline void close_group(int8_t *restrict moment, uint8_t *restrict variance, const float *restrict m_new,
                               const float *restrict root_new, float m_by, float root_by, uint32_t key, uint32_t first,
                               int64_t n) {
    #pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        uint32_t drawn = noise(key, first + (uint32_t)i);
        float up = (float)(int32_t)(drawn >> 16) * (1.0f / 65536.0f);
        int32_t root = (int32_t)(sqrtf(fabsf(m_new[i]) * m_by) * 127.0f + up);
        root = root > 127 ? 127 : root;
        moment[i] = (int8_t)(m_new[i] < 0.0f ? -root : root);
        up = (float)(int32_t)(drawn & 0xffffu) * (1.0f / 65536.0f);
        root = (int32_t)(sqrtf(root_new[i] * root_by) * 255.0f + up);
        root = root > 255 ? 255 : root;
        variance[i] = (uint8_t)(root_new[i] > 0.0f && root < 2 ? 2 : root);
    }
}

static inline __attribute__((always_inline)) void groups(const int bf16, const Memory *a, int64_t begin, int64_t end, Step step) {
    const int64_t size = bf16 ? 2 : 4;
    float m_new[GROUP], root_new[GROUP];
    for (int64_t i = begin; i < end; i += GROUP) {
        int64_t n = end - i < GROUP ? end - i : GROUP;
        int8_t *moment = (int8_t *)a->moment + i;
        uint8_t *variance = (uint8_t *)a->variance + i;
        float *m_scale = a->moment_scales + i / GROUP, *v_scale = a->variance_scales + i / GROUP;
        pass(INT8, bf16, (char *)a->weight + i * size, a->rest + (bf16 ? i : 0), (const char *)a->gradient + i * size,
             moment, variance, *m_scale * (1.0f / 16129.0f), *v_scale * (1.0f / 4228250625.0f), m_new, root_new,
             (uint32_t)i, n, step);
        float m_most = largest(m_new, n), root_most = largest(root_new, n);
        *m_scale = m_most;
        *v_scale = root_most * root_most;
        close_group(moment, variance, m_new, root_new, m_most >= FLT_MIN ? 1.0f / m_most : 1.0f,
                    root_most > 0.0f ? 1.0f / root_most : 1.0f, step.key, (uint32_t)i, n);
    }
}

static inline __attribute__((always_inline)) void whole(const int kind, const int bf16, const Memory *a, int64_t begin,
                                                        int64_t end, Step step) {
    const int64_t size = bf16 ? 2 : 4, moment_size = kind == BF16 ? 2 : 4;
    pass(kind, bf16, (char *)a->weight + begin * size, a->rest + (bf16 ? begin : 0),
         (const char *)a->gradient + begin * size, (char *)a->moment + begin * moment_size,
         (char *)a->variance + begin * moment_size, 0.0f, 0.0f, NULL, NULL, (uint32_t)begin, end - begin, step);
}

/* `gradients`: of `count` processes; 0: it is in `memory`. */
void adamw(Memory memory, int bf16, int kind, int64_t n, Step step, int threads, const void *const *gradients, int count) {
    int64_t parts = (n + PART - 1) / PART;
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t part = 0; part < parts; part++) {
        int64_t begin = part * PART, end = n - begin < PART ? n : begin + PART;
        float sum[PART]; /* stays in the thread's cache */
        Memory own = memory;
        if (count) {
            add_up(sum, gradients, count, bf16, begin, end - begin);
            /* Elements are counted from the first of all. */
            own.gradient = (const void *)((uintptr_t)sum - (uintptr_t)begin * (bf16 ? 2 : 4));
        }
        if (kind == FP32 && bf16) whole(FP32, 1, &own, begin, end, step);
        else if (kind == FP32) whole(FP32, 0, &own, begin, end, step);
        else if (kind == BF16 && bf16) whole(BF16, 1, &own, begin, end, step);
        else if (kind == BF16) whole(BF16, 0, &own, begin, end, step);
        else if (bf16) groups(1, &own, begin, end, step);
        else groups(0, &own, begin, end, step);
    }
}
