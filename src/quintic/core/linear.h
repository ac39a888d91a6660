/* Linear maps of the same rows, after RMSNorm or without it. */
#pragma once

/* y = residual + n w' of each map, n = x r gain with r = 1 / RMS(x), or n = x without gain; residual may be null, and maps
 * end at the first of width 0. */
long linear(long threads, float *room, long size, long rows, long d, double eps, const float *x, const float *gain,
            float *r, const float *residual, long o1, long o2, long o3, const float *w1, const float *w2,
            const float *w3, float *y1, float *y2, float *y3);

/* dx, d gain and dw; any dw may be null, and dx where there is no gain. residual: what comes to dx besides, with a gain
 * only; null for nothing. */
long linear_backward(long threads, float *room, long size, long rows, long d, const float *x, const float *gain,
                     const float *r, const float *residual, float *dx, float *dgain, long o1, long o2, long o3,
                     const float *w1, const float *w2, const float *w3, const float *dy1, const float *dy2,
                     const float *dy3, float *dw1, float *dw2, float *dw3);
