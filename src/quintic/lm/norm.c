/* RMSNorm of lm/norm.py, a row at a time. Legend as there: n = x r, r = 1 / RMS(x), g the gradient of y. */
#include "norm.h"

typedef struct {
    long rows, d, each;
    float eps;
    const float *x, *gain, *g, *plus;
    float *r, *y, *dx, *dgain;
} Norm;

/* Rows of a task; the sums of some rows are added up later, and there are not many of them. */
static long rows_of_a_task(long rows) { return rows < 64 * 32 ? 32 : (rows + 63) / 64; }

static void norm_rows(const void *about, long index, float *scratch) {
    const Norm *p = about;
    long last = lesser((index + 1) * p->each, p->rows);
    (void)scratch;
    for (long i = index * p->each; i < last; i++) {
        float r = p->r[i] = norm_of(p->d, p->eps, p->x + i * p->d);
        norm_row(p->d, r, p->x + i * p->d, p->gain, p->y + i * p->d);
    }
}

/* y = x r gain, and r */
long rms_norm(long threads, float *room, long size, long rows, long d, double eps, const float *x, const float *gain,
              float *r, float *y) {
    Norm p = {.rows = rows, .d = d, .each = rows_of_a_task(rows), .eps = eps, .x = x, .gain = gain, .r = r, .y = y};
    NO_ROOM;
    share((rows + p.each - 1) / p.each, threads, norm_rows, &p, 0, 0);
    return 0;
}

/* dx, and the task's part of d gain */
static void back_rows(const void *about, long index, float *scratch) {
    const Norm *p = about;
    long last = lesser((index + 1) * p->each, p->rows), d = p->d;
    float *dgain = p->dgain + index * d;
    (void)scratch;
    memset(dgain, 0, 4 * d);
    for (long i = index * p->each; i < last; i++)
        norm_row_back(d, p->r[i], p->x + i * d, p->gain, p->g + i * d, p->plus ? p->plus + i * d : 0,
                      p->dx + i * d, dgain);
}

/* dx, to which plus is added if it is given, and d gain */
long rms_norm_backward(long threads, float *room, long size, long rows, long d, const float *x, const float *gain,
                       const float *r, const float *g, const float *plus, float *dx, float *dgain) {
    Norm p = {.rows = rows, .d = d, .each = rows_of_a_task(rows), .x = x, .gain = gain, .g = g, .plus = plus, .r = (float *)r,
              .dx = dx, .dgain = room};
    long tasks = (rows + p.each - 1) / p.each;
    NEED(tasks * d);
    share(tasks, threads, back_rows, &p, 0, 0);
    memset(dgain, 0, 4 * d);
    for (long t = 0; t < tasks; t++)
        for (long j = 0; j < d; j++) dgain[j] += room[t * d + j];
    return 0;
}
