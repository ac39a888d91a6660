/* RMSNorm of lm/norm.py, a row at a time. Legend as there: n = x r, r = 1 / RMS(x), g the gradient of y. */
#include "kernels.h"
#include <math.h>

typedef struct {
    long rows, d, each;
    float eps;
    const float *x, *gain, *g;
    float *r, *y, *dx, *dgain;
} Norm;

/* Rows of a task; the sums of some rows are added up later, and there are not many of them. */
static long rows_of_a_task(long rows) { return rows < 64 * 32 ? 32 : (rows + 63) / 64; }

static void norm_rows(const void *about, long index, float *scratch) {
    const Norm *p = about;
    long last = (index + 1) * p->each < p->rows ? (index + 1) * p->each : p->rows;
    (void)scratch;
    for (long i = index * p->each; i < last; i++) {
        const float *x = p->x + i * p->d;
        V squares = all(0);
        for (long j = 0; j < p->d; j += W) {
            V v = load_some(x + j, p->d - j);
            squares += v * v;
        }
        float r = p->r[i] = 1.0f / sqrtf(sum(squares) / p->d + p->eps);
        for (long j = 0; j < p->d; j += W) {
            long left = p->d - j;
            store_some(p->y + i * p->d + j, load_some(x + j, left) * r * load_some(p->gain + j, left), left);
        }
    }
}

/* y = x r gain, and r */
long rms_norm(long threads, long rows, long d, double eps, const float *x, const float *gain, float *r, float *y) {
    Norm p = {.rows = rows, .d = d, .each = rows_of_a_task(rows), .eps = eps, .x = x, .gain = gain, .r = r, .y = y};
    share((rows + p.each - 1) / p.each, threads, norm_rows, &p, 0, 0);
    return 0;
}

/* dx = r (g gain - n <g gain, n> / d), and the task's part of d gain = sum of g n */
static void back_rows(const void *about, long index, float *scratch) {
    const Norm *p = about;
    long last = (index + 1) * p->each < p->rows ? (index + 1) * p->each : p->rows, d = p->d;
    float *dgain = p->dgain + index * d;
    (void)scratch;
    memset(dgain, 0, 4 * d);
    for (long i = index * p->each; i < last; i++) {
        const float *x = p->x + i * d, *g = p->g + i * d;
        float r = p->r[i];
        V products = all(0);
        for (long j = 0; j < d; j += W) {
            V gn = load_some(g + j, d - j) * load_some(x + j, d - j) * r;
            store_some(dgain + j, load_some(dgain + j, d - j) + gn, d - j);
            products += gn * load_some(p->gain + j, d - j);
        }
        float along = sum(products) / d * r;
        for (long j = 0; j < d; j += W) {
            V straight = load_some(g + j, d - j) * load_some(p->gain + j, d - j);
            store_some(p->dx + i * d + j, (straight - load_some(x + j, d - j) * along) * r, d - j);
        }
    }
}

/* Floats for the parts of d gain. */
long rms_norm_parts(long threads, long rows, long d) {
    (void)threads;
    return (rows + rows_of_a_task(rows) - 1) / rows_of_a_task(rows) * d;
}

/* dx and d gain; parts: see above */
long rms_norm_backward(long threads, long rows, long d, const float *x, const float *gain, const float *r,
                       const float *g, float *dx, float *dgain, float *parts) {
    Norm p = {.rows = rows, .d = d, .each = rows_of_a_task(rows), .x = x, .gain = gain, .g = g, .r = (float *)r,
              .dx = dx, .dgain = parts};
    long tasks = (rows + p.each - 1) / p.each;
    share(tasks, threads, back_rows, &p, 0, 0);
    memset(dgain, 0, 4 * d);
    for (long t = 0; t < tasks; t++)
        for (long j = 0; j < d; j++) dgain[j] += parts[t * d + j];
    return 0;
}
