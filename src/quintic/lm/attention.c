/* Causal attention in float32, from the projections' outputs to the mixed values, and back.
 *
 * A task is one head of one sequence, or in the forward pass some of its queries. It turns queries and keys by their
 * positions into memory of its own and goes through the queries in blocks of QUERIES; beyond a block's diagonal nothing
 * is computed. Logits are in units of log 2, so that weights are powers of 2. With q and k turned, c = scale / log 2,
 *
 *     s = c q k',   p = 2^(s - l),   l = log2 sum 2^s,   o = p v
 *     d = <do, o>,  ds = p (do v' - d),   dq = scale ds k,   dk = scale ds' q,   dv = p' do
 *
 * (the recomputation of Dao et al., arXiv 2205.14135, where a whole row of logits fits the cache). Every element is
 * summed in an order that neither threads nor other sequences change. Legend: b sequences, t tokens, h heads, n width
 * without position, r rotated width, e = n + r, v width of values.
 */
#include "attention.h"
#include "kernels.h"

#define QUERIES 64       /* rows of a block */
#define PANEL (WIDE * W) /* keys of a panel */
#define KEYS (4 * PANEL) /* keys at a time in the backward pass */
#define LOG2E 1.44269504088896341f

typedef struct {
    long b, t, h, n, r, v, q_row, kv_row, key_row, parts;
    float scale;
    const float *q, *kv, *key, *table, *out, *dout, *lse;
    float *to, *lse_to, *dq, *dkv, *dkey_h, *dkey;
} Heads;

INLINE long up(long count, long unit) { return (count + unit - 1) / unit * unit; }

/* 2^x for x up to some 100; 0 below -100, where products would soon leave the range. A NaN stays one. */
INLINE V exp2_(V x) {
    V magic = all(12583039.0f); /* 1.5 * 2^23 + 127: the last bits of the sum are the exponent of the result */
    V k = x + magic;
    V power = (V)((I)k << 23 & (x >= -100.0f));
    V f = x - (k - magic);
    V y = all(1.326472725e-3f);
    y = y * f + 9.671512688e-3f;
    y = y * f + 5.550733744e-2f;
    y = y * f + 2.402224208e-1f;
    y = y * f + 6.931469776e-1f;
    y = y * f + 1.0f;
    return y * power;
}

/* log2 of positive normal numbers: 2 atanh((m - 1) / (m + 1)) / log 2 of their mantissas m, in 0.7 ... 1.4; a NaN and
 * infinity stay what they are */
INLINE V log2_(V x) {
    I exponent = ((I)x - 0x3f3504f3) >> 23;
    V m = (V)((I)x - (exponent << 23)), z = (m - 1.0f) / (m + 1.0f), s = z * z;
    V series = s * (s * (s * (s * 0.32059890f + 0.41219858f) + 0.57707802f) + 0.96179669f) + 2.88539008f;
    V y = __builtin_convertvector(exponent, V) + z * series;
    return pick((I)x >= 0x7f800000, x, y);
}

#if W == 16
#define SWAP(v) SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define EVEN(v) SHUFFLE(v, v, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14)
#define ODD(v) SHUFFLE(v, v, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15)
#define LANES (I){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#define SIGNS (V){-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1}
#else
#define SWAP(v) SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6)
#define EVEN(v) SHUFFLE(v, v, 0, 0, 2, 2, 4, 4, 6, 6)
#define ODD(v) SHUFFLE(v, v, 1, 1, 3, 3, 5, 5, 7, 7)
#define LANES (I){0, 1, 2, 3, 4, 5, 6, 7}
#define SIGNS (V){-1, 1, -1, 1, -1, 1, -1, 1}
#endif
INLINE V larger(V a, V b) { return pick(a > b, a, b); }

#define LARGER(...) v = larger(v, SHUFFLE(v, v, __VA_ARGS__));
INLINE float largest(V v) { FOLD(LARGER) return v[0]; }

/* to = scale * from, its pairs turned as complex numbers; back by sign -1. They may be the same. */
INLINE void turn(long width, const float *from, const float *table, float sign, float scale, float *to) {
    for (long j = 0; j < width; j += W) {
        V x = load_some(from + j, width - j), c = load_some(table + j, width - j);
        store_some(to + j, scale * (x * EVEN(c) + SIGNS * sign * SWAP(x) * ODD(c)), width - j);
    }
}

INLINE void copy(long width, const float *from, float *to) {
    for (long j = 0; j < width; j += W) store_some(to + j, load_some(from + j, width - j), width - j);
}

/* acc[i][:] += sum over k of a[i lda + k step] b[k ldb + :] */
INLINE void accumulate(int nv, long depth, const float *a, long lda, long step, const float *b, long ldb,
                       V (*acc)[WIDE]) {
    for (long k = 0; k < depth; k++, a += step, b += ldb) {
        V bk[WIDE];
        UNROLL for (int j = 0; j < nv; j++) bk[j] = load(b + j * W);
        UNROLL for (int i = 0; i < ROWS; i++) {
            float x = a[i * lda];
            UNROLL for (int j = 0; j < nv; j++) acc[i][j] += x * bk[j];
        }
    }
}

INLINE void clear(int nv, V (*acc)[WIDE]) {
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int j = 0; j < nv; j++) acc[i][j] = all(0);
}

/* The three instances of a function whose first parameter is the number of vectors. */
#define BY_WIDTH(nv, function, ...)                    \
    do {                                               \
        if ((nv) >= 3) function(3, __VA_ARGS__);       \
        else if ((nv) == 2) function(2, __VA_ARGS__);  \
        else function(1, __VA_ARGS__);                 \
    } while (0)

/* c (+)= a b for ROWS rows */
INLINE void tile_plain(int nv, long depth, const float *a, long lda, long step, const float *b, long ldb, float *c,
                       long ldc, int add) {
    V acc[ROWS][WIDE];
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int j = 0; j < nv; j++) acc[i][j] = add ? load(c + i * ldc + j * W) : all(0);
    accumulate(nv, depth, a, lda, step, b, ldb, acc);
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int j = 0; j < nv; j++) store(c + i * ldc + j * W, acc[i][j]);
}

/* c (+)= a b, where b[k] is row skip + k of panels of `packed` rows. */
static void times(long depth, long columns, const float *a, long lda, const float *b, long packed, long skip, float *c,
                  long ldc, int add) {
    for (long n = 0; n < columns;) {
        int nv = panel(n, columns);
        BY_WIDTH(nv, tile_plain, depth, a, lda, 1, b + skip * nv * W, nv * W, c + n, ldc, add);
        b += packed * nv * W;
        n += nv * W;
    }
}

/* c += a' b, likewise */
static void times_transposed(long depth, long columns, const float *a, long lda, const float *b, long packed, long skip,
                             float *c, long ldc) {
    for (long n = 0; n < columns;) {
        int nv = panel(n, columns);
        BY_WIDTH(nv, tile_plain, depth, a, 1, lda, b + skip * nv * W, nv * W, c + n, ldc, 1);
        b += packed * nv * W;
        n += nv * W;
    }
}

static void logits(int vectors, long depth, const float *a, const float *b, long ldb, float *c, long ldc) {
    BY_WIDTH(vectors, tile_plain, depth, a, depth, 1, b, ldb, c, ldc, 0);
}

/* Panels of PANEL columns, the last one narrower: b[k][n] = rows[n][k] */
static void pack_keys(long depth, long columns, const float *rows, long ld, float *out) {
    for (long n = 0; n < columns; n += PANEL, out += depth * PANEL)
        pack_columns(depth, columns - n < PANEL ? columns - n : PANEL, rows + n * ld, ld, out);
}

INLINE long panel_row(long columns, long n) { return columns - n < PANEL ? padded(columns - n) : PANEL; }

/* c[i][:] = scale[i] sum over k <= first + i of p[i][k] b[k][:]: what lies beyond the diagonal is not read. */
INLINE void tile_causal(int nv, long first, const float *p, long ldp, const float *b, const float *scale, float *c,
                        long ldc, long rows, long columns) {
    V acc[ROWS][WIDE];
    clear(nv, acc);
    accumulate(nv, first + 1, p, ldp, 1, b, nv * W, acc);
    p += first;
    b += first * nv * W;
    UNROLL for (int k = 1; k < ROWS; k++) if (k < rows)
        UNROLL for (int i = k; i < ROWS; i++)
            UNROLL for (int j = 0; j < nv; j++) acc[i][j] += p[i * ldp + k] * load(b + (k * nv + j) * W);
    UNROLL for (int i = 0; i < ROWS; i++) if (i < rows)
        UNROLL for (int j = 0; j < nv; j++)
            if (columns > j * W) store_some(c + i * ldc + j * W, scale[i] * acc[i][j], columns - j * W);
}

/* 2^(s - largest) in place, for the ROWS queries from `row` on, a multiple of ROWS: the diagonal is in one vector. */
INLINE void softmax(long row, float *s, long ld, V *largest_of, V *sum_of) {
    long last = row / W * W;
    V most[ROWS], sums[ROWS];
    UNROLL for (int i = 0; i < ROWS; i++) most[i] = all(s[i * ld]);
    for (long n = 0; n < last; n += W)
        UNROLL for (int i = 0; i < ROWS; i++) most[i] = larger(load(s + i * ld + n), most[i]);
    UNROLL for (int i = 0; i < ROWS; i++) {
        V x = load(s + i * ld + last);
        most[i] = larger(pick(LANES <= (int32_t)(row + i - last), x, most[i]), most[i]);
        (*largest_of)[i] = largest(most[i]);
        sums[i] = all(0);
    }
    for (long n = 0; n < last; n += W)
        UNROLL for (int i = 0; i < ROWS; i++) {
            V p = exp2_(load(s + i * ld + n) - (*largest_of)[i]);
            store(s + i * ld + n, p);
            sums[i] += p;
        }
    UNROLL for (int i = 0; i < ROWS; i++) {
        V p = exp2_(load(s + i * ld + last) - (*largest_of)[i]);
        p = pick(LANES <= (int32_t)(row + i - last), p, all(0));
        store(s + i * ld + last, p);
        (*sum_of)[i] = sum(sums[i] + p);
    }
}

/* Asks for rows that are needed soon: they are far apart, which the processor's own guesses do not find. */
INLINE void soon(long first, long last, long width, const float *from, long ld) {
    for (long i = first; i < last; i++)
        for (long j = 0; j < width; j += 16) __builtin_prefetch(from + i * ld + j);
}

/* Turned keys of one head, in rows. */
static void turned_keys(const Heads *a, long b, long h, long tokens, float *k) {
    long e = a->n + a->r;
    for (long i = 0; i < tokens; i++, k += e) {
        copy(a->n, a->kv + (b * a->t + i) * a->kv_row + h * (a->n + a->v), k);
        copy(a->r, a->key + (b * a->t + i) * a->key_row, k + a->n);
        turn(e, k, a->table + i * e, 1, 1, k);
    }
}

/* Turned queries of a block, c q; zeros follow up to whole tiles. */
static void turned_queries(const Heads *a, long b, long h, long first, long rows, float *q) {
    long e = a->n + a->r;
    for (long i = 0; i < rows; i++)
        turn(e, a->q + (b * a->t + first + i) * a->q_row + h * e, a->table + (first + i) * e, 1, a->scale * LOG2E,
             q + i * e);
    memset(q + rows * e, 0, 4 * (up(rows, ROWS) - rows) * e);
}

/* Where a thread has what in the forward pass; `end` floats in all. */
typedef struct {
    long ld, rows, logits, keys, values, q, end;
} Room;

static Room places(const Heads *a) {
    long e = a->n + a->r, at = 0;
    Room s;
    s.ld = padded(a->t) + W;
    s.rows = s.logits = at; /* rows of keys are not needed any more when there are logits */
    at += padded(a->t * e > QUERIES * s.ld ? a->t * e : QUERIES * s.ld);
    s.keys = at, at += padded(a->t) * e;
    s.values = at, at += a->t * padded(a->v);
    s.q = at, at += padded(QUERIES * e);
    s.end = at;
    return s;
}

static void forward_head(const void *about, long index, float *scratch) {
    const Heads *a = about;
    long part = index % a->parts, h = index / a->parts % a->h, b = index / a->parts / a->h;
    long e = a->n + a->r, blocks = (a->t + QUERIES - 1) / QUERIES;
    long last = blocks - 1 - (blocks - 1 - part) % a->parts; /* parts take turns: later blocks look at more keys */
    long tokens = (last + 1) * QUERIES < a->t ? (last + 1) * QUERIES : a->t;
    Room at = places(a);
    float *s = scratch + at.logits, *keys = scratch + at.keys, *values = scratch + at.values, *q = scratch + at.q;
    soon(0, tokens, a->n + a->v, a->kv + b * a->t * a->kv_row + h * (a->n + a->v), a->kv_row);
    turned_keys(a, b, h, tokens, scratch + at.rows);
    pack_keys(e, tokens, scratch + at.rows, e, keys);
    pack_rows(tokens, a->v, a->kv + b * a->t * a->kv_row + h * (a->n + a->v) + a->n, a->kv_row, 0, values);
    for (long block = part; block < blocks; block += a->parts) {
        long start = block * QUERIES, rows = a->t - start < QUERIES ? a->t - start : QUERIES;
        turned_queries(a, b, h, start, rows, q);
        long next = start + a->parts * QUERIES;
        soon(next, next + QUERIES < a->t ? next + QUERIES : a->t, e, a->q + b * a->t * a->q_row + h * e, a->q_row);
        for (long n = 0; n < start + rows; n += PANEL)
            for (long m = n > start ? (n - start) / ROWS * ROWS : 0; m < rows; m += ROWS) {
                long reach = start + m + ROWS < tokens ? start + m + ROWS : tokens;
                if (n < reach)
                    logits((int)((reach - n + W - 1) / W), e, q + m * e, keys + n * e, panel_row(tokens, n),
                           s + m * at.ld + n, at.ld);
            }
        for (long m = 0; m < rows; m += ROWS) {
            long left = rows - m < ROWS ? rows - m : ROWS, row = start + m;
            float *p = s + m * at.ld;
            V sums = all(1), most = all(0), inverse;
            softmax(row, p, at.ld, &most, &sums);
            inverse = 1.0f / sums;
            store_some(a->lse_to + (b * a->h + h) * a->t + row, most + log2_(sums), left);
            float *to = a->to + ((b * a->t + row) * a->h + h) * a->v;
            const float *v = values;
            for (long n = 0; n < a->v;) {
                int nv = panel(n, a->v);
                BY_WIDTH(nv, tile_causal, row, p, at.ld, v, (float *)&inverse, to + n, a->h * a->v, left, a->v - n);
                v += tokens * nv * W;
                n += nv * W;
            }
        }
    }
}

/* p = 2^(s - l) and ds = p (dp - d) of ROWS queries from `row` on and the keys from `column` on; zeros beyond the
 * diagonal. */
INLINE void tile_weights(int nv, long e, const float *q, const float *keys, long v, const float *dout,
                         const float *values, long ldb, const float *lse, const float *d, long row, long column,
                         float *p, float *ds, long ld) {
    V acc[ROWS][WIDE];
    int beyond = column + nv * W - 1 > row;
    clear(nv, acc);
    accumulate(nv, e, q, e, 1, keys, ldb, acc);
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int j = 0; j < nv; j++) {
            V x = exp2_(acc[i][j] - lse[i]);
            if (beyond) x = pick(LANES + (int32_t)(column + j * W) <= (int32_t)(row + i), x, all(0));
            store(p + i * ld + j * W, x);
        }
    clear(nv, acc);
    accumulate(nv, v, dout, v, 1, values, ldb, acc);
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int j = 0; j < nv; j++) {
            V x = load(p + i * ld + j * W) * (acc[i][j] - d[i]);
            if (beyond) x = pick(LANES + (int32_t)(column + j * W) <= (int32_t)(row + i), x, all(0));
            store(ds + i * ld + j * W, x);
        }
}

static void weights(int vectors, long e, const float *q, const float *keys, long v, const float *dout,
                    const float *values, long ldb, const float *lse, const float *d, long row, long column, float *p,
                    float *ds, long ld) {
    BY_WIDTH(vectors, tile_weights, e, q, keys, v, dout, values, ldb, lse, d, row, column, p, ds, ld);
}

/* Where a thread has what in the backward pass; `end` floats in all. */
typedef struct {
    long rows, keys, values, keys_by_row, dk, dv, q, q_by_row, dout, dout_by_row, dq, p, ds, end;
} BackwardRoom;

#define LD (KEYS + W) /* of p and ds: not a power of two */

static BackwardRoom backward_places(const Heads *a) {
    long e = a->n + a->r, t = up(a->t, ROWS) + ROWS, wide = padded(e), wide_v = padded(a->v), at = 0;
    BackwardRoom s;
    s.rows = s.p = at; /* rows of keys are not needed any more when p is made */
    s.ds = at + QUERIES * LD;
    at += padded(2 * QUERIES * LD > a->t * e ? 2 * QUERIES * LD : a->t * e);
    s.keys = at, at += padded(a->t) * e;
    s.values = at, at += padded(a->t) * a->v;
    s.keys_by_row = at, at += a->t * wide;
    s.dk = at, at += t * wide;
    s.dv = at, at += t * wide_v;
    s.q = at, at += padded(QUERIES * e);
    s.q_by_row = at, at += QUERIES * wide;
    s.dout = at, at += padded(QUERIES * a->v);
    s.dout_by_row = at, at += QUERIES * wide_v;
    s.dq = at, at += QUERIES * wide;
    s.end = at;
    return s;
}

static void backward_head(const void *about, long index, float *scratch) {
    const Heads *a = about;
    long h = index % a->h, b = index / a->h, t = a->t, v = a->v, e = a->n + a->r, wide = padded(e), wide_v = padded(v);
    BackwardRoom at = backward_places(a);
    float *keys = scratch + at.keys, *values = scratch + at.values, *keys_by_row = scratch + at.keys_by_row;
    float *dk = scratch + at.dk, *dv = scratch + at.dv, *q = scratch + at.q, *q_by_row = scratch + at.q_by_row;
    float *dout = scratch + at.dout, *dout_by_row = scratch + at.dout_by_row, *dq = scratch + at.dq;
    float *p = scratch + at.p, *ds = scratch + at.ds;
    soon(0, t, a->n + v, a->kv + b * t * a->kv_row + h * (a->n + v), a->kv_row);
    turned_keys(a, b, h, t, scratch + at.rows);
    pack_keys(e, t, scratch + at.rows, e, keys);
    pack_rows(t, e, scratch + at.rows, e, 0, keys_by_row);
    pack_keys(v, t, a->kv + b * t * a->kv_row + h * (a->n + v) + a->n, a->kv_row, values);
    memset(dk, 0, 4 * (up(t, ROWS) * wide));
    memset(dv, 0, 4 * (up(t, ROWS) * wide_v));
    for (long start = 0; start < t; start += QUERIES) {
        long rows = t - start < QUERIES ? t - start : QUERIES, reach = start + rows;
        float d[QUERIES] = {0}, lse[QUERIES] = {0};
        turned_queries(a, b, h, start, rows, q);
        pack_rows(rows, e, q, e, 0, q_by_row);
        memset(dout + rows * v, 0, 4 * (up(rows, ROWS) - rows) * v);
        for (long i = 0; i < rows; i++) {
            long place = ((b * t + start + i) * a->h + h) * v;
            V slope = all(0);
            for (long j = 0; j < v; j += W)
                slope += load_some(a->dout + place + j, v - j) * load_some(a->out + place + j, v - j);
            d[i] = sum(slope);
            lse[i] = a->lse[(b * a->h + h) * t + start + i];
            copy(v, a->dout + place, dout + i * v);
        }
        pack_rows(rows, v, dout, v, 0, dout_by_row);
        long next = reach + QUERIES < t ? reach + QUERIES : t, head = b * t * a->h + h;
        soon(reach, next, e, a->q + head * e, a->q_row);
        soon(reach, next, v, a->out + head * v, a->h * v);
        soon(reach, next, v, a->dout + head * v, a->h * v);
        for (long first = 0; first < reach; first += KEYS) {
            long last = reach - first < KEYS ? reach : first + KEYS;
            for (long m = 0; m < rows; m += ROWS) {
                long row = start + m, end = row + ROWS < last ? row + ROWS : last;
                for (long n = first; n < end; n += PANEL)
                    weights((int)((end - n + W - 1) / W), e, q + m * e, keys + n * e, v, dout + m * v, values + n * v,
                            panel_row(t, n), lse + m, d + m, row, n, p + m * LD + n - first, ds + m * LD + n - first,
                            LD);
                if (first < end)
                    times(end - first, e, ds + m * LD, LD, keys_by_row, t, first, dq + m * wide, wide, first > 0);
            }
            for (long n = first; n < last; n += ROWS) {
                long skip = n > start ? (n - start) / ROWS * ROWS : 0; /* queries before these keys */
                float *p_n = p + skip * LD + n - first, *ds_n = ds + skip * LD + n - first;
                times_transposed(rows - skip, v, p_n, LD, dout_by_row, rows, skip, dv + n * wide_v, wide_v);
                times_transposed(rows - skip, e, ds_n, LD, q_by_row, rows, skip, dk + n * wide, wide);
            }
        }
        for (long i = 0; i < rows; i++)
            turn(e, dq + i * wide, a->table + (start + i) * e, -1, a->scale, a->dq + (head + (start + i) * a->h) * e);
    }
    for (long i = 0; i < t; i++) {
        float *to = a->dkv + ((b * t + i) * a->h + h) * (a->n + v), *k = dk + i * wide;
        turn(e, k, a->table + i * e, -1, 1 / LOG2E, k);
        copy(a->n, k, to);
        copy(v, dv + i * wide_v, to + a->n);
        copy(a->r, k + a->n, a->dkey_h + ((b * a->h + h) * t + i) * a->r);
    }
}

/* The heads share one turned key: its gradient is their sum, in their order. */
static void add_heads(const void *about, long index, float *scratch) {
    const Heads *a = about;
    long size = a->t * a->r;
    (void)scratch;
    for (long j = 0; j < size; j += W) {
        V x = all(0);
        for (long h = 0; h < a->h; h++) x += load_some(a->dkey_h + (index * a->h + h) * size + j, size - j);
        store_some(a->dkey + index * size + j, x, size - j);
    }
}

/* Parts only where there are fewer heads than threads can share out evenly: each packs the keys again. */
static Heads heads(long threads, long b, long t, long h, long n, long r, long v) {
    long blocks = (t + QUERIES - 1) / QUERIES, parts = (4 * threads + b * h - 1) / (b * h);
    return (Heads){.b = b, .t = t, .h = h, .n = n, .r = r, .v = v, .q_row = h * (n + r), .kv_row = h * (n + v),
                   .parts = parts < blocks ? parts : blocks};
}

long attention(long threads, float *room, long size, long b, long t, long h, long n, long r, long v, long key_row,
               double scale, const float *q, const float *kv, const float *key, const float *table, float *out,
               float *lse) {
    Heads a = heads(threads, b, t, h, n, r, v);
    long each = padded(places(&a).end);
    NEED(threads * each);
    a.key_row = key_row, a.scale = (float)scale, a.q = q, a.kv = kv, a.key = key, a.table = table;
    a.to = out, a.lse_to = lse;
    share(b * h * a.parts, threads, forward_head, &a, room, each);
    return 0;
}

long attention_backward(long threads, float *room, long size, long b, long t, long h, long n, long r, long v, long key_row,
                        double scale, const float *q, const float *kv, const float *key, const float *table,
                        const float *out, const float *lse, const float *dout, float *dq, float *dkv, float *dkey) {
    Heads a = heads(threads, b, t, h, n, r, v);
    long each = padded(backward_places(&a).end), by_head = padded(b * h * t * r);
    NEED(by_head + threads * each);
    a.key_row = key_row, a.scale = (float)scale, a.q = q, a.kv = kv, a.key = key, a.table = table;
    a.out = out, a.lse = lse, a.dout = dout, a.dq = dq, a.dkv = dkv, a.dkey_h = room, a.dkey = dkey;
    share(b * h, threads, backward_head, &a, room + by_head, each);
    share(b, threads, add_heads, &a, 0, 0);
    return 0;
}
