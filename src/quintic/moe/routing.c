/* Choices and gates of moe/router.py, a row at a time. Legend as there: n tokens, e experts, k choices. */
#include "kernels.h"

#define TOKENS 16 /* of a task */
#define EPS 1e-20f /* _NORM_EPS there */

INLINE long end_of(long index, long n) { return (index + 1) * TOKENS < n ? (index + 1) * TOKENS : n; }

INLINE I either(I where, I yes, I no) { return (yes & where) | (no & ~where); }
INLINE I larger(I a, I b) { return either(a > b, a, b); }
INLINE I every(int32_t x) { return x - (I){0}; }

/* The largest lane. */
INLINE int32_t largest(I v) {
    UNROLL for (int half = W / 2; half; half /= 2) {
        I other;
        UNROLL for (int i = 0; i < W; i++) other[i] = v[i ^ half];
        v = larger(v, other);
    }
    return v[0];
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
            I best = keys[0], first = every(NONE);
            for (long j = 1; j < vectors; j++) best = larger(best, keys[j]);
            int32_t key = largest(best);
            for (long j = 0; j < vectors; j++) first = larger(first, either(keys[j] == key, -lanes - (int32_t)(j * W), every(NONE)));
            int32_t place = -largest(first);
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
        float along = 0, *dscores = g->dscores + i * g->e;
        memset(dscores, 0, 4 * g->e);
        for (long j = 0; j < g->k; j++) along += dgates[j] * gates[j];
        for (long j = 0; j < g->k; j++) dscores[g->ids[i * g->k + j]] = (g->scale * dgates[j] - along) / g->total[i];
    }
}

/* ds = (scale dp - <dp, p>) / sum for the chosen, 0 for the others */
long normalised_gates_backward(long threads, long n, long e, long k, double scale, const float *dgates, const float *gates,
                               const float *total, const int64_t *ids, float *dscores) {
    Gates g = {.n = n, .e = e, .k = k, .scale = scale, .dgates = dgates, .ids = ids, .gates = (float *)gates, .total = (float *)total,
               .dscores = dscores};
    share((n + TOKENS - 1) / TOKENS, threads, score_rows, &g, 0, 0);
    return 0;
}
