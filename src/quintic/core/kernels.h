/* What the C kernels share: lanes, a small matrix product, and tasks for the threads that torch has started.
 *
 * float32 only. W lanes make a vector; the compiler lowers it to what the processor has. A product is made of tiles of
 * ROWS rows and up to WIDE vectors, as many as the registers hold (the scheme of Goto and van de Geijn, 2008). Its left
 * side is read in place, through a pointer for each row; its right side is packed in panels, [depth][lanes], so that a
 * tile reads it in order. Every element is summed in the order of the depth: neither the tiles nor the threads change a
 * bit of the result.
 */
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define W 16
#define ROWS 8
#else
#define W 8
#define ROWS 4
#endif
#define WIDE 3

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef float Anywhere __attribute__((vector_size(4 * W), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline, unused))
#define LOCAL static __attribute__((unused))
#define UNROLL _Pragma("GCC unroll 16")

INLINE V load(const float *p) { return *(const Anywhere *)p; }
INLINE void store(float *p, V v) { *(Anywhere *)p = v; }
INLINE V all(float x) { return x - (V){0}; }
INLINE V pick(I where, V yes, V no) { return (V)(((I)yes & where) | ((I)no & ~where)); }

/* Up to W numbers; zeros follow. */
INLINE V load_some(const float *p, long count) {
    if (count >= W) return load(p);
    V v = {0};
    memcpy(&v, p, 4 * count);
    return v;
}

INLINE void store_some(float *p, V v, long count) {
    if (count >= W) store(p, v);
    else memcpy(p, &v, 4 * count);
}

/* exp, to two units in the last place; below -87 and above 88 that of these. A NaN stays one. */
INLINE V exp_(V x) {
    x = pick(x < -87.0f, all(-87.0f), x);
    x = pick(x > 88.0f, all(88.0f), x);
    V magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    V k = x * 1.44269504088896341f + magic;
    I n = (I)k - (I)magic;
    k -= magic;
    V r = x - k * 0.693359375f - k * -2.12194440e-4f;
    V y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (V)((I)y + (n << 23));
}

INLINE V sigmoid(V z) { return 1.0f / (1.0f + exp_(-z)); }

/* to[i][:] = plus[i][:] + sum over k of from[i][k * step] b[k][:], for ROWS rows; without plus from 0. */
#define TILE(NV)                                                                                                \
    LOCAL void tile##NV(long depth, const float *const *from, long step, const float *b, const float *const *plus, \
                        float *const *to) {                                                                     \
        V acc[ROWS][NV];                                                                                        \
        const float *p[ROWS];                                                                                   \
        UNROLL for (int i = 0; i < ROWS; i++) {                                                                 \
            p[i] = from[i];                                                                                     \
            UNROLL for (int j = 0; j < NV; j++) acc[i][j] = plus ? load(plus[i] + j * W) : all(0);              \
        }                                                                                                       \
        for (long k = 0; k < depth; k++, b += NV * W) {                                                         \
            V bk[NV];                                                                                           \
            UNROLL for (int j = 0; j < NV; j++) bk[j] = load(b + j * W);                                        \
            UNROLL for (int i = 0; i < ROWS; i++) {                                                             \
                float x = p[i][k * step];                                                                       \
                UNROLL for (int j = 0; j < NV; j++) acc[i][j] += x * bk[j];                                     \
            }                                                                                                   \
        }                                                                                                       \
        UNROLL for (int i = 0; i < ROWS; i++)                                                                   \
            UNROLL for (int j = 0; j < NV; j++) store(to[i] + j * W, acc[i][j]);                                \
    }
TILE(1)
TILE(2)
TILE(3)

LOCAL void tile(int nv, long depth, const float *const *from, long step, const float *b, const float *const *plus,
                float *const *to) {
    if (nv == 3) tile3(depth, from, step, b, plus, to);
    else if (nv == 2) tile2(depth, from, step, b, plus, to);
    else tile1(depth, from, step, b, plus, to);
}

/* Vectors of the panel that begins at a column: three, and 2 + 2 rather than 3 + 1 at the end. */
INLINE int panel(long column, long columns) {
    long left = (columns - column + W - 1) / W;
    return left == 4 || left == 2 ? 2 : left >= 3 ? 3 : 1;
}

INLINE long lesser(long a, long b) { return a < b ? a : b; }
INLINE long greater(long a, long b) { return a > b ? a : b; }
INLINE long padded(long columns) { return (columns + W - 1) / W * W; }

/* out: panels of b[k][n] = rows[token[k]][n], or rows[k][n]; padded(columns) * depth numbers. */
LOCAL void pack_rows(long depth, long columns, const float *rows, long ld, const int64_t *token, float *out) {
    for (long n = 0; n < columns;) {
        int nv = panel(n, columns);
        for (long k = 0; k < depth; k++)
            for (int j = 0; j < nv; j++, out += W)
                store(out, load_some(rows + (token ? token[k] : k) * ld + n + j * W, columns - n - j * W));
        n += nv * W;
    }
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif
#define EXCHANGE(D, LOW, HIGH)                      \
    UNROLL for (int i = 0; i < W; i++) if (!(i & D)) { \
        V low = SHUFFLE(r[i], r[i + D], LOW);       \
        r[i + D] = SHUFFLE(r[i], r[i + D], HIGH);   \
        r[i] = low;                                 \
    }
/* Of all lanes, by halves: OP(lanes) brings each lane together with its partner, and in the end with every other. */
#if W == 16
#define FOLD(OP)                                              \
    OP(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)  \
    OP(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)  \
    OP(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)  \
    OP(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#else
#define FOLD(OP)              \
    OP(4, 5, 6, 7, 0, 1, 2, 3) \
    OP(2, 3, 0, 1, 6, 7, 4, 5) \
    OP(1, 0, 3, 2, 5, 4, 7, 6)
#endif

#define ADD(...) v += SHUFFLE(v, v, __VA_ARGS__);
INLINE float sum(V v) { FOLD(ADD) return v[0]; }

#define LIST(...) __VA_ARGS__

/* r[i][j] <-> r[j][i]: halves change places, then quarters, ... */
INLINE void transpose(V *r) {
#if W == 16
    EXCHANGE(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
             LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    EXCHANGE(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
             LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    EXCHANGE(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
             LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    EXCHANGE(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
             LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#else
    EXCHANGE(4, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
    EXCHANGE(2, LIST(0, 1, 8, 9, 4, 5, 12, 13), LIST(2, 3, 10, 11, 6, 7, 14, 15))
    EXCHANGE(1, LIST(0, 8, 2, 10, 4, 12, 6, 14), LIST(1, 9, 3, 11, 5, 13, 7, 15))
#endif
}

/* out: panels of b[k][n] = rows[n][k]; padded(columns) * depth numbers. */
LOCAL void pack_columns(long depth, long columns, const float *rows, long ld, float *out) {
    for (long n = 0; n < columns;) {
        int nv = panel(n, columns);
        for (int j = 0; j < nv; j++, n += W) {
            long wide = columns - n, k = 0;
            for (; wide >= W && k + W <= depth; k += W) {
                V r[W];
                UNROLL for (int i = 0; i < W; i++) r[i] = load(rows + (n + i) * ld + k);
                transpose(r);
                UNROLL for (int i = 0; i < W; i++) store(out + ((k + i) * nv + j) * W, r[i]);
            }
            for (; k < depth; k++)
                for (int i = 0; i < W; i++) out[(k * nv + j) * W + i] = i < wide ? rows[(n + i) * ld + k] : 0;
        }
        out += depth * nv * W;
    }
}

/* One tile of c = plus + a b, which the tile may exceed: what lies outside goes nowhere. plus: as c, or null for 0. */
LOCAL void tile_within(int nv, long depth, const float *const *from, long step, const float *b, const float *plus,
                       float *c, long ldc, long rows, long columns) {
    float beyond[ROWS * WIDE * W], *to[ROWS];
    const float *begin[ROWS];
    int whole = columns >= nv * W;
    for (int i = 0; i < ROWS; i++) {
        to[i] = i < rows && whole ? c + i * ldc : beyond + i * nv * W;
        begin[i] = plus && i < rows && whole ? plus + i * ldc : to[i];
        if (plus && i < rows && !whole) memcpy(to[i], plus + i * ldc, 4 * columns);
    }
    tile(nv, depth, from, step, b, plus ? begin : 0, to);
    for (int i = 0; i < ROWS && i < rows && !whole; i++) memcpy(c + i * ldc, to[i], 4 * columns);
}

#define DEPTH 256          /* of a block of the right side, and */
#define WIDTH (4 * WIDE * W) /* its columns: its panels stay in the second cache, with the rows that they meet */

/* Floats that products need for themselves. */
INLINE long product_scratch(void) { return DEPTH * WIDTH; }

/* A right side b: b[k][n] = at[k ld + n], at[n ld + k] if it lies across, or what pack() made of it. */
typedef struct {
    const float *at;
    long ld;
    enum { STRAIGHT, ACROSS, PACKED } lies;
} Right;

LOCAL void pack_block(long depth, long width, Right b, long k, long n, float *out) {
    if (b.lies == ACROSS) pack_columns(depth, width, b.at + n * b.ld + k, b.ld, out);
    else pack_rows(depth, width, b.at + k * b.ld + n, b.ld, 0, out);
}

/* The same right side for many products: padded(columns) * depth numbers. */
LOCAL Right pack(long depth, long columns, Right b, float *out) {
    for (long n = 0; n < columns; n += WIDTH)
        for (long k = 0; k < depth; k += DEPTH) {
            long width = lesser(columns - n, WIDTH);
            pack_block(lesser(depth - k, DEPTH), width, b, k, n, out + n * depth + k * padded(width));
        }
    return (Right){out, 0, PACKED};
}

/* c = plus + a b; row r of a is at token[r], or at r. plus: as c, or null for 0; scratch: null if b is packed. */
LOCAL void product(long rows, long depth, long columns, const float *a, long lda, const int64_t *token, Right b,
                   const float *plus, float *c, long ldc, float *scratch) {
    for (long first = 0; first < columns; first += WIDTH) {
        long width = lesser(columns - first, WIDTH);
        for (long k = 0; k < depth; k += DEPTH) {
            long some = lesser(depth - k, DEPTH);
            const float *panels = scratch, *begin = k ? c : plus;
            if (b.lies == PACKED) panels = b.at + first * depth + k * padded(width);
            else pack_block(some, width, b, k, first, scratch);
            for (long n = first; n < first + width;) {
                int nv = panel(n - first, width);
                for (long m = 0; m < rows; m += ROWS) {
                    const float *from[ROWS];
                    for (int i = 0; i < ROWS; i++) {
                        long r = lesser(m + i, rows - 1);
                        from[i] = a + (token ? token[r] : r) * lda + k;
                    }
                    long at = m * ldc + n;
                    tile_within(nv, some, from, 1, panels, begin ? begin + at : 0, c + at, ldc, rows - m, columns - n);
                }
                panels += some * nv * W;
                n += nv * W;
            }
        }
    }
}

/* Floats that `outer` needs for itself. */
INLINE long outer_scratch(long height) { return DEPTH * (height + 16 + WIDTH); }

/* out: panels of ROWS columns of a, [depth][ROWS]; a cache line of a row at a time. */
LOCAL void pack_left(long depth, long height, const float *a, long lda, const int64_t *token, float *out) {
    for (long i = 0; i < height; i += 16)
        for (long k = 0; k < depth; k++) {
            const float *row = a + (token ? token[k] : k) * lda;
            for (long j = i; j < i + 16 && j < height; j += ROWS) {
                float *to = out + j * depth + k * ROWS;
                if (height - j >= ROWS) memcpy(to, row + j, 4 * ROWS);
                else
                    for (int q = 0; q < ROWS; q++) to[q] = q < height - j ? row[j + q] : 0;
            }
        }
}

/* c[i][:] (+)= sum over r of a[ta[r]][i] b[tb[r]][:], i < height; without rows exact zeros. */
LOCAL void outer(long rows, long height, long width, const float *a, long lda, const int64_t *ta, const float *b,
                 long ldb, const int64_t *tb, float *c, int add, float *scratch) {
    float *left = scratch, *right = scratch + DEPTH * ((height + ROWS - 1) / ROWS * ROWS);
    if (!rows && !add) memset(c, 0, 4 * height * width);
    for (long r = 0; r < rows; r += DEPTH) {
        long depth = rows - r < DEPTH ? rows - r : DEPTH;
        pack_left(depth, height, ta ? a : a + r * lda, lda, ta ? ta + r : 0, left);
        for (long first = 0; first < width; first += WIDTH) {
            long some = width - first < WIDTH ? width - first : WIDTH;
            pack_rows(depth, some, (tb ? b : b + r * ldb) + first, ldb, tb ? tb + r : 0, right);
            for (long i = 0; i < height; i += ROWS) {
                const float *from[ROWS], *panels = right;
                for (int q = 0; q < ROWS; q++) from[q] = left + i * depth + q;
                for (long n = 0; n < some;) {
                    int nv = panel(n, some);
                    float *to = c + i * width + first + n;
                    tile_within(nv, depth, from, ROWS, panels, add || r ? to : 0, to, width, height - i, some - n);
                    panels += depth * nv * W;
                    n += nv * W;
                }
            }
        }
    }
}

/* A kernel begins with its number of threads and `room`, memory of `size` floats. If it needs more, it returns how much,
 * and has done nothing; 0 if it is done, less if what it was given is wrong. */
#define NEED(floats)                      \
    do {                                  \
        long needed = (floats);           \
        if (size < needed) return needed; \
    } while (0)
#define NO_ROOM (void)room, (void)size

/* Tasks 0 ... count - 1, in memory of the thread that does them.
 *
 * The threads are those of torch's OpenMP, asked for through the entry point of GNU's runtime, which others offer too:
 * a second set of threads would fight with the first for the cores. */
__attribute__((weak)) void (*start_threads)(void (*)(void *), void *, unsigned, unsigned); /* one for all files */
__attribute__((weak)) int (*thread_number)(void);

typedef void (*Task)(const void *about, long index, float *scratch);
typedef struct {
    long next, end;
    char apart[64 - 2 * sizeof(long)]; /* a cache line for each */
} Range;
typedef struct {
    Task task;
    const void *about;
    long each;
    int ranges;
    float *scratch;
    Range *of;
} Work;

static void take_part(void *given) {
    Work *w = given;
    int own = thread_number();
    for (int k = 0; k < w->ranges; k++) {
        Range *r = w->of + (own + k) % w->ranges;
        for (long i; (i = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED)) < r->end;)
            w->task(w->about, i, w->scratch + w->each * own);
    }
}

LOCAL void share_ranges(long count, int threads, int ranges, Task task, const void *about, float *scratch, long each) {
    Range of[ranges];
    for (int i = 0; i < ranges; i++) of[i] = (Range){.next = count * i / ranges, .end = count * (i + 1) / ranges};
    Work work = {task, about, each, ranges, scratch, of};
    if (threads > 1) start_threads(take_part, &work, threads, 0);
    else
        for (long i = 0; i < count; i++) task(about, i, scratch);
}

/* Each thread begins with tasks of its own, always the same, whose rows its cache may hold from the kernel before, as
 * torch's operators part them, too; then it helps the others. scratch: `each` floats for every thread. */
LOCAL void share(long count, int threads, Task task, const void *about, float *scratch, long each) {
    if (threads > count) threads = count;
    if (threads > 0) share_ranges(count, threads, threads, task, about, scratch, each);
}

/* Tasks that differ, the largest first: a free thread takes the next. */
LOCAL void share_in_order(long count, int threads, Task task, const void *about, float *scratch, long each) {
    if (threads > count) threads = count;
    if (threads > 0) share_ranges(count, threads, 1, task, about, scratch, each);
}

__attribute__((weak)) void use_threads(void *entry, void *number) {
    *(void **)&start_threads = entry;
    *(void **)&thread_number = number;
}
