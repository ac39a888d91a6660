/* Causal attention, from the projections' outputs to the mixed values, and back. */
#pragma once

/* Mixed values, and log2 of the denominators; key_row: floats from one token's rotated key to the next. */
long attention(long threads, float *room, long size, long b, long t, long h, long n, long r, long v, long key_row,
               double scale, const float *q, const float *kv, const float *key, const float *table, float *out,
               float *lse);

long attention_backward(long threads, float *room, long size, long b, long t, long h, long n, long r, long v, long key_row,
                        double scale, const float *q, const float *kv, const float *key, const float *table,
                        const float *out, const float *lse, const float *dout, float *dq, float *dkv, float *dkey);
