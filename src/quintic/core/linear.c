/* Linear maps of the same rows, after RMSNorm or without it: what lies between stays in the cache.
 *
 *     y_i = residual + n w_i',   dw_i = sum of g_i' n,   dn = sum of g_i w_i
 *
 * with n = x r gain and r = 1 / RMS(x), or n = x where gain is null, and the gradients g_i of y_i. d: width of x. */
#include "linear.h"
#include "norm.h"

#define MAPS 3
#define SLICES 16 /* tasks that add up gradients */

typedef struct {
    long width;
    const float *w, *dy;
    float *y, *dw;
    Right right; /* w, packed */
} Map;

typedef struct {
    long rows, d, each; /* each: rows of a task */
    float eps;
    const float *x, *gain, *residual;
    float *r, *dx, *dgain, *parts;
    Map maps[MAPS];
} Linear;

static long tasks_of(const Linear *l) { return (l->rows + l->each - 1) / l->each; }

static long end_of(const Linear *l, long index) { return lesser((index + 1) * l->each, l->rows); }

/* Forward as many as keep all threads busy; */
static long forward_rows(long threads, long rows) { return greater(32, lesser(128, rows / (16 * threads))); }

/* backward the same for any number of threads, for their sums are added up: at least two tasks, and few enough that their
 * sums take no more room than the outputs. */
static long backward_rows(long rows, long d) {
    return lesser(greater(greater(rows / 32, DEPTH), d), greater(32, (rows + 1) / 2));
}

/* Numbers of a task's gradients: of gain, then of each weight. */
static long size_of(const Linear *l) {
    long size = l->d;
    for (int i = 0; i < MAPS; i++) size += l->maps[i].width * l->d;
    return size;
}

/* The weights packed, one after the other; from there on is free. */
static float *pack_maps(Linear *l, int lies, float *to) {
    for (Map *m = l->maps; m < l->maps + MAPS && m->width; m++) {
        long depth = lies == ACROSS ? l->d : m->width, columns = lies == ACROSS ? m->width : l->d;
        m->right = pack(depth, columns, (Right){m->w, l->d, lies}, to);
        to += depth * padded(columns);
    }
    return to;
}

static long packed_size(const Linear *l, int lies) {
    long size = 0;
    for (int i = 0; i < MAPS; i++)
        size += lies == ACROSS ? l->d * padded(l->maps[i].width) : l->maps[i].width * padded(l->d);
    return size;
}

static long widest(const Linear *l) { return greater(greater(l->maps[0].width, l->maps[1].width), l->maps[2].width); }

static void forward_task(const void *about, long index, float *made) {
    const Linear *l = about;
    long first = index * l->each, rows = end_of(l, index) - first, d = l->d;
    const float *n = l->x + first * d;
    if (l->gain) {
        for (long i = 0; i < rows; i++) {
            float r = l->r[first + i] = norm_of(d, l->eps, n + i * d);
            norm_row(d, r, n + i * d, l->gain, made + i * d);
        }
        n = made;
    }
    for (const Map *m = l->maps; m < l->maps + MAPS && m->width; m++) {
        const float *plus = l->residual ? l->residual + first * m->width : 0;
        product(rows, d, m->width, n, d, 0, m->right, plus, m->y + first * m->width, m->width, 0);
    }
}

long linear(long threads, float *room, long size, long rows, long d, double eps, const float *x, const float *gain,
            float *r, const float *residual, long o1, long o2, long o3, const float *w1, const float *w2,
            const float *w3, float *y1, float *y2, float *y3) {
    Linear l = {.rows = rows, .d = d, .each = forward_rows(threads, rows), .eps = eps, .x = x, .gain = gain,
                .residual = residual, .r = r,
                .maps = {{.width = o1, .w = w1, .y = y1}, {.width = o2, .w = w2, .y = y2}, {.width = o3, .w = w3, .y = y3}}};
    long made = gain ? padded(l.each * d) : 0;
    NEED(packed_size(&l, ACROSS) + threads * made);
    room = pack_maps(&l, ACROSS, room);
    share(tasks_of(&l), threads, forward_task, &l, room, made);
    return 0;
}

/* dx, and the task's part of the other gradients */
static void backward_task(const void *about, long index, float *scratch) {
    const Linear *l = about;
    long d = l->d, start = index * l->each, last = end_of(l, index);
    int whole = tasks_of(l) == 1; /* no parts */
    float *dgain = whole ? l->dgain : l->parts + index * size_of(l), *part = l->parts + index * size_of(l) + d;
    float *made = scratch + outer_scratch(widest(l));
    if (dgain) memset(dgain, 0, 4 * d);
    for (long first = start; first < last; first += DEPTH) {
        long rows = lesser(last - first, DEPTH);
        const float *x = l->x + first * d, *n = l->gain ? made : x;
        float *dn = l->dx ? l->dx + first * d : 0, *next = part;
        for (long i = 0; l->gain && i < rows; i++) norm_row(d, l->r[first + i], x + i * d, l->gain, made + i * d);
        for (const Map *m = l->maps; m < l->maps + MAPS && m->width; next += m++->width * d) {
            const float *dy = m->dy + first * m->width;
            if (dn) product(rows, m->width, d, dy, m->width, 0, m->right, m > l->maps ? dn : 0, dn, d, 0);
            if (m->dw) outer(rows, m->width, d, dy, m->width, 0, n, d, 0, whole ? m->dw : next, first > start, scratch);
        }
        for (long i = 0; l->gain && i < rows; i++)
            norm_row_back(d, l->r[first + i], x + i * d, l->gain, dn + i * d,
                          l->residual ? l->residual + (first + i) * d : 0, dn + i * d, dgain);
    }
}

/* The parts of all tasks, in their order */
static void sum_task(const void *about, long index, float *scratch) {
    const Linear *l = about;
    const float *part = l->parts;
    (void)scratch;
    for (int i = -1; i < MAPS; i++) {
        long numbers = l->d * (i < 0 ? 1 : l->maps[i].width), from = numbers * index / SLICES;
        long to = numbers * (index + 1) / SLICES;
        float *sum = i < 0 ? l->dgain : l->maps[i].dw;
        if (sum && to > from) memset(sum + from, 0, 4 * (to - from));
        for (long t = 0; sum && t < tasks_of(l); t++)
            for (long j = from; j < to; j++) sum[j] += part[t * size_of(l) + j];
        part += numbers;
    }
}

long linear_backward(long threads, float *room, long size, long rows, long d, const float *x, const float *gain,
                     const float *r, const float *residual, float *dx, float *dgain, long o1, long o2, long o3,
                     const float *w1, const float *w2, const float *w3, const float *dy1, const float *dy2,
                     const float *dy3, float *dw1, float *dw2, float *dw3) {
    Linear l = {.rows = rows, .d = d, .each = backward_rows(rows, d), .x = x, .gain = gain, .residual = residual,
                .r = (float *)r, .dx = dx, .dgain = dgain,
                .maps = {{.width = o1, .w = w1, .dy = dy1, .dw = dw1}, {.width = o2, .w = w2, .dy = dy2, .dw = dw2},
                         {.width = o3, .w = w3, .dy = dy3, .dw = dw3}}};
    long each = padded(outer_scratch(widest(&l)) + (gain ? DEPTH * d : 0)), parts = tasks_of(&l) > 1 ? padded(tasks_of(&l) * size_of(&l)) : 0;
    NEED(packed_size(&l, STRAIGHT) + parts + threads * each);
    l.parts = pack_maps(&l, STRAIGHT, room);
    share(tasks_of(&l), threads, backward_task, &l, l.parts + parts, each);
    if (tasks_of(&l) > 1) share(SLICES, threads, sum_task, &l, 0, 0);
    return 0;
}
