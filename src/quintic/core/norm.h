/* RMSNorm of a row: y = n gain, n = x r, r = 1 / RMS(x). */
#pragma once
#include "kernels.h"
#include <math.h>

/* r */
INLINE float norm_of(long d, float eps, const float *x) {
    V squares = all(0);
    for (long j = 0; j < d; j += W) {
        V v = load_some(x + j, d - j);
        squares += v * v;
    }
    return 1.0f / sqrtf(sum(squares) / d + eps);
}

INLINE void norm_row(long d, float r, const float *x, const float *gain, float *y) {
    for (long j = 0; j < d; j += W) store_some(y + j, load_some(x + j, d - j) * r * load_some(gain + j, d - j), d - j);
}

/* dx = plus + r (g gain - n <g gain, n> / d), and d gain += g n, for the gradient g of y; plus may be null, and g lie
 * where dx does */
INLINE void norm_row_back(long d, float r, const float *x, const float *gain, const float *g, const float *plus,
                          float *dx, float *dgain) {
    V products = all(0);
    for (long j = 0; j < d; j += W) {
        V gn = load_some(g + j, d - j) * load_some(x + j, d - j) * r;
        store_some(dgain + j, load_some(dgain + j, d - j) + gn, d - j);
        products += gn * load_some(gain + j, d - j);
    }
    float along = sum(products) / d * r;
    for (long j = 0; j < d; j += W) {
        V straight = load_some(g + j, d - j) * load_some(gain + j, d - j);
        V v = (straight - load_some(x + j, d - j) * along) * r;
        store_some(dx + j, plus ? v + load_some(plus + j, d - j) : v, d - j);
    }
}
