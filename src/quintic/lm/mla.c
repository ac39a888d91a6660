/* Latent attention of lm/mla.py from the residual stream to the residual stream, and back: norm and projections, attention,
 * output and sum. Legend as there, and d width of the stream, z of the latent, n of keys without position, r of their
 * rotated part, v of values. */
#include "attention.h"
#include "kernels.h"
#include "linear.h"

/* What is kept: r_x and r_z of the two norms, q, the latent z before its norm, the rotated part of keys, kv, mixed, lse. */
#define SIZES long b, long t, long d, long h, long n, long r, long v, long z, double scale
#define WEIGHTS                                                                                                   \
    const float *x, const float *gain_x, const float *w_q, const float *w_down, const float *gain_z, const float *w_up, \
        const float *w_out, const float *table

long latent_attention(long threads, float *room, long size, SIZES, double eps_x, double eps_z, WEIGHTS, float *r_x,
                      float *r_z, float *q, float *latent, float *key, float *kv, float *mixed, float *lse, float *y) {
    long rows = b * t, hq = h * (n + r), hkv = h * (n + v), hv = h * v, most = 0;
    const float *w_key = w_down + z * d;
    for (int go = 0; go < 2; go++) { /* once for how much room they need */
        long has = go ? size : 0;
#define PART(call) most = greater(most, call)
        PART(linear(threads, room, has, rows, d, eps_x, x, gain_x, r_x, 0, hq, z, r, w_q, w_down, w_key, q, latent, key));
        PART(linear(threads, room, has, rows, z, eps_z, latent, gain_z, r_z, 0, hkv, 0, 0, w_up, 0, 0, kv, 0, 0));
        PART(attention(threads, room, has, b, t, h, n, r, v, r, scale, q, kv, key, table, mixed, lse));
        PART(linear(threads, room, has, rows, hv, 0, mixed, 0, 0, x, d, 0, 0, w_out, 0, 0, y, 0, 0));
        if (!go) NEED(most);
    }
    return 0;
}

/* Gradients; those of weights may be null. */
long latent_attention_backward(long threads, float *room, long size, SIZES, WEIGHTS, const float *r_x, const float *r_z,
                               const float *q, const float *latent, const float *key, const float *kv, const float *mixed,
                               const float *lse, const float *dy, float *dx, float *dgain_x, float *dw_q, float *dw_down,
                               float *dgain_z, float *dw_up, float *dw_out) {
    long rows = b * t, hq = h * (n + r), hkv = h * (n + v), hv = h * v, most = 0;
    const float *w_key = w_down + z * d;
    float *dw_key = dw_down ? dw_down + z * d : 0, *dq = room, *dkv = dq + padded(rows * hq), *dkey = dkv + padded(rows * hkv);
    float *dlatent = dkey + padded(rows * r), *dmixed = dlatent + padded(rows * z), *rest = dmixed + padded(rows * hv);
    long own = rest - room;
    for (int go = 0; go < 2; go++) {
        long has = go ? size - own : 0;
        PART(linear_backward(threads, rest, has, rows, hv, mixed, 0, 0, 0, dmixed, 0, d, 0, 0, w_out, 0, 0, dy, 0, 0, dw_out,
                             0, 0));
        PART(attention_backward(threads, rest, has, b, t, h, n, r, v, r, scale, q, kv, key, table, mixed, lse, dmixed, dq,
                                dkv, dkey));
        PART(linear_backward(threads, rest, has, rows, z, latent, gain_z, r_z, 0, dlatent, dgain_z, hkv, 0, 0, w_up, 0, 0,
                             dkv, 0, 0, dw_up, 0, 0));
        PART(linear_backward(threads, rest, has, rows, d, x, gain_x, r_x, dy, dx, dgain_x, hq, z, r, w_q, w_down, w_key, dq,
                             dlatent, dkey, dw_q, dw_down, dw_key));
        if (!go) NEED(own + most);
    }
    return 0;
}
