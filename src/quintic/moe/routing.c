/* Logits, choices and gates of moe/router.py, a row at a time. Legend as there: n tokens, d width, e experts, k choices. */
#include "kernels.h"
#include "linear.h"

#define TOKENS 16 /* of a task */
#define EPS 1e-20f /* _NORM_EPS there */

INLINE long end_of(long index, long n) { return lesser((index + 1) * TOKENS, n); }

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

#define NONE INT32_MIN /* less than any key */

/* The k largest of a row, k times: the largest key, its first place, and out with it; keys: room of padded(e). */
static void top_of_row(long e, long k, const float *scores, int64_t *ids, I *keys) {
    I lanes;
    UNROLL for (int i = 0; i < W; i++) lanes[i] = i;
    for (long j = 0; j * W < e; j++) {
        I some = keys_of(load_some(scores + j * W, e - j * W));
        keys[j] = either(lanes < (int32_t)(e - j * W), some, every(NONE));
    }
    for (long q = 0; q < k; q++) {
        I best = keys[0], place_of = lanes;
        for (long j = 1; j * W < e; j++) {
            I better = keys[j] > best;
            best = either(better, keys[j], best), place_of = either(better, lanes + (int32_t)(j * W), place_of);
        }
        int32_t place = first_of(best, place_of);
        keys[place / W] = either(lanes == place % W, every(NONE), keys[place / W]);
        ids[q] = place;
    }
}

typedef struct {
    long n, e, k;
    const float *scores;
    int64_t *ids;
} Top;

static void top_rows(const void *about, long index, float *scratch) {
    const Top *t = about;
    for (long i = index * TOKENS; i < end_of(index, t->n); i++)
        top_of_row(t->e, t->k, t->scores + i * t->e, t->ids + i * t->k, (I *)scratch);
}

/* ids of the k largest of each row, largest first, equal ones in order of index */
long top(long threads, float *room, long size, long n, long e, long k, const float *scores, int64_t *ids) {
    Top t = {n, e, k, scores, ids};
    NEED(threads * padded(e));
    share((n + TOKENS - 1) / TOKENS, threads, top_rows, &t, room, padded(e));
    return 0;
}

typedef struct {
    long n, d, e, k, each;
    const float *x, *bias;
    float *logits, *scores, *biased;
    int64_t *ids;
    Right w;
} Route;

static void route_rows(const void *about, long index, float *scratch) {
    const Route *r = about;
    long first = index * r->each, rows = lesser(r->n - first, r->each), e = r->e, at = first * e;
    product(rows, r->d, e, r->x + first * r->d, r->d, 0, r->w, 0, r->logits + at, e, 0);
    for (long i = 0; i < rows; i++, at += e) {
        for (long j = 0; j < e; j += W) {
            V score = sigmoid(load_some(r->logits + at + j, e - j));
            store_some(r->scores + at + j, score, e - j);
            store_some(r->biased + at + j, score + load_some(r->bias + j, e - j), e - j);
        }
        top_of_row(e, r->k, r->biased + at, r->ids + (first + i) * r->k, (I *)scratch);
    }
}

/* logits = x w', scores = sigmoid(logits), biased = scores + bias, and ids as of top() */
long route(long threads, float *room, long size, long n, long d, long e, long k, const float *x, const float *w,
           const float *bias, float *logits, float *scores, float *biased, int64_t *ids) {
    Route r = {n, d, e, k, greater(16, lesser(64, n / (8 * threads))), x, bias, logits, scores, biased, ids, {0}};
    long packed = d * padded(e);
    NEED(packed + threads * padded(e));
    r.w = pack(d, e, (Right){w, d, ACROSS}, room);
    share((n + r.each - 1) / r.each, threads, route_rows, &r, room + packed, padded(e));
    return 0;
}

typedef struct {
    long n, e, k;
    float scale;
    const float *scores, *dgates, *more, *dlogits;
    const int64_t *ids;
    float *gates, *total, *dz;
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

/* gates = scale times the chosen scores over their sum, and that sum; and how often each expert is chosen, by the tokens
 * that are not masked out (a null mask: all) */
long normalised_gates(long threads, float *room, long size, long n, long e, long k, double scale, const float *scores,
                      const int64_t *ids, const uint8_t *mask, float *gates, float *total, int64_t *counts) {
    Gates g = {.n = n, .e = e, .k = k, .scale = scale, .scores = scores, .ids = ids, .gates = gates, .total = total};
    NO_ROOM;
    share((n + TOKENS - 1) / TOKENS, threads, gate_rows, &g, 0, 0);
    memset(counts, 0, sizeof(int64_t) * e);
    for (long i = 0; i < n; i++)
        for (long j = 0; j < k && (!mask || mask[i]); j++) counts[ids[i * k + j]]++;
    return 0;
}

/* Of the scores ds = (scale dp - <dp, p>) / sum for the chosen, 0 for the others, and `more`; of the logits
 * s (1 - s) ds + dlogits. dp, more and dlogits may be null. */
static void logit_rows(const void *about, long index, float *scratch) {
    const Gates *g = about;
    (void)scratch;
    for (long i = index * TOKENS; i < end_of(index, g->n); i++) {
        const float *gates = g->gates + i * g->k, *dgates = g->dgates + i * g->k, *s = g->scores + i * g->e;
        const int64_t *ids = g->ids + i * g->k;
        float along = 0, *dz = g->dz + i * g->e;
        if (g->more) memcpy(dz, g->more + i * g->e, 4 * g->e);
        else memset(dz, 0, 4 * g->e);
        if (g->dgates) {
            for (long j = 0; j < g->k; j++) along += dgates[j] * gates[j];
            for (long j = 0; j < g->k; j++) dz[ids[j]] += (g->scale * dgates[j] - along) / g->total[i];
        }
        for (long j = 0; j < g->e; j++) dz[j] *= s[j] * (1 - s[j]);
        for (long j = 0; g->dlogits && j < g->e; j++) dz[j] += g->dlogits[i * g->e + j];
    }
}

/* dx and dw, which may be null, from the gradients of gates, logits and scores, which may be null */
long route_backward(long threads, float *room, long size, long n, long d, long e, long k, double scale, const float *x,
                    const float *w, const float *dgates, const float *dlogits, const float *more, const float *scores,
                    const int64_t *ids, const float *gates, const float *total, float *dx, float *dw) {
    long own = padded(n * e);
    for (int go = 0; go < 2; go++) {
        Gates g = {.n = n, .e = e, .k = k, .scale = scale, .dgates = dgates, .ids = ids, .gates = (float *)gates,
                   .total = (float *)total, .scores = scores, .more = more, .dlogits = dlogits, .dz = room};
        if (go) share((n + TOKENS - 1) / TOKENS, threads, logit_rows, &g, 0, 0);
        long rest = linear_backward(threads, room + own, go ? size - own : 0, n, d, x, 0, 0, 0, dx, 0, e, 0, 0, w, 0, 0,
                                    room, 0, 0, dw, 0, 0);
        if (!go) NEED(own + rest);
    }
    return 0;
}
