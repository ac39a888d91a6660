/* Choices and gates of moe/router.py, a row at a time. Legend as there: n tokens, e experts, k choices. */
#include "kernels.h"

#define TOKENS 16 /* of a task */
#define EPS 1e-20f /* _NORM_EPS there */

INLINE long end_of(long index, long n) { return (index + 1) * TOKENS < n ? (index + 1) * TOKENS : n; }

INLINE I either(I where, I yes, I no) { return (yes & where) | (no & ~where); }
INLINE I every(int32_t x) { return x - (I){0}; }

/* The place of the largest key, the first of equal ones. */
#define FIRST(...)                                                                                  \
    other = SHUFFLE(key, key, __VA_ARGS__), there = SHUFFLE(place, place, __VA_ARGS__);             \
    better = (other > key) | ((other == key) & (there < place));                                    \
    key = either(better, other, key), place = either(better, there, place);
INLINE int32_t first_of(I key, I place) {
    I other, there, better;
    FOLD(FIRST)
    return place[0];
}

/* Integers that sort as the numbers do: -0 is 0, and every NaN is the largest. */
INLINE I keys_of(V x) {
    I bits = (I)(x + 0.0f);
    return either(x != x, every(INT32_MAX), bits ^ ((bits >> 31) & INT32_MAX));
}

typedef struct {
    long n, e, k;
    const float *scores;
    int64_t *ids;
} Top;

#define NONE INT32_MIN /* less than any key */

/* k times: the largest key, its first place, and out with it; the keys of a row are in scratch. */
static void top_rows(const void *about, long index, float *scratch) {
    const Top *t = about;
    long vectors = (t->e + W - 1) / W;
    I lanes, *keys = (I *)scratch;
    UNROLL for (int i = 0; i < W; i++) lanes[i] = i;
    for (long i = index * TOKENS; i < end_of(index, t->n); i++) {
        for (long j = 0; j < vectors; j++) {
            long left = t->e - j * W;
            keys[j] = either(lanes < (int32_t)left, keys_of(load_some(t->scores + i * t->e + j * W, left)), every(NONE));
        }
        for (long q = 0; q < t->k; q++) {
            I best = keys[0], place_of = lanes;
            for (long j = 1; j < vectors; j++) {
                I better = keys[j] > best;
                best = either(better, keys[j], best), place_of = either(better, lanes + (int32_t)(j * W), place_of);
            }
            int32_t place = first_of(best, place_of);
            keys[place / W] = either(lanes == place % W, every(NONE), keys[place / W]);
            t->ids[i * t->k + q] = place;
        }
    }
}

/* ids of the k largest of each row, largest first, equal ones in order of index; scratch: room of e and 2 W for each thread */
long top(long threads, long n, long e, long k, const float *scores, int64_t *ids, float *scratch) {
    Top t = {n, e, k, scores, ids};
    share((n + TOKENS - 1) / TOKENS, threads, top_rows, &t, (float *)(((intptr_t)scratch + 63) / 64 * 64), padded(e) + W);
    return 0;
}

typedef struct {
    long n, e, k;
    float scale;
    const float *scores, *dgates;
    const int64_t *ids;
    float *gates, *total, *dscores;
} Gates;

static void gate_rows(const void *about, long index, float *scratch) {
    const Gates *g = about;
    (void)scratch;
    for (long i = index * TOKENS; i < end_of(index, g->n); i++) {
        const int64_t *ids = g->ids + i * g->k;
        float total = 0, *gates = g->gates + i * g->k;
        for (long j = 0; j < g->k; j++) total += gates[j] = g->scores[i * g->e + ids[j]];
        g->total[i] = total += EPS;
        for (long j = 0; j < g->k; j++) gates[j] = gates[j] / total * g->scale;
    }
}

/* gates = scale times the chosen scores over their sum */
long normalised_gates(long threads, long n, long e, long k, double scale, const float *scores, const int64_t *ids,
                      float *gates, float *total) {
    Gates g = {.n = n, .e = e, .k = k, .scale = scale, .scores = scores, .ids = ids, .gates = gates, .total = total};
    share((n + TOKENS - 1) / TOKENS, threads, gate_rows, &g, 0, 0);
    return 0;
}

static void score_rows(const void *about, long index, float *scratch) {
    const Gates *g = about;
    (void)scratch;
    for (long i = index * TOKENS; i < end_of(index, g->n); i++) {
        const float *gates = g->gates + i * g->k, *dgates = g->dgates + i * g->k;
        const int64_t *ids = g->ids + i * g->k;
        float along = 0, *dscores = g->dscores + i * g->e;
        memset(dscores, 0, 4 * g->e);
        for (long j = 0; j < g->k; j++) along += dgates[j] * gates[j];
        for (long j = 0; j < g->k; j++) {
            float s = g->scores ? g->scores[i * g->e + ids[j]] : 0, d = (g->scale * dgates[j] - along) / g->total[i];
            dscores[ids[j]] = g->scores ? d * s * (1 - s) : d;
        }
    }
}

/* ds = (scale dp - <dp, p>) / sum for the chosen, 0 for the others; times s (1 - s) if scores are given */
long normalised_gates_backward(long threads, long n, long e, long k, double scale, const float *dgates,
                               const float *gates, const float *total, const int64_t *ids, const float *scores,
                               float *dscores) {
    Gates g = {.n = n, .e = e, .k = k, .scale = scale, .dgates = dgates, .ids = ids, .gates = (float *)gates,
               .total = (float *)total, .scores = scores, .dscores = dscores};
    share((n + TOKENS - 1) / TOKENS, threads, score_rows, &g, 0, 0);
    return 0;
}
