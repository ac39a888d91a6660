/* The routed sum of moe/routed.py in float32, for gated and plain experts: the same formulas, fewer passes over memory.
 *
 * A task is some rows of one expert: its weights are packed once, its tokens are read where they lie, and what it makes
 * stays in the cache until it is used. Legend as there: n tokens, k choices, r rows sorted by expert, d width, f expert
 * width, h = 2 f (gated) or f, e experts.
 */
#include "kernels.h"

enum { SILU, GELU_TANH, RELU }; /* in the order of _KINDS in moe/expert_kernels.py */

typedef struct {
    long n, k, d, f, h, experts, kind;
    const float *x, *gates, *w_in, *w_out;
    int64_t *counts, *row, *token;
    float *h_r;
} Layer;

/* act(z) = z share: share is the logistic function of z (silu), of a cubic in z (gelu_tanh), or a step (relu). */
INLINE V share_of(long kind, V z) {
    if (kind == SILU) return sigmoid(z);
    if (kind == GELU_TANH) return sigmoid(z * (1.5957691216f + 0.0713548163f * z * z));
    return pick(z > 0.0f, all(1.0f), z * 0.0f); /* a NaN stays one */
}

/* act'(z), given the share */
INLINE V slope_of(long kind, V z, V share) {
    if (kind == SILU) return share + z * share * (1.0f - share);
    if (kind == GELU_TANH)
        return share + z * share * (1.0f - share) * (1.5957691216f + 0.2140644489f * z * z);
    return share;
}

/* a = act(z) u of gated rows h = [z u], act(z) of plain ones */
INLINE void activate_kind(long kind, long rows, long f, long h, const float *h_r, float *a) {
    for (long r = 0; r < rows; r++, h_r += h, a += f)
        for (long j = 0; j < f; j += W) {
            V z = load_some(h_r + j, f - j), act = z * share_of(kind, z);
            store_some(a + j, h > f ? act * load_some(h_r + f + j, f - j) : act, f - j);
        }
}

static void activate(long kind, long rows, long f, long h, const float *h_r, float *a) {
    if (kind == SILU) activate_kind(SILU, rows, f, h, h_r, a);
    else if (kind == GELU_TANH) activate_kind(GELU_TANH, rows, f, h, h_r, a);
    else activate_kind(RELU, rows, f, h, h_r, a);
}

/* Of one row, with g = da / gate given: dh, gate a, and <g, a> as the result. */
INLINE float back_kind(long kind, long f, long h, float gate, const float *h_r, const float *g, float *a, float *dh) {
    V along = all(0);
    for (long j = 0; j < f; j += W) {
        V z = load_some(h_r + j, f - j), share = share_of(kind, z), act = z * share, d = load_some(g + j, f - j);
        V up = h > f ? load_some(h_r + f + j, f - j) : all(1.0f), made = act * up;
        along += d * made;
        store_some(a + j, gate * made, f - j);
        d *= gate;
        if (h > f) store_some(dh + f + j, act * d, f - j);
        store_some(dh + j, d * up * slope_of(kind, z, share), f - j);
    }
    return sum(along);
}

static float back(long kind, long f, long h, float gate, const float *h_r, const float *g, float *a, float *dh) {
    if (kind == SILU) return back_kind(SILU, f, h, gate, h_r, g, a, dh);
    if (kind == GELU_TANH) return back_kind(GELU_TANH, f, h, gate, h_r, g, a, dh);
    return back_kind(RELU, f, h, gate, h_r, g, a, dh);
}

/* Where the rows from `first` on are, and their tokens: a dense network has neither tokens nor gates. */
INLINE const float *rows_from(const Layer *l, const float *base, long first) { return l->token ? base : base + first * l->d; }
INLINE const int64_t *tokens_from(const Layer *l, long first) { return l->token ? l->token + first : 0; }

/* Rows `first` to `last` of an expert; small enough that threads which take the next one end together. */
typedef struct {
    long expert, first, last;
} Piece;

static long rows_of_a_piece(const Layer *l, long threads) {
    long rows = l->n * l->k / (4 * threads);
    return rows < 32 ? 32 : rows > 192 ? 192 : rows;
}

static long most_rows(const Layer *l, long threads) { return rows_of_a_piece(l, threads) * 3 / 2 + 1; }

static long most_pieces(const Layer *l, long threads) {
    return l->n * l->k / rows_of_a_piece(l, threads) + l->experts + threads;
}

static long cut(const Layer *l, long threads, Piece *pieces) {
    long good = rows_of_a_piece(l, threads), start = 0, made = 0;
    for (long e = 0; e < l->experts; start += l->counts[e++]) {
        long rows = l->counts[e], parts = rows > good ? (rows + good / 2) / good : rows > 0;
        if (l->experts == 1 && rows > good) parts = (parts + threads - 1) / threads * threads; /* equal work for all */
        for (long p = 0; p < parts; p++)
            pieces[made++] = (Piece){e, start + rows * p / parts, start + rows * (p + 1) / parts};
    }
    return made;
}

INLINE long larger(long a, long b) { return a > b ? a : b; }

/* Floats that a thread needs: for products and a row of activations for each token; or for outer products. */
static long scratch_of(const Layer *l, long threads) {
    long rows = product_scratch() + most_rows(l, threads) * l->f;
    return padded(larger(rows, outer_scratch(larger(l->h, l->d))));
}

/* Floats that both passes want as scratch. */
long experts_scratch(long threads, long n, long k, long d, long f, long h, long experts) {
    Layer l = {.n = n, .k = k, .d = d, .f = f, .h = h, .experts = experts};
    return threads * scratch_of(&l, threads) + padded(most_pieces(&l, threads) * (long)(sizeof(Piece) / sizeof(float)));
}

/* y = sum over the choices of each token of weight * v[row], in their order */
typedef struct {
    long n, k, d;
    const float *v, *weight;
    const int64_t *row;
    float *y;
} Sum;

#define TOKENS 16 /* of a task */

static void add_rows(const void *about, long index, float *scratch) {
    const Sum *s = about;
    long last = (index + 1) * TOKENS < s->n ? (index + 1) * TOKENS : s->n;
    (void)scratch;
    for (long i = index * TOKENS; i < last; i++) {
        for (long j = 0; i + 1 < last && j < s->k; j++) /* rows lie anywhere: the next ones are called for in time */
            for (long q = 0; q < s->d; q += 16) __builtin_prefetch(s->v + s->row[(i + 1) * s->k + j] * s->d + q);
        for (long q = 0; q < s->d; q += W) {
            V total = all(0);
            for (long j = 0; j < s->k; j++) {
                V v = load_some(s->v + s->row[i * s->k + j] * s->d + q, s->d - q);
                total += s->weight ? s->weight[i * s->k + j] * v : v;
            }
            store_some(s->y + i * s->d + q, total, s->d - q);
        }
    }
}

/* weight: null for 1 */
long experts_sum(long threads, long n, long k, long d, const float *v, const float *weight, const int64_t *row, float *y) {
    Sum s = {n, k, d, v, weight, row, y};
    share((n + TOKENS - 1) / TOKENS, threads, add_rows, &s, 0, 0);
    return 0;
}

/* counts, the row of each slot in the order of expert and token, and the token of each row; 1: an id is no expert's */
long experts_sort(long threads, long n, long k, long experts, const int64_t *ids, int64_t *counts, int64_t *row,
                  int64_t *token) {
    (void)threads;
    memset(counts, 0, sizeof(int64_t) * experts);
    for (long m = 0; m < n * k; m++) {
        if (ids[m] < 0 || ids[m] >= experts) return 1;
        counts[ids[m]]++;
    }
    for (long e = 0, start = 0; e < experts; e++) {
        long count = counts[e];
        counts[e] = start;
        start += count;
    }
    for (long i = 0, m = 0; i < n; i++)
        for (long j = 0; j < k; j++, m++) {
            long r = row[m] = counts[ids[m]]++;
            token[r] = i;
        }
    for (long e = experts - 1; e > 0; e--) counts[e] -= counts[e - 1];
    return 0;
}

typedef struct {
    const Layer *l;
    const Piece *pieces;
    float *v;
} Forward;

static void forward_piece(const void *about, long index, float *scratch) {
    const Forward *p = about;
    const Layer *l = p->l;
    Piece piece = p->pieces[index];
    long first = piece.first, rows = piece.last - first;
    float *a = scratch + product_scratch(), *h_r = l->h_r + first * l->h;
    Right w_in = {l->w_in + piece.expert * l->h * l->d, l->d, 1}, w_out = {l->w_out + piece.expert * l->d * l->f, l->f, 1};
    product(rows, l->d, l->h, rows_from(l, l->x, first), l->d, tokens_from(l, first), w_in, h_r, l->h, scratch);
    activate(l->kind, rows, l->f, l->h, h_r, a);
    product(rows, l->f, l->d, a, l->f, 0, w_out, p->v + first * l->d, l->d, scratch);
}

/* h, and v: what each expert makes of its rows */
long experts_forward(long threads, long n, long k, long d, long f, long h, long experts, long kind, const float *x,
                     const float *gates, const float *w_in, const float *w_out, int64_t *counts, int64_t *row,
                     int64_t *token, float *h_r, float *v, float *scratch) {
    Layer l = {n, k, d, f, h, experts, kind, x, gates, w_in, w_out, counts, row, token, h_r};
    Piece *pieces = (Piece *)(scratch + threads * scratch_of(&l, threads));
    Forward pass = {&l, pieces, v};
    share(cut(&l, threads, pieces), threads, forward_piece, &pass, scratch, scratch_of(&l, threads));
    return 0;
}

typedef struct {
    const Layer *l;
    const Piece *pieces;
    const float *dy;
    float *gate_r, *dgate_r, *a_r, *dh_r, *dx_r, *dw_in, *dw_out;
    long parts;
} Backward;

/* dh, gate a, d gate and dx of some rows */
static void backward_piece(const void *about, long index, float *scratch) {
    const Backward *p = about;
    const Layer *l = p->l;
    Piece piece = p->pieces[index];
    long first = piece.first, rows = piece.last - first;
    float *da = scratch + product_scratch();
    Right w_in = {l->w_in + piece.expert * l->h * l->d, l->d, 0}, w_out = {l->w_out + piece.expert * l->d * l->f, l->f, 0};
    product(rows, l->d, l->f, rows_from(l, p->dy, first), l->d, tokens_from(l, first), w_out, da, l->f, scratch);
    for (long r = first; r < first + rows; r++) {
        float gate = p->gate_r ? p->gate_r[r] : 1.0f, *a = p->a_r + r * l->f, *dh = p->dh_r + r * l->h;
        float along = back(l->kind, l->f, l->h, gate, l->h_r + r * l->h, da + (r - first) * l->f, a, dh);
        if (p->gate_r) p->dgate_r[r] = along;
    }
    if (p->dx_r) product(rows, l->h, l->d, p->dh_r + first * l->h, l->h, 0, w_in, p->dx_r + first * l->d, l->d, scratch);
}

/* Parts of a matrix's rows that are tasks of their own, where experts are few; halves pack the other side twice. */
static long parts_of(const Layer *l, long threads) {
    long parts = (2 * threads + l->experts - 1) / l->experts, most = larger(1, (l->d < l->h ? l->d : l->h) / 64);
    return parts < most ? parts : most;
}

/* Some rows of dw_in of an expert (even) or of its dw_out (odd) */
static void weights_of_expert(const void *about, long index, float *scratch) {
    const Backward *p = about;
    const Layer *l = p->l;
    long expert = index / 2 / p->parts, part = index / 2 % p->parts, start = 0, rows = l->counts[expert];
    long whole = index % 2 ? l->d : l->h, top = whole * part / p->parts, height = whole * (part + 1) / p->parts - top;
    for (long e = 0; e < expert; e++) start += l->counts[e];
    const int64_t *token = tokens_from(l, start);
    if (index % 2 && p->dw_out)
        outer(rows, height, l->f, rows_from(l, p->dy, start) + top, l->d, token, p->a_r + start * l->f, l->f, 0,
              p->dw_out + (expert * l->d + top) * l->f, scratch);
    if (index % 2 == 0 && p->dw_in)
        outer(rows, height, l->d, p->dh_r + start * l->h + top, l->h, 0, rows_from(l, l->x, start), l->d, token,
              p->dw_in + (expert * l->h + top) * l->d, scratch);
}

/* Gradients, that of x by rows; those with a null pointer are left out. */
long experts_backward(long threads, long n, long k, long d, long f, long h, long experts, long kind, const float *x,
                      const float *gates, const float *w_in, const float *w_out, int64_t *counts, int64_t *row,
                      int64_t *token, float *h_r, const float *dy, float *gate_r, float *dgate_r, float *a_r,
                      float *dh_r, float *dx_r, float *dgates, float *dw_in, float *dw_out, float *scratch) {
    Layer l = {n, k, d, f, h, experts, kind, x, gates, w_in, w_out, counts, row, token, h_r};
    long each = scratch_of(&l, threads);
    Piece *pieces = (Piece *)(scratch + threads * each);
    Backward pass = {&l, pieces, dy, gate_r, dgate_r, a_r, dh_r, dx_r, dw_in, dw_out,
                     parts_of(&l, threads)};
    for (long m = 0; gates && m < n * k; m++) gate_r[row[m]] = gates[m];
    share(cut(&l, threads, pieces), threads, backward_piece, &pass, scratch, each);
    for (long m = 0; gates && m < n * k; m++) dgates[m] = dgate_r[row[m]];
    if (dw_in || dw_out) share(2 * experts * pass.parts, threads, weights_of_expert, &pass, scratch, each);
    return 0;
}
