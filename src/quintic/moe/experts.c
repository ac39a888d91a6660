/* The routed sum of moe/routed.py in float32, for gated and plain experts: the same formulas, fewer passes over memory.
 *
 * A task is some rows of one expert: its weights are packed once, its tokens are read where they lie, and what it makes
 * stays in the cache until it is used. Legend as there: n tokens, k choices, r rows sorted by expert, d width, f expert
 * width, h = 2 f (gated) or f, e experts.
 */
#include "kernels.h"
#include <stdlib.h>

enum { SILU, GELU_TANH, RELU }; /* in the order of _KINDS in moe/expert_kernels.py */

typedef struct {
    long n, k, d, f, h, experts, kind;
    const float *x, *gates, *w_in, *w_out;
    int64_t *counts, *row, *token;
    float *h_r;
    Right in, out; /* of the one expert of a dense network, packed */
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
    return greater(32, lesser(192, l->n * l->k / (4 * threads)));
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

/* y = plus + sum over the choices of each token of weight * v[row], in their order; without plus from 0 */
typedef struct {
    long n, k, d;
    const float *v, *weight, *plus;
    const int64_t *row;
    float *y;
} Sum;

#define TOKENS 16 /* of a task */

static void add_rows(const void *about, long index, float *scratch) {
    const Sum *s = about;
    long last = lesser((index + 1) * TOKENS, s->n);
    (void)scratch;
    for (long i = index * TOKENS; i < last; i++) {
        for (long j = 0; i + 1 < last && j < s->k; j++) /* rows lie anywhere: the next ones are called for in time */
            for (long q = 0; q < s->d; q += 16) __builtin_prefetch(s->v + s->row[(i + 1) * s->k + j] * s->d + q);
        for (long q = 0; q < s->d; q += W) {
            V total = s->plus ? load_some(s->plus + i * s->d + q, s->d - q) : all(0);
            for (long j = 0; j < s->k; j++) {
                V v = load_some(s->v + s->row[i * s->k + j] * s->d + q, s->d - q);
                total += s->weight ? s->weight[i * s->k + j] * v : v;
            }
            store_some(s->y + i * s->d + q, total, s->d - q);
        }
    }
}

/* weight: null for 1 */
long experts_sum(long threads, float *room, long size, long n, long k, long d, const float *v, const float *weight,
                 const int64_t *row, const float *plus, float *y) {
    Sum s = {n, k, d, v, weight, plus, row, y};
    NO_ROOM;
    share((n + TOKENS - 1) / TOKENS, threads, add_rows, &s, 0, 0);
    return 0;
}

/* counts, the row of each slot in the order of expert and token, and the token of each row; -1: an id is no expert's */
long experts_sort(long threads, float *room, long size, long n, long k, long experts, const int64_t *ids, int64_t *counts,
                  int64_t *row, int64_t *token) {
    (void)threads;
    NO_ROOM;
    memset(counts, 0, sizeof(int64_t) * experts);
    for (long m = 0; m < n * k; m++) {
        if (ids[m] < 0 || ids[m] >= experts) return -1;
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
    const float *plus;
    float *v;
} Forward;

static void forward_piece(const void *about, long index, float *scratch) {
    const Forward *p = about;
    const Layer *l = p->l;
    Piece piece = p->pieces[index];
    long first = piece.first, rows = piece.last - first;
    float *a = scratch + product_scratch(), *h_r = l->h_r + first * l->h;
    Right w_in = l->token ? (Right){l->w_in + piece.expert * l->h * l->d, l->d, ACROSS} : l->in;
    Right w_out = l->token ? (Right){l->w_out + piece.expert * l->d * l->f, l->f, ACROSS} : l->out;
    product(rows, l->d, l->h, rows_from(l, l->x, first), l->d, tokens_from(l, first), w_in, 0, h_r, l->h, scratch);
    activate(l->kind, rows, l->f, l->h, h_r, a);
    const float *plus = p->plus ? p->plus + first * l->d : 0;
    product(rows, l->f, l->d, a, l->f, 0, w_out, plus, p->v + first * l->d, l->d, scratch);
}

/* y, to which plus is added if it is given; and counts, row, token and h_r, for the way back. Without ids one expert has all rows as they are, with gates of 1,
 * and there are no counts, rows and tokens. -1: an id is no expert's. */
long experts_forward(long threads, float *room, long size, long n, long k, long d, long f, long h, long experts, long kind,
                     const float *x, const int64_t *ids, const float *gates, const float *w_in, const float *w_out,
                     int64_t *counts, int64_t *row, int64_t *token, float *h_r, const float *plus, float *y) {
    int64_t all_rows = n;
    Layer l = {.n = n, .k = k, .d = d, .f = f, .h = h, .experts = experts, .kind = kind, .x = x, .gates = gates,
               .w_in = w_in, .w_out = w_out, .counts = ids ? counts : &all_rows, .row = row, .token = token, .h_r = h_r};
    long made = ids ? padded(n * k * d) : padded(h) * d + padded(d) * f; /* rows of v, or the packed expert */
    long each = padded(product_scratch() + most_rows(&l, threads) * f);
    long pieces = padded(most_pieces(&l, threads) * (long)(sizeof(Piece) / sizeof(float)));
    NEED(made + pieces + threads * each);
    if (ids && experts_sort(threads, 0, 0, n, k, experts, ids, counts, row, token)) return -1;
    if (!ids) {
        l.in = pack(d, h, (Right){w_in, d, ACROSS}, room);
        l.out = pack(f, d, (Right){w_out, f, ACROSS}, room + padded(h) * d);
    }
    Forward pass = {&l, (Piece *)(room + made), ids ? 0 : plus, ids ? room : y};
    share(cut(&l, threads, (Piece *)(room + made)), threads, forward_piece, &pass, room + made + pieces, each);
    if (ids) experts_sum(threads, 0, 0, n, k, d, room, gates, row, plus, y);
    return 0;
}

/* Backward a task is some rows of an expert too, from da to its part of dw: what lies between stays in the cache. The
 * first part of an expert writes into dw itself, the others into memory that is added to it at the end, in their order.
 * How rows are parted depends on the load alone, so that threads change no bit. */
typedef struct {
    long expert, first, last, part, parts, extra; /* extra: where, of the memory for further parts */
} Part;

/* Rows of a part: enough that the further parts of dw take no more memory than dh of their rows. */
static long rows_of_a_part(const Layer *l) {
    long rows = l->n * l->k / 16;
    return greater(l->d, rows < 128 ? 128 : rows > 512 ? 512 : rows);
}

static long most_extras(const Layer *l) { return l->n * l->k / rows_of_a_part(l); }

/* Numbers of dw_in and dw_out of an expert. */
INLINE long size_of(const Layer *l) { return (l->h + l->f) * l->d; }

/* Rows at a time. */
static long rows_of_a_block(const Layer *l) {
    long rows = DEPTH;
    while (rows > 64 && rows * (l->f + l->h + greater(l->h, l->d)) > 1 << 18) rows /= 2;
    return rows;
}

static long backward_scratch_of(const Layer *l) {
    return padded(greater(product_scratch(), outer_scratch(greater(l->h, l->d))) + rows_of_a_block(l) * (l->f + l->h));
}

/* Experts without rows have a part, too: their dw is zero. */
static long part(const Layer *l, Part *parts) {
    long good = rows_of_a_part(l), start = 0, made = 0, extras = 0;
    for (long e = 0; e < l->experts; start += l->counts[e++]) {
        long rows = l->counts[e], count = rows > good ? (rows + good / 2) / good : 1;
        for (long p = 0; p < count; p++)
            parts[made++] = (Part){e, start + rows * p / count, start + rows * (p + 1) / count, p, count, extras - 1 + p};
        extras += count - 1;
    }
    return made;
}

static int by_rows(const void *a, const void *b) {
    const Part *p = a, *q = b;
    long more = (q->last - q->first) - (p->last - p->first);
    return more > 0 ? 1 : more < 0 ? -1 : 0;
}

typedef struct {
    const Layer *l;
    const Part *parts;
    const float *dy;
    float *gate_r, *dgate_r, *dx_r, *dw_in, *dw_out, *extras;
} Backward;

/* Where a part's dw_in (0) or dw_out (1) goes; null if nobody asks for it. */
INLINE float *place_of(const Backward *p, const Part *part, int out) {
    const Layer *l = p->l;
    float *whole = out ? p->dw_out : p->dw_in;
    if (!whole) return 0;
    if (part->part) return p->extras + part->extra * size_of(l) + (out ? l->h * l->d : 0);
    return whole + part->expert * l->d * (out ? l->f : l->h);
}

/* dx, d gate and dw of some rows */
static void backward_part(const void *about, long index, float *scratch) {
    const Backward *p = about;
    const Layer *l = p->l;
    const Part *part = p->parts + index;
    long block = rows_of_a_block(l);
    float *a = scratch + greater(product_scratch(), outer_scratch(greater(l->h, l->d))), *dh = a + block * l->f;
    float *dw_in = place_of(p, part, 0), *dw_out = place_of(p, part, 1);
    Right w_in = l->token ? (Right){l->w_in + part->expert * l->h * l->d, l->d, STRAIGHT} : l->in;
    Right w_out = l->token ? (Right){l->w_out + part->expert * l->d * l->f, l->f, STRAIGHT} : l->out;
    for (long first = part->first; first < part->last || first == part->first; first += block) {
        long rows = part->last - first < block ? part->last - first : block;
        int more = first > part->first;
        const float *x = rows_from(l, l->x, first), *dy = rows_from(l, p->dy, first);
        const int64_t *token = tokens_from(l, first);
        product(rows, l->d, l->f, dy, l->d, token, w_out, 0, a, l->f, scratch); /* da, then a in its place */
        for (long i = 0; i < rows; i++) {
            float gate = p->gate_r ? p->gate_r[first + i] : 1.0f, *a_i = a + i * l->f;
            float along = back(l->kind, l->f, l->h, gate, l->h_r + (first + i) * l->h, a_i, a_i, dh + i * l->h);
            if (p->gate_r) p->dgate_r[first + i] = along;
        }
        if (p->dx_r) product(rows, l->h, l->d, dh, l->h, 0, w_in, 0, p->dx_r + first * l->d, l->d, scratch);
        if (dw_in) outer(rows, l->h, l->d, dh, l->h, 0, x, l->d, token, dw_in, more, scratch);
        if (dw_out) outer(rows, l->d, l->f, dy, l->d, token, a, l->f, 0, dw_out, more, scratch);
    }
}

#define SLICES 16 /* tasks that add up one expert's dw */

static void add_parts(const void *about, long index, float *scratch) {
    const Backward *p = about;
    const Part *part = p->parts + index / SLICES;
    (void)scratch;
    for (int out = 0; out < 2 && !part->part; out++) {
        long size = p->l->d * (out ? p->l->f : p->l->h), slice = index % SLICES;
        float *to = place_of(p, part, out);
        for (long q = 1; to && q < part->parts; q++) {
            Part other = {.part = q, .extra = part->extra + q};
            const float *from = place_of(p, &other, out);
            for (long i = size * slice / SLICES; i < size * (slice + 1) / SLICES; i++) to[i] += from[i];
        }
    }
}

/* Gradients; those with a null pointer are left out. */
long experts_backward(long threads, float *room, long size, long n, long k, long d, long f, long h, long experts, long kind,
                      const float *x, const float *gates, const float *w_in, const float *w_out, int64_t *counts,
                      int64_t *row, int64_t *token, float *h_r, const float *dy, float *dx, float *dgates, float *dw_in,
                      float *dw_out) {
    int64_t all_rows = n;
    Layer l = {.n = n, .k = k, .d = d, .f = f, .h = h, .experts = experts, .kind = kind, .x = x, .gates = gates,
               .w_in = w_in, .w_out = w_out, .counts = token ? counts : &all_rows, .row = row, .token = token, .h_r = h_r};
    long packed = token ? 0 : h * padded(d) + d * padded(f), routed = token ? padded(n * k) : 0, by_row = token && dx ? padded(n * k * d) : 0, each = backward_scratch_of(&l);
    long extras = padded(most_extras(&l) * size_of(&l));
    long parts = padded((experts + most_extras(&l)) * (long)(sizeof(Part) / sizeof(float)));
    NEED(2 * routed + by_row + extras + parts + packed + threads * each);
    float *gate_r = token ? room : 0, *dgate_r = token ? room + routed : 0, *dx_r = room + 2 * routed;
    float *more = dx_r + by_row, *scratch = more + extras + parts + packed;
    Part *part_of = (Part *)(more + extras);
    Backward pass = {&l, part_of, dy, gate_r, dgate_r, dx && token ? dx_r : dx, dw_in, dw_out, more};
    if (!token) {
        l.in = pack(h, d, (Right){w_in, d, STRAIGHT}, scratch - packed);
        l.out = pack(d, f, (Right){w_out, f, STRAIGHT}, scratch - packed + h * padded(d));
    }
    long count = part(&l, part_of);
    qsort(part_of, count, sizeof(Part), by_rows); /* the largest first: the last ones to end are small */
    for (long m = 0; token && m < n * k; m++) gate_r[row[m]] = gates[m];
    share_in_order(count, threads, backward_part, &pass, scratch, each);
    for (long m = 0; token && m < n * k; m++) dgates[m] = dgate_r[row[m]];
    if (count > experts) share(count * SLICES, threads, add_parts, &pass, scratch, 0);
    if (token && dx) experts_sum(threads, 0, 0, n, k, d, dx_r, 0, row, 0, dx);
    return 0;
}
