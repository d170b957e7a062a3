/* The innermost loops: one stretch of memory, one thread, no layout.
 *
 * What Cython cannot say stands here: vector types, loops free of aliasing checks, and one text for
 * several element types. Cython calls the n-th specialisation of a fused extern function
 * `__pyx_fuse_<n>name`, and the order of the types is that of `real` in sweeps.pxd; the file includes
 * itself once per type.
 *
 * Words used throughout: `mean` and `m2` describe n values, m2 being the sum of their squared
 * distances from the mean. A transform is centred, y = (x - mean) * scale + bias, with the mean in
 * float64: `pivot` is the mean rounded to the type of x, and what the rounding took away goes into
 * the bias. Floats are summed in blocks of BLOCK_BYTES, and only the sums of blocks in float64.
 */
#ifndef REAL

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define BLOCK_BYTES 16384

/* Rows of a strip that are summed before the sums go to float64, and vectors of columns at a time. */
#define STRIP_ROWS 64
#define BACKWARD_ROWS 8
#define STRIP_VECTORS 4

/* Code that is inlined in two places may be rounded in two ways, and which place runs may depend on the
 * number of threads. So there is one copy of every sweep, in which sums may be reordered and multiply-adds
 * fused; everything outside this file is compiled to the letter. */
#if defined(__clang__)
#define SWEEP __attribute__((noinline, unused))
#define EXACT_SWEEP SWEEP
#else
#define SWEEP __attribute__((noinline, noclone, unused))
#define EXACT_SWEEP __attribute__((noinline, noclone, unused, optimize("fp-contract=off", "no-associative-math")))
#pragma GCC push_options
#pragma GCC optimize("associative-math", "no-signed-zeros", "no-trapping-math", "fp-contract=fast")
#endif

/* Chan, Golub, LeVeque 1979: (mean, m2) of n_a + n_b values from those of n_a and of n_b. */
static inline void merge_moments(double n_a, double *mean_a, double *m2_a,
                                 double n_b, double mean_b, double m2_b)
{
    const double n = n_a + n_b, delta = mean_b - *mean_a;
    *mean_a += delta * (n_b / n);
    *m2_a += m2_b + delta * delta * (n_a * n_b / n);
}

/* exp to 2 ulp on the range where the activations need it; branch-free, so that loops over it
 * become vector loops. NaN stays NaN: no comparison with it holds. */
static inline float exp_float(float x)
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = __builtin_rintf(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float e = 1.9875691500e-4f;
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return e * power;
}

/* Abramowitz & Stegun 7.1.26, absolute error 1.5e-7. */
static inline float erf_float(float x)
{
    const float z = x < 0 ? -x : x;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float e = 1.0f - p * t * exp_float(-z * z);
    return x < 0 ? -e : e;
}

/* Near 0 the quotient loses its digits, so the series takes over. */
static inline float tanh_float(float x)
{
    const float s = x * x;
    const float near = x * (1.0f + s * (-0.33333333f + s * (0.13333333f + s * (-0.05396825f + s * 0.02186949f))));
    const float far = 1.0f - 2.0f / (exp_float(2.0f * x) + 1.0f);
    return s < 0.0625f ? near : far;
}

#define REAL float
#define FN(name) __pyx_fuse_0##name
#define EXP exp_float
#define ERF erf_float
#define TANH tanh_float
#include "sweeps.h"
#undef REAL
#undef FN
#undef EXP
#undef ERF
#undef TANH

#define REAL double
#define FN(name) __pyx_fuse_1##name
#define EXP exp
#define ERF erf
#define TANH tanh
#include "sweeps.h"
#undef REAL
#undef FN
#undef EXP
#undef ERF
#undef TANH

#if !defined(__clang__)
#pragma GCC pop_options
#endif

#else /* once per type */

#define LANES ((ptrdiff_t)(VECTOR_BYTES / sizeof(REAL)))
#define BLOCK ((ptrdiff_t)(BLOCK_BYTES / sizeof(REAL)))
#define VEC FN(vector)
#define LOAD(p) (*(const FN(unaligned) *)(p))
#define IVDEP _Pragma("GCC ivdep")
#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef REAL VEC __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL FN(unaligned) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

static inline REAL FN(lanes_sum)(VEC v)
{
    REAL lanes[VECTOR_BYTES / sizeof(REAL)], sum = 0;
    memcpy(lanes, &v, sizeof v);
    for (ptrdiff_t i = 0; i < LANES; i++)
        sum += lanes[i];
    return sum;
}

/* A vector's worth of float64 sums. */
typedef struct {
    double lanes[VECTOR_BYTES / sizeof(REAL)];
} FN(wide);

static inline void FN(add_wide)(FN(wide) *sum, VEC v)
{
    for (ptrdiff_t i = 0; i < LANES; i++)
        sum->lanes[i] += v[i];
}

static inline double FN(wide_sum)(const FN(wide) *sum)
{
    double total = 0;
    for (ptrdiff_t i = 0; i < LANES; i++)
        total += sum->lanes[i];
    return total;
}

/* ------------------------------------------------------------------ along a stretch: sums */

/* Sum of x - pivot over one block. */
static SWEEP REAL FN(block_sum)(const REAL *x, ptrdiff_t n, REAL pivot)
{
    VEC a = {0}, b = {0}, c = {0}, d = {0};
    ptrdiff_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        a += LOAD(x + i) - pivot;
        b += LOAD(x + i + LANES) - pivot;
        c += LOAD(x + i + 2 * LANES) - pivot;
        d += LOAD(x + i + 3 * LANES) - pivot;
    }
    for (; i + LANES <= n; i += LANES)
        a += LOAD(x + i) - pivot;
    REAL sum = FN(lanes_sum)((a + b) + (c + d));
    for (; i < n; i++)
        sum += x[i] - pivot;
    return sum;
}

/* Sums of x - pivot and of its square over one block. */
static SWEEP void FN(block_sums)(const REAL *x, ptrdiff_t n, REAL pivot, REAL *sum, REAL *squares)
{
    VEC a = {0}, b = {0}, c = {0}, d = {0}, p = {0}, q = {0}, r = {0}, s = {0};
    ptrdiff_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        const VEC t = LOAD(x + i) - pivot, u = LOAD(x + i + LANES) - pivot;
        const VEC v = LOAD(x + i + 2 * LANES) - pivot, w = LOAD(x + i + 3 * LANES) - pivot;
        a += t, b += u, c += v, d += w;
        p += t * t, q += u * u, r += v * v, s += w * w;
    }
    for (; i + LANES <= n; i += LANES) {
        const VEC t = LOAD(x + i) - pivot;
        a += t, p += t * t;
    }
    *sum = FN(lanes_sum)((a + b) + (c + d));
    *squares = FN(lanes_sum)((p + q) + (r + s));
    for (; i < n; i++) {
        const REAL t = x[i] - pivot;
        *sum += t, *squares += t * t;
    }
}

/* Mean and m2 of n values. In each block a first sweep, from the block's first element, finds the
 * mean roughly; the second, from L1, is taken around it and corrected by what it finds left over. A
 * block of equal values has exactly their mean, and m2 = 0. */
static SWEEP void FN(moments)(const REAL *x, ptrdiff_t n, double *mean, double *m2)
{
    *mean = *m2 = 0;
    for (ptrdiff_t i = 0; i < n; i += BLOCK) {
        const ptrdiff_t count = MIN(BLOCK, n - i);
        const REAL pivot = x[i] + FN(block_sum)(x + i, count, x[i]) / count;
        REAL sum, squares;
        FN(block_sums)(x + i, count, pivot, &sum, &squares);
        const double rest = (double)sum / count;
        const double block_m2 = (double)squares - rest * sum;
        if (i == 0)
            *mean = pivot + rest, *m2 = block_m2;
        else
            merge_moments(i, mean, m2, count, pivot + rest, block_m2);
    }
}

static SWEEP double FN(sum_of_squares)(const REAL *x, ptrdiff_t n)
{
    double total = 0;
    for (ptrdiff_t i = 0; i < n; i += BLOCK) {
        REAL sum, squares;
        FN(block_sums)(x + i, MIN(BLOCK, n - i), 0, &sum, &squares);
        total += squares;
    }
    return total;
}

/* Adds to sums[0..2] the sums of g, g * (x - mean) and x - mean, where g = grad_y * weight. These may
 * nearly cancel, and are compared with values of order 1 all the same: only 16 vectors are added before
 * they go to float64. */
static SWEEP void FN(backward_sums)(const REAL *grad_y, const REAL *x, const REAL *weight, ptrdiff_t n,
                                     REAL mean, double *sums)
{
    FN(wide) g_sum = {{0}}, gx_sum = {{0}}, x_sum = {{0}};
    ptrdiff_t i = 0;
#define BACKWARD_SUMS(G)                                                                \
    while (i + 4 * LANES <= n) {                                                        \
        const ptrdiff_t end = MIN(n, i + 16 * LANES);                                   \
        VEC g = {0}, gx = {0}, t_sum = {0};                                             \
        for (; i + 4 * LANES <= end; i += 4 * LANES) {                                  \
            const VEC t = LOAD(x + i) - mean, u = LOAD(x + i + LANES) - mean;           \
            const VEC v = LOAD(x + i + 2 * LANES) - mean, w = LOAD(x + i + 3 * LANES) - mean; \
            const VEC a = G(i), b = G(i + LANES), c = G(i + 2 * LANES), d = G(i + 3 * LANES); \
            g += (a + b) + (c + d);                                                     \
            gx += (a * t + b * u) + (c * v + d * w);                                    \
            t_sum += (t + u) + (v + w);                                                 \
        }                                                                               \
        FN(add_wide)(&g_sum, g), FN(add_wide)(&gx_sum, gx), FN(add_wide)(&x_sum, t_sum); \
    }
#define PLAIN(i) LOAD(grad_y + (i))
#define WEIGHTED(i) (LOAD(grad_y + (i)) * LOAD(weight + (i)))
    if (weight) {
        BACKWARD_SUMS(WEIGHTED)
    } else {
        BACKWARD_SUMS(PLAIN)
    }
#undef BACKWARD_SUMS
#undef PLAIN
#undef WEIGHTED
    sums[0] += FN(wide_sum)(&g_sum), sums[1] += FN(wide_sum)(&gx_sum), sums[2] += FN(wide_sum)(&x_sum);
    for (; i < n; i++) {
        const REAL t = x[i] - mean, g = weight ? grad_y[i] * weight[i] : grad_y[i];
        sums[0] += g, sums[1] += g * t, sums[2] += t;
    }
}

/* ------------------------------------------------------- along a stretch: element by element */

static SWEEP void FN(add)(const REAL *x, const REAL *residual, REAL *total, ptrdiff_t n)
{
    IVDEP for (ptrdiff_t i = 0; i < n; i++)
        total[i] = x[i] + residual[i];
}

static SWEEP void FN(activate)(REAL *y, ptrdiff_t n, int activation)
{
    switch (activation) { /* the order of ACTIVATIONS */
    case 1:
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = y[i] < 0 ? 0 : y[i];
        break;
    case 2:
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = y[i] / (1 + EXP(-y[i]));
        break;
    case 3:
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = (REAL)0.5 * y[i] * (1 + ERF(y[i] * (REAL)0.70710678118654752));
        break;
    case 4:
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = 1 / (1 + EXP(-y[i]));
        break;
    case 5:
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = TANH(y[i]);
        break;
    }
}

/* y = activation((x - mean) * scale + bias + residual), one mean and one scale. */
static SWEEP void FN(affine)(const REAL *x, const REAL *residual, REAL *y, ptrdiff_t n,
                              double mean, double scale, double bias, int activation)
{
    const REAL pivot = mean, a = scale, b = bias - (mean - pivot) * scale;
    for (ptrdiff_t start = 0; start < n; start += BLOCK) {
        const ptrdiff_t end = MIN(n, start + BLOCK);
        if (residual)
            IVDEP for (ptrdiff_t i = start; i < end; i++)
                y[i] = (x[i] - pivot) * a + b + residual[i];
        else
            IVDEP for (ptrdiff_t i = start; i < end; i++)
                y[i] = (x[i] - pivot) * a + b;
        FN(activate)(y + start, end - start, activation);
    }
}

/* The same with a weight and a bias per element, and one mean and one rstd. */
static SWEEP void FN(affine_along)(const REAL *x, const REAL *weight, const REAL *bias, const REAL *residual,
                                    REAL *y, ptrdiff_t n, double mean, double rstd, int activation)
{
    const REAL pivot = mean, r = rstd, s = (pivot - mean) * rstd;
    for (ptrdiff_t start = 0; start < n; start += BLOCK) {
        const ptrdiff_t end = MIN(n, start + BLOCK);
        if (weight && bias)
            IVDEP for (ptrdiff_t i = start; i < end; i++)
                y[i] = ((x[i] - pivot) * r + s) * weight[i] + bias[i] + (residual ? residual[i] : 0);
        else if (weight)
            IVDEP for (ptrdiff_t i = start; i < end; i++)
                y[i] = ((x[i] - pivot) * r + s) * weight[i] + (residual ? residual[i] : 0);
        else if (bias)
            IVDEP for (ptrdiff_t i = start; i < end; i++)
                y[i] = ((x[i] - pivot) * r + s) + bias[i] + (residual ? residual[i] : 0);
        else
            IVDEP for (ptrdiff_t i = start; i < end; i++)
                y[i] = ((x[i] - pivot) * r + s) + (residual ? residual[i] : 0);
        FN(activate)(y + start, end - start, activation);
    }
}

/* grad_x = rstd * (grad_y * weight + b * (x - mean) + c) + grad_total, weight per element where `weights`
 * are given; no x: statistics held constant, grad_x = rstd * grad_y * weight. Where a unit is constant
 * the terms cancel, and rstd is large: the product is rounded as in the sums, before anything is added. */
static EXACT_SWEEP void FN(backward_affine)(const REAL *grad_y, const REAL *x, const REAL *weights,
                                            const REAL *grad_total, REAL *grad_x, ptrdiff_t n, REAL mean,
                                            double weight, double rstd, double b_, double c_)
{
    const REAL w = weight, r = rstd, b = b_, c = c_, a = rstd * weight;
    if (!x)
        IVDEP for (ptrdiff_t i = 0; i < n; i++)
            grad_x[i] = a * grad_y[i];
    else if (weights)
        IVDEP for (ptrdiff_t i = 0; i < n; i++)
            grad_x[i] = r * (grad_y[i] * weights[i] + (b * (x[i] - mean) + c)) + (grad_total ? grad_total[i] : 0);
    else
        IVDEP for (ptrdiff_t i = 0; i < n; i++)
            grad_x[i] = r * (grad_y[i] * w + (b * (x[i] - mean) + c)) + (grad_total ? grad_total[i] : 0);
}

/* Adds, for `rows` rows of n elements, grad_y * (x - mean) * rstd to grad_weight and grad_y to grad_bias.
 * Four rows at a time, so that the sums are loaded and stored a quarter as often. */
static SWEEP void FN(parameter_sums)(const REAL *grad_y, const REAL *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t n,
                                      const double *mean, const double *rstd, REAL *grad_weight, REAL *grad_bias)
{
#define X_HAT(k) ((x##k[i] - pivot##k) * r##k + s##k)
#define ROW(k)                                                                          \
    const REAL *g##k = grad_y + (row + k) * stride, *x##k = x + (row + k) * stride;     \
    const REAL pivot##k = mean[row + k], r##k = rstd[row + k];                          \
    const REAL s##k = (pivot##k - mean[row + k]) * rstd[row + k];
    ptrdiff_t row = 0;
    for (; row + 4 <= rows; row += 4) {
        ROW(0) ROW(1) ROW(2) ROW(3)
        IVDEP for (ptrdiff_t i = 0; i < n; i++) {
            grad_weight[i] += (g0[i] * X_HAT(0) + g1[i] * X_HAT(1)) + (g2[i] * X_HAT(2) + g3[i] * X_HAT(3));
            grad_bias[i] += (g0[i] + g1[i]) + (g2[i] + g3[i]);
        }
    }
    for (; row < rows; row++) {
        ROW(0)
        IVDEP for (ptrdiff_t i = 0; i < n; i++) {
            grad_weight[i] += g0[i] * X_HAT(0);
            grad_bias[i] += g0[i];
        }
    }
#undef X_HAT
#undef ROW
}

/* ------------------------------------------------------------- down a strip of columns: sums */

/* The columns of a strip are taken STRIP_VECTORS vectors at a time, then one; where a last vector is
 * not full, it is taken overlapping the one before, and where there is none before, from a padded
 * copy. Either way the sums of a column are the same bits. At most STRIP_ROWS rows. */
#define FOR_EACH_VECTORS(BODY)                                                          \
    ptrdiff_t j = 0;                                                                    \
    for (; j + STRIP_VECTORS * LANES <= width; j += STRIP_VECTORS * LANES)              \
        BODY(STRIP_VECTORS, j);                                                         \
    for (; j < width; j += LANES)                                                       \
        BODY(1, MIN(j, width - LANES));

static inline void FN(pad)(const REAL *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t width, REAL *padded)
{
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t j = 0; j < LANES; j++)
            padded[r * LANES + j] = x[r * stride + MIN(j, width - 1)];
}

static inline __attribute__((always_inline)) void FN(vectors_moments)(
    const REAL *x, ptrdiff_t rows, ptrdiff_t stride, const int vectors, double *mean, double *m2)
{
    VEC pivot[STRIP_VECTORS], sum[STRIP_VECTORS], squares[STRIP_VECTORS];
    for (int v = 0; v < vectors; v++)
        pivot[v] = LOAD(x + v * LANES), sum[v] = (VEC){0}, squares[v] = (VEC){0};
    for (ptrdiff_t r = 1; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[v] += LOAD(x + r * stride + v * LANES) - pivot[v];
    for (int v = 0; v < vectors; v++)
        pivot[v] += sum[v] / (REAL)rows, sum[v] = (VEC){0};
    for (ptrdiff_t r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const VEC t = LOAD(x + r * stride + v * LANES) - pivot[v];
            sum[v] += t, squares[v] += t * t;
        }
    for (int v = 0; v < vectors; v++)
        for (ptrdiff_t k = 0; k < LANES; k++) {
            const double rest = (double)sum[v][k] / rows;
            mean[v * LANES + k] = pivot[v][k] + rest;
            m2[v * LANES + k] = squares[v][k] - rest * sum[v][k];
        }
}

/* Mean and m2 of every column of a strip, merged into those of the `before` rows above it. */
static SWEEP void FN(column_moments)(const REAL *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t width,
                                      double *mean, double *m2)
{
    REAL padded[STRIP_ROWS * VECTOR_BYTES / sizeof(REAL)];
    double block_mean[STRIP_VECTORS * VECTOR_BYTES / sizeof(REAL)];
    double block_m2[STRIP_VECTORS * VECTOR_BYTES / sizeof(REAL)];
    for (ptrdiff_t start = 0; start < rows; start += STRIP_ROWS) {
        const ptrdiff_t count = MIN(STRIP_ROWS, rows - start);
        const REAL *block = x + start * stride;
        const double above = start;
        if (width < LANES) {
            FN(pad)(block, count, stride, width, padded);
            FN(vectors_moments)(padded, count, LANES, 1, block_mean, block_m2);
            for (ptrdiff_t k = 0; k < width; k++) {
                if (start == 0)
                    mean[k] = block_mean[k], m2[k] = block_m2[k];
                else
                    merge_moments(above, mean + k, m2 + k, count, block_mean[k], block_m2[k]);
            }
            continue;
        }
        /* An overlapping vector must not be merged twice: skip the columns done before. */
#define MOMENTS(vectors, at)                                                            \
    {                                                                                   \
        const ptrdiff_t from = at, skip = j - from;                                     \
        FN(vectors_moments)(block + from, count, stride, vectors, block_mean, block_m2); \
        if (start == 0)                                                                 \
            for (ptrdiff_t k = skip; k < vectors * LANES; k++)                          \
                mean[from + k] = block_mean[k], m2[from + k] = block_m2[k];             \
        else                                                                            \
            for (ptrdiff_t k = skip; k < vectors * LANES; k++)                          \
                merge_moments(above, mean + from + k, m2 + from + k, count, block_mean[k], block_m2[k]); \
    }
        FOR_EACH_VECTORS(MOMENTS)
#undef MOMENTS
    }
}

static inline __attribute__((always_inline)) void FN(vectors_squares)(
    const REAL *x, ptrdiff_t rows, ptrdiff_t stride, const int vectors, ptrdiff_t skip, double *squares)
{
    VEC sum[STRIP_VECTORS];
    for (int v = 0; v < vectors; v++)
        sum[v] = (VEC){0};
    for (ptrdiff_t r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const VEC t = LOAD(x + r * stride + v * LANES);
            sum[v] += t * t;
        }
    for (int v = 0; v < vectors; v++)
        for (ptrdiff_t k = skip; k < LANES; k++)
            squares[v * LANES + k] += sum[v][k];
}

/* Adds the sum of squares of every column of a strip. */
static SWEEP void FN(column_squares)(const REAL *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t width,
                                      double *squares)
{
    REAL padded[STRIP_ROWS * VECTOR_BYTES / sizeof(REAL)];
    double narrow[VECTOR_BYTES / sizeof(REAL)];
    for (ptrdiff_t start = 0; start < rows; start += STRIP_ROWS) {
        const ptrdiff_t count = MIN(STRIP_ROWS, rows - start);
        const REAL *block = x + start * stride;
        if (width < LANES) {
            memset(narrow, 0, sizeof narrow);
            FN(pad)(block, count, stride, width, padded);
            FN(vectors_squares)(padded, count, LANES, 1, 0, narrow);
            for (ptrdiff_t k = 0; k < width; k++)
                squares[k] += narrow[k];
            continue;
        }
#define SQUARES(vectors, at) FN(vectors_squares)(block + (at), count, stride, vectors, j - (at), squares + (at))
        FOR_EACH_VECTORS(SQUARES)
#undef SQUARES
    }
}

static inline __attribute__((always_inline)) void FN(vectors_backward_sums)(
    const REAL *grad_y, const REAL *x, const REAL *weight, ptrdiff_t rows, ptrdiff_t stride, const int vectors,
    ptrdiff_t skip, const REAL *mean, double *g_sum, double *gx_sum, double *x_sum)
{
    VEC m[STRIP_VECTORS], a[STRIP_VECTORS], b[STRIP_VECTORS], c[STRIP_VECTORS];
    for (int v = 0; v < vectors; v++)
        m[v] = LOAD(mean + v * LANES), a[v] = b[v] = c[v] = (VEC){0};
    for (ptrdiff_t r = 0; r < rows; r++) {
        const REAL w = weight ? weight[r] : 1;
        for (int v = 0; v < vectors; v++) {
            const VEC t = LOAD(x + r * stride + v * LANES) - m[v];
            const VEC g = LOAD(grad_y + r * stride + v * LANES) * w;
            a[v] += g, b[v] += g * t, c[v] += t;
        }
    }
    for (int v = 0; v < vectors; v++)
        for (ptrdiff_t k = skip; k < LANES; k++) {
            g_sum[v * LANES + k] += a[v][k];
            gx_sum[v * LANES + k] += b[v][k];
            x_sum[v * LANES + k] += c[v][k];
        }
}

/* Adds, for every column, the sums of g, g * (x - mean) and x - mean, where g = grad_y * weight and
 * the weight, if there is one, belongs to the row. */
static SWEEP void FN(column_backward_sums)(const REAL *grad_y, const REAL *x, const REAL *weight, ptrdiff_t rows,
                                            ptrdiff_t stride, ptrdiff_t width, const REAL *mean,
                                            double *g_sum, double *gx_sum, double *x_sum)
{
    REAL padded_x[BACKWARD_ROWS * VECTOR_BYTES / sizeof(REAL)], padded_g[BACKWARD_ROWS * VECTOR_BYTES / sizeof(REAL)];
    REAL padded_mean[VECTOR_BYTES / sizeof(REAL)];
    double narrow[3 * VECTOR_BYTES / sizeof(REAL)];
    for (ptrdiff_t start = 0; start < rows; start += BACKWARD_ROWS) {
        const ptrdiff_t count = MIN(BACKWARD_ROWS, rows - start);
        const REAL *block_g = grad_y + start * stride, *block_x = x + start * stride;
        const REAL *block_weight = weight ? weight + start : weight;
        if (width < LANES) {
            memset(narrow, 0, sizeof narrow);
            FN(pad)(block_x, count, stride, width, padded_x);
            FN(pad)(block_g, count, stride, width, padded_g);
            FN(pad)(mean, 1, width, width, padded_mean);
            FN(vectors_backward_sums)(padded_g, padded_x, block_weight, count, LANES, 1, 0, padded_mean,
                                      narrow, narrow + LANES, narrow + 2 * LANES);
            for (ptrdiff_t k = 0; k < width; k++) {
                g_sum[k] += narrow[k];
                gx_sum[k] += narrow[LANES + k];
                x_sum[k] += narrow[2 * LANES + k];
            }
            continue;
        }
#define SUMS(vectors, at)                                                                         \
    FN(vectors_backward_sums)(block_g + (at), block_x + (at), block_weight, count, stride, vectors, j - (at), \
                              mean + (at), g_sum + (at), gx_sum + (at), x_sum + (at))
        FOR_EACH_VECTORS(SUMS)
#undef SUMS
    }
}

/* ---------------------------------------------------- along one row of a strip: element by element */

/* y = activation(((x - pivot) * scale + shift) * weight + bias + residual), the first three per column. */
static SWEEP void FN(affine_columns)(const REAL *x, const REAL *residual, REAL *y, ptrdiff_t n,
                                      const REAL *pivot, const REAL *scale, const REAL *shift,
                                      double weight, double bias, int activation)
{
    const REAL w = weight, b = bias;
    if (residual)
        IVDEP for (ptrdiff_t i = 0; i < n; i++)
            y[i] = ((x[i] - pivot[i]) * scale[i] + shift[i]) * w + b + residual[i];
    else
        IVDEP for (ptrdiff_t i = 0; i < n; i++)
            y[i] = ((x[i] - pivot[i]) * scale[i] + shift[i]) * w + b;
    FN(activate)(y, n, activation);
}

/* As backward_affine, with mean, rstd, b and c per column; so are `weights`, where they are given. */
static EXACT_SWEEP void FN(backward_columns)(const REAL *grad_y, const REAL *x, const REAL *weights, double weight,
                                             const REAL *grad_total, REAL *grad_x, ptrdiff_t n, const REAL *mean,
                                             const REAL *rstd, const REAL *b, const REAL *c)
{
    const REAL w = weight;
    if (!x)
        IVDEP for (ptrdiff_t i = 0; i < n; i++)
            grad_x[i] = rstd[i] * weights[i] * grad_y[i];
    else if (weights)
        IVDEP for (ptrdiff_t i = 0; i < n; i++)
            grad_x[i] = rstd[i] * (grad_y[i] * weights[i] + (b[i] * (x[i] - mean[i]) + c[i]));
    else
        IVDEP for (ptrdiff_t i = 0; i < n; i++)
            grad_x[i] = rstd[i] * (grad_y[i] * w + (b[i] * (x[i] - mean[i]) + c[i])) + (grad_total ? grad_total[i] : 0);
}

/* Adds the sums of grad_y * ((x - mean) * rstd + shift) and of grad_y over a row. */
static SWEEP void FN(row_parameter_sums)(const REAL *grad_y, const REAL *x, ptrdiff_t n, const REAL *mean,
                                          const REAL *rstd, const REAL *shift, double *grad_weight,
                                          double *grad_bias)
{
    double weight_sum = 0, bias_sum = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        weight_sum += grad_y[i] * ((x[i] - mean[i]) * rstd[i] + shift[i]);
        bias_sum += grad_y[i];
    }
    *grad_weight += weight_sum, *grad_bias += bias_sum;
}

#undef FOR_EACH_VECTORS
#undef LANES
#undef BLOCK
#undef VEC
#undef LOAD
#undef IVDEP
#undef MIN
#endif
