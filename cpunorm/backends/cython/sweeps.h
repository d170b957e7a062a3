/* The innermost loops: a few stretches of memory, one thread, no layout.
 *
 * What Cython cannot say stands here: vector types, masked ends, stores past the caches, OpenMP teams.
 *
 * Words used throughout: `mean` and `m2` describe n values, m2 being the sum of their squared
 * distances from the mean. A transform is centred, y = (x - mean) * scale + bias, with the mean in
 * float64: `pivot` is the mean rounded to a real, and what the rounding took away goes into the bias.
 * Reals are summed in short blocks, and only the sums of blocks in float64. `planes` stretches of n
 * elements begin `stride` elements apart. Stores go by way of `past`, the seam of a thread whose
 * results go past the caches, or plainly where that is NULL. `far`: x is in good part not in the
 * caches; `cached`: a second sweep finds all of it near. What lies `ahead` of an element, if that is
 * not 0, is wanted next, and is fetched.
 */
#ifndef CPUNORM_SWEEPS_H
#define CPUNORM_SWEEPS_H

#include <stdlib.h>

#include "vectors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* Values summed before the sums go to float64: of short vectors, which are fewer sums, half as many. */
#define BLOCK ((ptrdiff_t)(MIN(512 * VECTOR_BYTES, 16384) / sizeof(real)))
#define SCRATCH 1024        /* reals that wait in L1 for an activation */
#define STRIP_COLUMNS 1024  /* of a strip, at most */
#define COLUMN_VECTORS 4    /* vectors of columns measured together */
#define SEGMENT 512         /* columns of a wider strip, whose sums stay in L1 */
#define COLUMN_ROWS 64      /* rows summed before the sums go to float64 */
#define BACKWARD_ROWS 16    /* the same, where sums may nearly cancel */
#define NARROW_ROWS 256     /* of groups that are done at once, at most */
#define BACKWARD_VECTORS 16 /* and along a stretch */
#define FEW_SUMS (LANES / 2) /* across vectors, that are found faster one by one than LANES at once */
#define FEW_CHANNELS 1024   /* of a group whose sums stay in L1 */
#define FEW_VECTORS 16      /* of a stretch so short that LANES of them are measured together */
#if VECTOR_BYTES == 64
#define SHORT_VECTORS 8     /* vectors of a row that is kept in registers, of which there are 32 here */
#define BACKWARD_SHORT 8    /* the same in the backward pass, of which a part may spill into L1 */
#define STRAIGHT_VECTORS 32 /* vectors of columns that are measured straight down */
#define GAPPED_ROWS 64      /* rows of groups that are done at once and do not fill vectors: masks are cheap here */
#else
#define SHORT_VECTORS 4
#define BACKWARD_SHORT 6
#define STRAIGHT_VECTORS COLUMN_VECTORS
#define GAPPED_ROWS 15
#endif
#define ALIGNED_VECTORS 8   /* of a stretch from which on its stores are aligned */
#define SHORT_PLANE 256     /* bytes of reals of a plane of which several are summed before that */
#define ROUGH_VECTORS 8     /* vectors that a first guess of a mean is made from */
#define ROUGH_ROWS 8        /* or rows, of columns */
#define TOGETHER 4          /* rows that share the loads of what runs along them */
#define PAIR 2              /* the same, where each row is three streams of memory */
#define UNITS 32            /* units measured together, at most */
#define LINE_BYTES 64

/* Code that is inlined in two places may be rounded in two ways, and which place runs may depend on the
 * number of threads. So there is one copy of every sweep, in which sums may be reordered and multiply-adds
 * fused; everything outside these sweeps is compiled to the letter. Those that are EXACT have loops in several
 * variants, whose elements must have the same bits: `fused` and `difference` say what is done first there. */
#if defined(__clang__)
#define SWEEP static __attribute__((noinline, unused))
#define EXACT_SWEEP SWEEP
#else
#define SWEEP static __attribute__((noinline, noclone, unused))
#define EXACT_SWEEP \
    static __attribute__((noinline, noclone, unused, optimize("fp-contract=off", "no-associative-math")))
#endif

/* ------------------------------------------------------------------------------------ scratch */

/* What is read or written in vectors over and over begins a line: a vector that lies in two costs twice. Several of
 * these lie an odd number of lines apart; see whole_lines. */
typedef real column_reals[STRIP_COLUMNS + 16] __attribute__((aligned(LINE_BYTES)));
typedef real segment_reals[SEGMENT + 16] __attribute__((aligned(LINE_BYTES)));

/* To be freed; NULL if there is no memory. */
static inline void *new_lines(size_t bytes)
{
    void *block = NULL;
    return posix_memalign(&block, LINE_BYTES, bytes) ? NULL : block;
}

/* ------------------------------------------------------------------------------------- teams */

typedef void (*team_body)(void *work, int member, int members);

/* Runs body once per member, at most `threads` of them. */
static inline void team(team_body body, void *work, int threads)
{
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(work, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    body(work, 0, 1);
}

/* All members of a team reach it, or none. */
static inline void team_barrier(int members)
{
    if (members > 1) {
#pragma omp barrier
    }
}

#if !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("associative-math", "no-signed-zeros", "no-trapping-math", "fp-contract=fast")
#endif

/* --------------------------------------------------------------------------------- activations */

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

#if defined(ELEMENT_FLOAT64)
#define EXP exp
#define ERF erf
#define TANH tanh
#else
#define EXP exp_float
#define ERF erf_float
#define TANH tanh_float
#endif

/* In the order of ACTIVATIONS. */
enum { RELU = 1, SILU, GELU, SIGMOID, HYPERBOLIC_TANGENT };

/* All but ReLU, which is done while the output is written. Of whole vectors, for which there must be room: what the
 * compiler makes of the rest of a loop may be rounded in another way. */
SWEEP void activate(real *y, ptrdiff_t n, int activation)
{
    n = (n + LANES - 1) / LANES * LANES;
    switch (activation) {
    case SILU:
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = y[i] / (1 + EXP(-y[i]));
        break;
    case GELU:
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = (real)0.5 * y[i] * (1 + ERF(y[i] * (real)0.70710678118654752));
        break;
    case SIGMOID:
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = 1 / (1 + EXP(-y[i]));
        break;
    case HYPERBOLIC_TANGENT:
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = TANH(y[i]);
        break;
    }
}

/* ------------------------------------------------------------------- vectors along a stretch */

/* Runs a statement for every vector of n elements; `left` is LANES, or less in the last. */
#define FOR_VECTORS(i, left, n, ...)                                                    \
    {                                                                                   \
        ptrdiff_t i = 0;                                                                \
        for (; i + LANES <= (n); i += LANES) {                                          \
            const ptrdiff_t left = LANES;                                               \
            __VA_ARGS__                                                                 \
        }                                                                               \
        if (i < (n)) {                                                                  \
            const ptrdiff_t left = (n) - i;                                             \
            __VA_ARGS__                                                                 \
        }                                                                               \
    }

/* Elements before those that are stored line by line: a store across two lines takes twice the time, which is much
 * where all is in the caches. */
ALWAYS ptrdiff_t head_of(const element *y, ptrdiff_t n)
{
    return n >= ALIGNED_VECTORS * LANES ? until_aligned(y) : 0;
}

/* Writes VALUE(i, left) to n elements of y. Both ends are whole vectors where there is one: they are computed first,
 * since y may be what it is computed from. */
#define WRITE(y, n, VALUE)                                                              \
    if ((n) >= LANES) {                                                                 \
        const ptrdiff_t head = head_of(y, n);                                           \
        const vec first = head ? VALUE(0, LANES) : splat(0);                            \
        const vec last = VALUE((n) - LANES, LANES);                                     \
        ptrdiff_t i = head;                                                             \
        for (; i + 2 * LANES < (n); i += 2 * LANES) {                                   \
            const vec one = VALUE(i, LANES), two = VALUE(i + LANES, LANES);             \
            store_two((y) + i, one, two);                                               \
        }                                                                               \
        if (i + LANES < (n))                                                            \
            store((y) + i, VALUE(i, LANES), LANES);                                     \
        if (head)                                                                       \
            store(y, first, LANES);                                                     \
        store((y) + (n) - LANES, last, LANES);                                          \
    } else                                                                              \
        store(y, VALUE(0, n), n);

/* Stores what is `left` of a vector, where that is all of it past the caches if so wanted. */
ALWAYS void put(element *y, vec v, ptrdiff_t left, int streaming)
{
    if (streaming && left == LANES)
        stream(y, v);
    else
        store(y, v, left);
}

ALWAYS void put_two(element *y, vec one, vec two, const int streaming)
{
    if (streaming)
        stream(y, one), stream(y + LANES, two);
    else
        store_two(y, one, two);
}

/* Past the caches, what a stretch leaves over of its last vector: the `count` elements before `to`. It is stored with
 * the first of the stretch that follows. In parts, a line would have to come from memory first, and all stores after
 * it would wait for that. Functions that are given one, `past`, store past the caches; plainly without. */
typedef struct {
    vec over;
    element *to;
    ptrdiff_t count;
} seam;

SWEEP void close_seam(seam *s)
{
    if (s->count)
        store(s->to - s->count, s->over, s->count);
    s->to = 0, s->count = 0;
}

/* The seam, with nothing left over, if it is wanted and of use; else NULL. */
ALWAYS seam *open_seam(seam *s, int wanted)
{
    s->to = 0, s->count = 0;
    return wanted && CAN_STREAM ? s : 0;
}

/* Before a thread says that it is done. */
ALWAYS void end_seam(seam *past)
{
    if (past) {
        close_seam(past);
        stream_fence();
    }
}

/* Goes on at y. Returns how many elements come before the first aligned one. */
ALWAYS ptrdiff_t follow(seam *s, const element *y)
{
    if (y != s->to)
        close_seam(s);
    return until_aligned(y);
}

/* Leaves the `count` elements before y, fewer than a vector. */
ALWAYS void leave(seam *s, element *y, vec over, ptrdiff_t count)
{
    s->over = over, s->to = y, s->count = count;
}

/* Stores the n elements of v before the first aligned one, with what is left over from before them. */
ALWAYS void join(seam *s, element *y, vec v, ptrdiff_t n)
{
    if (s->count == 0) {
        store(y, v, n);
        return;
    }
    s->over = choose(first_mask(s->count), s->over, picked(v, turn(s->count)));
    s->count += n;
    if (s->count == LANES) {
        stream(y + n - LANES, s->over);
        s->count = 0;
    }
}

/* The ways of rows: plainly; past the caches in their own vectors, which are all aligned; in those of memory. */
enum { PLAIN, WHOLE, JOINED };

/* That of rows of `width` elements, `stride` apart. Those that end within lines are joined where they lie side by
 * side. */
ALWAYS int way_of(const seam *past, const element *y, ptrdiff_t stride, ptrdiff_t width)
{
    if (!past || !y)
        return PLAIN;
    return rows_aligned(y, stride) ? WHOLE : stride == width ? JOINED : PLAIN;
}

/* How far into a vector a row begins, and what brings its own vectors there. */
typedef struct {
    ptrdiff_t count;
    bits_vec order, before;
} phase;

ALWAYS phase phase_of(int way, const element *y)
{
    if (way != JOINED)
        return (phase){0};
    const ptrdiff_t count = (LANES - until_aligned(y)) % LANES;
    const phase p = {count, turn(count), first_mask(count)};
    return p;
}

/* Stores a vector of a row, turned, of which there is `left`; `over` is the one before. Returns what is over then. */
ALWAYS vec go_on(element *y, vec turned, ptrdiff_t left, phase p, vec over)
{
    const vec whole = choose(p.before, over, turned);
    if (left + p.count < LANES)
        return whole;
    stream(y - p.count, whole);
    return turned;
}

/* The same of the first one. */
ALWAYS vec begin_row(seam *s, element *y, vec turned, ptrdiff_t left, phase p)
{
    follow(s, y);
    if (s->count == p.count)
        return go_on(y, turned, left, p, s->over);
    store(y, picked(turned, turn(-p.count)), MIN(left, LANES - p.count));
    return turned;
}

/* Nothing is left over of a row that was stored because others write to all of its vectors. */
ALWAYS void end_row(seam *s, element *y, ptrdiff_t n, phase p, vec over)
{
    const int stored = s->count != p.count && p.count + n < LANES;
    leave(s, y + n, over, stored ? 0 : (p.count + n) % LANES);
}

/* Stores a vector of the row at y, the i-th element and what follows, by any way. */
ALWAYS vec put_on_way(const int way, seam *past, element *y, ptrdiff_t i, vec v, ptrdiff_t left, phase p, vec over)
{
    if (way != JOINED) {
        put(y + i, v, left, way);
        return over;
    }
    v = picked(v, p.order);
    return i == 0 ? begin_row(past, y, v, left, p) : go_on(y + i, v, left, p, over);
}

/* Writes VALUE(i, left) to n elements of y past the caches. */
#define WRITE_PAST(y, n, s, VALUE)                                                      \
    {                                                                                   \
        ptrdiff_t i = follow(s, y);                                                     \
        i = MIN(n, i);                                                                  \
        if (i)                                                                          \
            join(s, y, VALUE(0, i), i);                                                 \
        for (; i + LANES <= (n); i += LANES)                                            \
            stream((y) + i, VALUE(i, LANES));                                           \
        if (i < (n))                                                                    \
            leave(s, (y) + (n), VALUE(i, (n) - i), (n) - i);                            \
        else                                                                            \
            (s)->to = (y) + (n);                                                        \
    }

/* Writes VALUE(i, left) to n elements of y as `past` says. */
#define WRITE_EITHER(y, n, past, VALUE)                                                 \
    if (past) {                                                                         \
        WRITE_PAST(y, n, past, VALUE)                                                   \
    } else {                                                                            \
        WRITE(y, n, VALUE)                                                              \
    }

/* Writes what an activation makes of VALUE(i, left), i counted from the start of each piece of n. */
#define WRITE_ACTIVATED(y, n, activation, past, START, VALUE)                           \
    for (ptrdiff_t START = 0; START < (n); START += SCRATCH) {                          \
        real scratch[SCRATCH];                                                          \
        const ptrdiff_t count = MIN(SCRATCH, (n) - START);                              \
        FOR_VECTORS(i, left, count, store_real(scratch + i, VALUE(START + i, left), left);) \
        activate(scratch, count, activation);                                           \
        deliver(scratch, (y) + START, count, past);                                     \
    }

#define SCRATCHED(i, left) load_real(scratch + (i), left, 0)

ALWAYS void deliver(const real *scratch, element *y, ptrdiff_t n, seam *past)
{
    WRITE_EITHER(y, n, past, SCRATCHED)
}

/* Writes VALUE(terms, i, left) to planes of n elements side by side, n >= LANES: one stretch, whose terms become
 * TERMS(p, p / K) where plane p begins. A vector that ends one plane and begins the next is computed with the terms
 * of both; lines are stored once. */
#define WRITE_PLANES(y, planes, n, K, streaming, past, TERMS, VALUE)                    \
    {                                                                                   \
        const ptrdiff_t all = (planes) * (n);                                           \
        const ptrdiff_t head = (streaming) ? follow(past, y) : head_of(y, all);         \
        plane_terms t = TERMS(0, 0);                                                    \
        ptrdiff_t p = 0, unit = 0, more = K, i = head, end = n;                         \
        vec first = splat(0), last = splat(0);                                          \
        if (!(streaming)) {                                                             \
            const plane_terms final = TERMS((planes) - 1, ((planes) - 1) / (K));        \
            first = head ? VALUE(t, 0, LANES) : splat(0);                               \
            last = VALUE(final, all - LANES, LANES);                                    \
        } else if (head)                                                                \
            join(past, y, VALUE(t, 0, head), head);                                     \
        for (;;) {                                                                      \
            for (; i + 2 * LANES <= end; i += 2 * LANES) {                              \
                const vec one = VALUE(t, i, LANES), two = VALUE(t, i + LANES, LANES);   \
                put_two((y) + i, one, two, streaming);                                  \
            }                                                                           \
            if (i + LANES <= end) {                                                     \
                put((y) + i, VALUE(t, i, LANES), LANES, streaming);                     \
                i += LANES;                                                             \
            }                                                                           \
            if (++p == (planes))                                                        \
                break;                                                                  \
            if (--more == 0)                                                            \
                more = K, unit++;                                                       \
            const plane_terms next = TERMS(p, unit);                                    \
            if (i < end) {                                                              \
                const vec here = VALUE(t, i, LANES), there = VALUE(next, i, LANES);     \
                put((y) + i, choose(first_mask(end - i), here, there), LANES, streaming); \
                i += LANES;                                                             \
            }                                                                           \
            t = next, end += (n);                                                       \
        }                                                                               \
        if (!(streaming)) {                                                             \
            if (head)                                                                   \
                store(y, first, LANES);                                                 \
            store((y) + all - LANES, last, LANES);                                      \
        } else                                                                          \
            leave(past, (y) + all, i < all ? VALUE(t, i, all - i) : splat(0), all - i); \
    }

/* The same for planes of any length, of what an activation makes of it. */
#define WRITE_ACTIVATED_PLANES(y, planes, n, K, activation, past, TERMS, VALUE)         \
    {                                                                                   \
        real scratch[SCRATCH + LANES];                                             \
        element *to = y;                                                                \
        ptrdiff_t waiting = 0, at = 0, unit = 0, more = K;                              \
        for (ptrdiff_t p = 0; p < (planes); p++) {                                      \
            const plane_terms t = TERMS(p, unit);                                       \
            if (--more == 0)                                                            \
                more = K, unit++;                                                       \
            for (ptrdiff_t done = 0; done < (n);) {                                     \
                const ptrdiff_t count = MIN(SCRATCH - waiting, (n) - done);             \
                FOR_VECTORS(i, left, count, store_real(scratch + waiting + i, VALUE(t, at + i, left), LANES);) \
                waiting += count, done += count, at += count;                           \
                if (waiting == SCRATCH || at == (planes) * (n)) {                       \
                    activate(scratch, waiting, activation);                             \
                    deliver(scratch, to, waiting, past);                                \
                    to += waiting, waiting = 0;                                         \
                }                                                                       \
            }                                                                           \
        }                                                                               \
    }

/* What relu, and only relu, cuts off. */
ALWAYS vec floor_of(int activation)
{
    return splat(activation == RELU ? (real)0 : (real)-INFINITY);
}

/* Of what each of some planes or rows has, unless NULL, where that of the p-th is. */
#define NTH(p, what, step) ((what) ? (what) + (p) * (step) : (what))

/* ------------------------------------------------------------------ along a stretch: sums */

/* Chan, Golub, LeVeque 1979: (mean, m2) of n_a + n_b values from those of n_a and of n_b. */
static inline void merge_moments(double n_a, double *mean_a, double *m2_a,
                                 double n_b, double mean_b, double m2_b)
{
    const double n = n_a + n_b, delta = mean_b - *mean_a;
    *mean_a += delta * (n_b / n);
    *m2_a += m2_b + delta * delta * (n_a * n_b / n);
}

/* The same for `count` pairs. */
SWEEP void merge_columns(double n_a, double *mean_a, double *m2_a, double n_b, const double *mean_b,
                         const double *m2_b, ptrdiff_t count)
{
    const double n = n_a + n_b, share = n_b / n, weight = n_a * n_b / n;
    for (ptrdiff_t i = 0; i < count; i++) {
        const double delta = mean_b[i] - mean_a[i];
        mean_a[i] += delta * share;
        m2_a[i] += m2_b[i] + delta * delta * weight;
    }
}

/* Merges moments of n values each: `copies` rows of channels * inner of them become one of channels. Equal means
 * give exactly their value. */
SWEEP void fold_moments(double n, const double *restrict mean, const double *restrict m2, ptrdiff_t copies,
                        ptrdiff_t channels, ptrdiff_t inner, double *restrict out_mean, double *restrict out_m2)
{
    const double inverse = 1.0 / (copies * inner);
    const ptrdiff_t width = channels * inner;
    if (inner == 1) {
        for (ptrdiff_t c = 0; c < channels; c++)
            out_mean[c] = out_m2[c] = 0;
        for (ptrdiff_t k = 1; k < copies; k++)
            for (ptrdiff_t c = 0; c < channels; c++)
                out_mean[c] += mean[k * width + c] - mean[c];
        for (ptrdiff_t c = 0; c < channels; c++)
            out_mean[c] = mean[c] + out_mean[c] * inverse;
        for (ptrdiff_t k = 0; k < copies; k++)
            for (ptrdiff_t c = 0; c < channels; c++) {
                const double delta = mean[k * width + c] - out_mean[c];
                out_m2[c] += m2[k * width + c] + n * delta * delta;
            }
        return;
    }
    for (ptrdiff_t c = 0; c < channels; c++, mean += inner, m2 += inner) {
        double shift = 0, total = 0;
        for (ptrdiff_t k = 0; k < copies; k++)
            for (ptrdiff_t s = 0; s < inner; s++)
                shift += mean[k * width + s] - mean[0];
        const double mu = mean[0] + shift * inverse;
        for (ptrdiff_t k = 0; k < copies; k++)
            for (ptrdiff_t s = 0; s < inner; s++) {
                const double delta = mean[k * width + s] - mu;
                total += m2[k * width + s] + n * delta * delta;
            }
        out_mean[c] = mu, out_m2[c] = total;
    }
}

/* Adds `copies` rows of channels * inner sums to one of channels. */
SWEEP void fold_sums(const double *restrict columns, ptrdiff_t copies, ptrdiff_t channels, ptrdiff_t inner,
                     double *restrict sums)
{
    for (; copies > 0; copies--, columns += channels * inner) {
        for (ptrdiff_t c = 0; inner == 1 && c < channels; c++)
            sums[c] += columns[c];
        for (ptrdiff_t c = 0; inner > 1 && c < channels; c++) {
            double total = 0;
            for (ptrdiff_t s = 0; s < inner; s++)
                total += columns[c * inner + s];
            sums[c] += total;
        }
    }
}

/* Of each channel the sum of what `copies` rows of channels * inner reals have. */
SWEEP void add_up(const real *restrict laid, ptrdiff_t copies, ptrdiff_t channels, ptrdiff_t inner,
                  real *restrict sums)
{
    for (ptrdiff_t first = 0; first < channels; first += UNITS) {
        const ptrdiff_t some = MIN(UNITS, channels - first);
        double total[UNITS] = {0};
        for (ptrdiff_t k = 0; k < copies; k++) {
            const real *const here = laid + (k * channels + first) * inner;
            for (ptrdiff_t c = 0; inner == 1 && c < some; c++)
                total[c] += here[c];
            for (ptrdiff_t c = 0; inner > 1 && c < some; c++)
                for (ptrdiff_t s = 0; s < inner; s++)
                    total[c] += here[c * inner + s];
        }
        for (ptrdiff_t c = 0; c < some; c++)
            sums[first + c] = total[c];
    }
}

/* Of n statistics over `count` values each, from their m2: 1 / sqrt(variance + eps), and what is wanted of them as
 * reals. */
EXACT_SWEEP void settle(const double *restrict mu, const double *restrict m2, ptrdiff_t n, double count, double eps,
                        double *restrict r, real *restrict mean, real *restrict var, real *restrict rstd)
{
    const double inverse = 1 / count;
    for (ptrdiff_t i = 0; i < n; i++) {
        /* Rounding can leave m2 a hair below zero; a NaN must pass. */
        const double v = m2[i] < 0 ? 0 : m2[i] * inverse;
        r[i] = 1 / sqrt(v + eps);
        if (var)
            var[i] = v;
    }
    for (ptrdiff_t i = 0; mean && i < n; i++)
        mean[i] = mu[i];
    for (ptrdiff_t i = 0; rstd && i < n; i++)
        rstd[i] = r[i];
}

ALWAYS void add_one(vec t, vec *sum, vec *squares)
{
    *sum += t;
    *squares += t * t;
}

/* Adds x - pivot and its square to sum and squares; the n elements from `wanted` on are fetched, to be read
 * or to be written. */
ALWAYS void add_stretch(const element *x, ptrdiff_t n, real pivot, const element *wanted, const int to_write,
                        vec *sum, vec *squares)
{
    vec a = {0}, b = {0}, c = {0}, d = {0}, p = {0}, q = {0}, r = {0}, s = {0};
    ptrdiff_t i = 0;
#define AT(k, sum, squares)                                                             \
    if (to_write)                                                                       \
        prefetch_to_write(wanted + i + k * LANES);                                      \
    else                                                                                \
        prefetch(wanted + i + k * LANES);                                               \
    add_one(load(x + i + k * LANES, LANES, 0) - pivot, sum, squares);
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        AT(0, &a, &p)
        AT(1, &b, &q)
        AT(2, &c, &r)
        AT(3, &d, &s)
    }
    if (i + 2 * LANES <= n) {
        AT(0, &a, &p)
        AT(1, &b, &q)
        i += 2 * LANES;
    }
    if (i + LANES <= n) {
        AT(0, &c, &r)
        i += LANES;
    }
#undef AT
    if (i < n)
        add_one(load_any(x, i, n - i, pivot) - pivot, &d, &s);
    *sum += (a + b) + (c + d);
    *squares += (p + q) + (r + s);
}

/* About the mean of n values, judged by the first of them, and exactly it where they are equal. */
ALWAYS real rough_mean(const element *x, ptrdiff_t n)
{
    const real first = load_one(x);
    const vec p = splat(first);
    const ptrdiff_t some = MIN(n, ROUGH_VECTORS * LANES);
    vec a = {0}, b = {0};
    ptrdiff_t i = 0;
    for (; i + 2 * LANES <= some; i += 2 * LANES) {
        a += difference(load(x + i, LANES, 0), p);
        b += difference(load(x + i + LANES, LANES, 0), p);
    }
    if (i + LANES <= some) {
        a += difference(load(x + i, LANES, 0), p);
        i += LANES;
    }
    if (i < some)
        b += difference(load_any(x, i, some - i, first), p);
    return first + lanes_sum(a + b) / some;
}

/* Merges a block of `count` values with the `done` before it: what their sums around the pivot say. */
ALWAYS void merge_block(double done, double *mean, double *m2, ptrdiff_t count, real pivot, vec sum, vec squares)
{
    const double total = lanes_sum(sum), rest = total / count;
    const double block_m2 = lanes_sum(squares) - rest * total;
    if (done == 0)
        *mean = pivot + rest, *m2 = block_m2;
    else
        merge_moments(done, mean, m2, count, pivot + rest, block_m2);
}

/* Whether the mean is more than a quarter of the deviation from the pivot of these sums. */
ALWAYS int far_off(ptrdiff_t count, real sum, real squares)
{
    return 17 * sum * sum > squares * count;
}

/* The sums over the lanes of some of LANES vectors; the others are not read, or cleared. */
ALWAYS void some_lanes_sums(vec *v, ptrdiff_t count, real *sums)
{
    if (count <= FEW_SUMS) {
        for (ptrdiff_t u = 0; u < count; u++)
            sums[u] = lanes_sum(v[u]);
        return;
    }
    for (ptrdiff_t u = count; u < LANES; u++)
        v[u] = splat(0);
    store_real(sums, lanes_sums(v), LANES);
}

/* Mean and m2 of up to LANES stretches side by side of at most a BLOCK, whose sums across lanes are found together. Of
 * those of few vectors the pivot is the mean but for its rounding. */
ALWAYS void block_moments(const int few, const element *x, ptrdiff_t units, ptrdiff_t n, double *mean, double *m2,
                          ptrdiff_t to_y)
{
    const ptrdiff_t some = few ? n : ROUGH_VECTORS * LANES;
    vec sum[LANES], squares[LANES];
    real pivot[LANES], totals[LANES], m2s[LANES];
    const real inverse = (real)1 / some;
    const double share = 1.0 / n;
    for (ptrdiff_t u = 0; u < units; u++) {
        const real first = load_one(x + u * n);
        vec total = {0};
        FOR_VECTORS(i, left, some, total += difference(load_any(x + u * n, i, left, first), splat(first));)
        pivot[u] = first, sum[u] = total;
    }
    some_lanes_sums(sum, units, totals);
    for (ptrdiff_t u = 0; u < units; u++) {
        const element *const here = x + u * n;
        vec total = {0}, square = {0};
        const real p = pivot[u] += totals[u] * inverse;
        if (few)
            FOR_VECTORS(i, left, n, {
                prefetch_to_write(here + i + to_y);
                add_one(load_any(here, i, left, p) - p, &total, &square);
            })
        else
            add_stretch(here, n, p, here + to_y, 1, &total, &square);
        sum[u] = total, squares[u] = square;
    }
    some_lanes_sums(sum, units, totals);
    some_lanes_sums(squares, units, m2s);
    for (ptrdiff_t u = 0; u < units; u++) {
        if (!few && far_off(n, totals[u], m2s[u])) {
            const element *const here = x + u * n;
            vec total = {0}, square = {0};
            pivot[u] += totals[u] / n;
            add_stretch(here, n, pivot[u], here, 0, &total, &square);
            totals[u] = lanes_sum(total), m2s[u] = lanes_sum(square);
        }
        const double rest = totals[u] * share;
        mean[u] = pivot[u] + rest;
        m2[u] = m2s[u] - rest * totals[u];
    }
}

/* Mean and m2 of `units` stretches of n values side by side, while memory is fetched for what will be written to y, if
 * there is one.
 *
 * Sums are taken in blocks, around a pivot: first a rough mean, or a better one where that proves far off;
 * then the mean of all blocks before. What a pivot misses the mean by is found with the sums; if it is
 * much, the spread between the blocks is a part of m2 just as large. Equal values have exactly their
 * mean, and m2 = 0. */
SWEEP void stretch_moments(const element *x, ptrdiff_t units, ptrdiff_t n, double *mean, double *m2,
                           const element *y)
{
    const ptrdiff_t to_y = y ? y - x : 0;
    if (n <= BLOCK) {
        for (ptrdiff_t u = 0; u < units; u += LANES)
            if (n <= FEW_VECTORS * LANES)
                block_moments(1, x + u * n, MIN(LANES, units - u), n, mean + u, m2 + u, to_y);
            else
                block_moments(0, x + u * n, MIN(LANES, units - u), n, mean + u, m2 + u, to_y);
        return;
    }
    for (ptrdiff_t u = 0; u < units; u++, x += n) {
        real pivot = rough_mean(x, n);
        for (ptrdiff_t i = 0; i < n; i += BLOCK) {
            const ptrdiff_t count = MIN(BLOCK, n - i);
            vec sum = {0}, squares = {0};
            add_stretch(x + i, count, pivot, x + i + to_y, 1, &sum, &squares);
            if (i == 0 && far_off(count, lanes_sum(sum), lanes_sum(squares))) {
                pivot += lanes_sum(sum) / count;
                sum = squares = splat(0);
                add_stretch(x, count, pivot, x, 0, &sum, &squares);
            }
            merge_block(i, mean + u, m2 + u, count, pivot, sum, squares);
            pivot = mean[u];
        }
    }
}

/* Where the next of some planes lies; there is none after the last, and to fetch what does not exist costs a
 * walk through the tables of pages. */
#define NEXT_PLANE(p) ((p) + 1 < planes ? stride : 0)

/* As stretch_moments for up to UNITS units of `planes` stretches each; units lie side by side, planes `stride`
 * apart. */
SWEEP void plane_moments(const element *x, ptrdiff_t planes, ptrdiff_t stride, ptrdiff_t units, ptrdiff_t n,
                         double *mean, double *m2)
{
    real pivot[UNITS];
    vec sum[UNITS], squares[UNITS];
    ptrdiff_t done = 0, count = 0, i = 0;
    for (ptrdiff_t u = 0; u < units; u++)
        pivot[u] = rough_mean(x + u * n, n), sum[u] = squares[u] = splat(0);
    for (ptrdiff_t p = 0; p < planes;) {
        const ptrdiff_t length = MIN(BLOCK, n - i);
        const element *here = x + p * stride + i, *next = here + NEXT_PLANE(p);
        for (ptrdiff_t u = 0; u < units; u++)
            add_stretch(here + u * n, length, pivot[u], next + u * n, 0, sum + u, squares + u);
        count += length, i += length;
        if (i == n)
            i = 0, p++;
        if (count < BLOCK && (i || p % COLUMN_ROWS) && p < planes)
            continue;
        for (ptrdiff_t u = 0; u < units; u++) {
            if (done == 0 && far_off(count, lanes_sum(sum[u]), lanes_sum(squares[u]))) {
                pivot[u] += lanes_sum(sum[u]) / count;
                sum[u] = squares[u] = splat(0);
                for (ptrdiff_t k = 0; k == 0 || k < p; k++)
                    add_stretch(x + k * stride + u * n, MIN(BLOCK, n), pivot[u],
                                x + k * stride + NEXT_PLANE(k) + u * n, 0, sum + u, squares + u);
            }
            merge_block(done, mean + u, m2 + u, count, pivot[u], sum[u], squares[u]);
            pivot[u] = mean[u], sum[u] = squares[u] = splat(0);
        }
        done += count, count = 0;
    }
}

/* Sums of the squares of `units` stretches of n values side by side. */
SWEEP void stretch_squares(const element *x, ptrdiff_t units, ptrdiff_t n, double *squares, const element *y)
{
    const ptrdiff_t to_y = y ? y - x : 0;
    for (ptrdiff_t u = 0; u < units; u++, x += n) {
        double total = 0;
        for (ptrdiff_t i = 0; i < n; i += BLOCK) {
            vec sum = {0}, block = {0};
            add_stretch(x + i, MIN(BLOCK, n - i), 0, x + i + to_y, 1, &sum, &block);
            total += lanes_sum(block);
        }
        squares[u] = total;
    }
}

/* Sums of g, of g * (x - mean) and of x - mean, where g = grad_y * weight, the weight running along. */
typedef struct {
    vec g, gx, x;
} backward_vecs;

typedef struct {
    wide_vec g, gx, x;
} backward_wides;

ALWAYS void clear(backward_wides *wide)
{
    const doubles none = {0};
    wide->g.low = wide->gx.low = wide->x.low = none;
#if !defined(ELEMENT_FLOAT64)
    wide->g.high = wide->gx.high = wide->x.high = none;
#endif
}

ALWAYS void flush(backward_wides *wide, backward_vecs *sum)
{
    add_wide(&wide->g, sum->g), add_wide(&wide->gx, sum->gx), add_wide(&wide->x, sum->x);
    sum->g = sum->gx = sum->x = splat(0);
}

/* Adds at most BACKWARD_VECTORS vectors; what lies `ahead`, if not 0, and grad_x, if given, is wanted next. */
ALWAYS void add_backward(const element *grad_y, const element *x, const real *weight, ptrdiff_t n, real mean,
                         ptrdiff_t ahead, const element *grad_x, backward_vecs *sum)
{
    backward_vecs even = *sum, odd = {{0}, {0}, {0}};
    ptrdiff_t i = 0;
#define AT(k, left, sum)                                                                \
    {                                                                                   \
        const ptrdiff_t j = i + k * LANES;                                              \
        if (ahead)                                                                      \
            prefetch(x + j + ahead), prefetch(grad_y + j + ahead);                      \
        if (grad_x)                                                                     \
            prefetch_to_write(grad_x + j);                                              \
        const vec t = load_any(x, j, left, mean) - mean;                                \
        vec g = load_any(grad_y, j, left, 0);                                           \
        if (weight)                                                                     \
            g *= load_any_real(weight, j, left);                                        \
        (sum)->g += g, (sum)->gx += g * t, (sum)->x += t;                               \
    }
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        AT(0, LANES, &even)
        AT(1, LANES, &odd)
    }
    if (i + LANES <= n) {
        AT(0, LANES, &even)
        i += LANES;
    }
    if (i < n)
        AT(0, n - i, &odd)
#undef AT
    sum->g = even.g + odd.g, sum->gx = even.gx + odd.gx, sum->x = even.x + odd.x;
}

/* Adds those of a stretch. They may nearly cancel, and are compared with values of order 1 all the same: only
 * BACKWARD_VECTORS vectors are added before they go to float64. */
ALWAYS void add_long(const element *grad_y, const element *x, const real *weight, ptrdiff_t n, real mean,
                     ptrdiff_t ahead, const element *grad_x, backward_wides *wide)
{
    backward_vecs sum = {{0}, {0}, {0}};
    for (ptrdiff_t i = 0; i < n; i += BACKWARD_VECTORS * LANES) {
        const ptrdiff_t count = MIN(BACKWARD_VECTORS * LANES, n - i);
        if (weight)
            add_backward(grad_y + i, x + i, weight + i, count, mean, ahead, NTH(1, grad_x, i), &sum);
        else
            add_backward(grad_y + i, x + i, 0, count, mean, ahead, NTH(1, grad_x, i), &sum);
        flush(wide, &sum);
    }
}

ALWAYS void add_wides(const backward_wides *wide, double *g_sum, double *gx_sum, double *x_sum)
{
    *g_sum += wide_sum(&wide->g), *gx_sum += wide_sum(&wide->gx), *x_sum += wide_sum(&wide->x);
}

/* The three sums of each of up to PAIR stretches side by side, with a mean each, or none, and a weight running along, or
 * none. */
SWEEP void pair_backward_sums(const element *grad_y, const element *x, const real *weight, ptrdiff_t rows, ptrdiff_t n,
                              const real *mean, double *sums, const element *grad_x)
{
    for (ptrdiff_t k = 0; k < rows; k++, grad_y += n, x += n, grad_x = NTH(1, grad_x, n), sums += 3) {
        const real pivot = mean ? mean[k] : 0;
        if (n <= BACKWARD_VECTORS * LANES) {
            backward_vecs sum = {{0}, {0}, {0}};
            add_backward(grad_y, x, weight, n, pivot, 0, grad_x, &sum);
            sums[0] = lanes_sum(sum.g), sums[1] = lanes_sum(sum.gx), sums[2] = lanes_sum(sum.x);
        } else {
            backward_wides wide;
            clear(&wide);
            add_long(grad_y, x, weight, n, pivot, 0, grad_x, &wide);
            sums[0] = wide_sum(&wide.g), sums[1] = wide_sum(&wide.gx), sums[2] = wide_sum(&wide.x);
        }
    }
}

/* Sums under way, of up to UNITS units. */
typedef struct {
    vec g[UNITS], gx[UNITS], x[UNITS];
} unit_sums;

ALWAYS void add_lanes(vec *v, ptrdiff_t count, double *sums)
{
    real totals[LANES];
    some_lanes_sums(v, count, totals);
    for (ptrdiff_t u = 0; u < count; u++)
        sums[u] += totals[u];
}

ALWAYS void clear_units(unit_sums *sum, ptrdiff_t units)
{
    for (ptrdiff_t u = 0; u < units; u++)
        sum->g[u] = sum->gx[u] = sum->x[u] = splat(0);
}

ALWAYS void add_unit_sums(unit_sums *sum, ptrdiff_t units, double *g_sum, double *gx_sum, double *x_sum)
{
    for (ptrdiff_t u = 0; u < units; u += LANES) {
        const ptrdiff_t count = MIN(LANES, units - u);
        add_lanes(sum->g + u, count, g_sum + u);
        add_lanes(sum->gx + u, count, gx_sum + u);
        add_lanes(sum->x + u, count, x_sum + u);
    }
}

/* The same of stretches of at most BACKWARD_VECTORS vectors, which are measured LANES at a time. */
ALWAYS void short_backward_sums(const int single, const element *grad_y, const element *x, ptrdiff_t stretches,
                                ptrdiff_t n, const real *mean, ptrdiff_t K, double *g_sum, double *gx_sum,
                                double *x_sum)
{
    const ptrdiff_t some = BACKWARD_VECTORS / ((n + LANES - 1) / LANES);
    vec x_ = splat(0);
    for (ptrdiff_t first = 0, left = K, run = some; first < stretches; first += LANES) {
        const ptrdiff_t count = MIN(LANES, stretches - first);
        ptrdiff_t runs = 0, places[LANES];
        vec g[LANES], gx[LANES], xs[LANES];
        for (ptrdiff_t u = 0; u < count; u++, grad_y += n, x += n) {
            backward_vecs one = {{0}, {0}, x_};
            if (single) {
                const vec t = load(x, n, *mean) - *mean;
                one.g = load(grad_y, n, 0), one.gx = one.g * t, one.x += t;
            } else
                add_backward(grad_y, x, 0, n, *mean, 0, 0, &one);
            g[u] = one.g, gx[u] = one.gx, x_ = one.x;
            left--, run--;
            /* Where runs end depends on nothing but the place in the group, or bits would depend on who is dealt what. */
            if (left == 0 || run == 0 || first + u == stretches - 1)
                xs[runs] = x_, places[runs++] = first + u, x_ = splat(0), run = some;
            if (left == 0)
                left = K, mean++;
        }
        add_lanes(g, count, g_sum + first);
        add_lanes(gx, count, gx_sum + first);
        real totals[LANES];
        some_lanes_sums(xs, runs, totals);
        for (ptrdiff_t k = 0; k < runs; k++)
            x_sum[places[k]] += totals[k];
    }
}

/* Adds the sums of each of many stretches side by side, K of which share a mean: that of their x may stand with any of
 * them. */
SWEEP void stretches_backward_sums(const element *grad_y, const element *x, ptrdiff_t stretches, ptrdiff_t n,
                                   const real *mean, ptrdiff_t K, double *g_sum, double *gx_sum, double *x_sum)
{
    if (n <= LANES)
        short_backward_sums(1, grad_y, x, stretches, n, mean, K, g_sum, gx_sum, x_sum);
    else if (n <= BACKWARD_VECTORS * LANES)
        short_backward_sums(0, grad_y, x, stretches, n, mean, K, g_sum, gx_sum, x_sum);
    else
        for (ptrdiff_t k = 0; k < stretches; k++, grad_y += n, x += n) {
            backward_wides wide;
            clear(&wide);
            add_long(grad_y, x, 0, n, mean[k / K], 0, 0, &wide);
            add_wides(&wide, g_sum + k, gx_sum + k, x_sum + k);
        }
}

/* The same for up to UNITS units of `planes` stretches each, with a mean each; units lie side by side, planes
 * `stride` apart, and the next are fetched if so wanted. */
SWEEP void plane_backward_sums(const element *grad_y, const element *x, ptrdiff_t planes, ptrdiff_t stride,
                               ptrdiff_t units, ptrdiff_t n, const real *mean, int fetching, double *g_sum,
                               double *gx_sum, double *x_sum)
{
    double found[3][UNITS] = {{0}};
    if (n * (ptrdiff_t)sizeof(real) > SHORT_PLANE) {
        backward_wides wide[UNITS];
        for (ptrdiff_t u = 0; u < units; u++)
            clear(wide + u);
        for (ptrdiff_t p = 0; p < planes; p++, grad_y += stride, x += stride)
            for (ptrdiff_t u = 0; u < units; u++)
                add_long(grad_y + u * n, x + u * n, 0, n, mean[u], fetching ? NEXT_PLANE(p) : 0, 0, wide + u);
        for (ptrdiff_t u = 0; u < units; u++)
            add_wides(wide + u, found[0] + u, found[1] + u, found[2] + u);
    } else {
        const ptrdiff_t some = BACKWARD_VECTORS / ((n + LANES - 1) / LANES);
        unit_sums sum;
        for (ptrdiff_t p = 0; p < planes; p++, grad_y += stride, x += stride) {
            if (p % some == 0)
                clear_units(&sum, units);
            for (ptrdiff_t u = 0; u < units; u++) {
                backward_vecs one = {sum.g[u], sum.gx[u], sum.x[u]};
                add_backward(grad_y + u * n, x + u * n, 0, n, mean[u], fetching ? NEXT_PLANE(p) : 0, 0, &one);
                sum.g[u] = one.g, sum.gx[u] = one.gx, sum.x[u] = one.x;
            }
            if (p % some == some - 1 || p == planes - 1)
                add_unit_sums(&sum, units, found[0], found[1], found[2]);
        }
    }
    for (ptrdiff_t u = 0; u < units; u++)
        g_sum[u] += found[0][u], gx_sum[u] += found[1][u], x_sum[u] += found[2][u];
}

/* ------------------------------------------------------- along a stretch: element by element */

SWEEP void add(const element *x, const element *residual, element *total, ptrdiff_t n)
{
    FOR_VECTORS(i, left, n, store(total + i, load(x + i, left, 0) + load(residual + i, left, 0), left);)
}

/* Runs BODY(1, what, streaming, other) with constants, so that there is a loop for each case. */
#define SPECIALIZE(streaming, other, BODY, what)                                        \
    {                                                                                   \
        if (streaming && other)                                                         \
            BODY(1, what, 1, 1);                                                        \
        else if (streaming)                                                             \
            BODY(1, what, 1, 0);                                                        \
        else if (other)                                                                 \
            BODY(1, what, 0, 1);                                                        \
        else                                                                            \
            BODY(1, what, 0, 0);                                                        \
    }

/* What makes y, or grad_x, of the elements of a plane. In vectors, or the compiler would fill some of them again in
 * every step. */
typedef struct {
    vec pivot, scale, shift;
    vec rstd, weight, b, c;
} plane_terms;

ALWAYS plane_terms forward_terms(const double *mean, const double *rstd, const real *weight, const real *bias)
{
    const double scale = weight ? *rstd * *weight : *rstd;
    const real pivot = *mean;
    plane_terms t = {{0}};
    t.pivot = splat(pivot), t.scale = splat(scale);
    t.shift = splat((bias ? *bias : 0) - (*mean - pivot) * scale);
    return t;
}

ALWAYS void affine_planes(const int direct, const int added, const int streaming, const int floored,
                          const element *x, const element *residual, element *y, ptrdiff_t planes, ptrdiff_t n,
                          ptrdiff_t K, const double *mean, const double *rstd, const real *weight, const real *bias,
                          int activation, seam *past, ptrdiff_t ahead)
{
#define TERMS(p, unit) forward_terms(mean + (unit), rstd + (unit), NTH(p, weight, 1), NTH(p, bias, 1))
#define NORMALIZED(t, i, left) \
    (prefetch(x + (i) + ahead), fused(load(x + (i), left, 0) - t.pivot, t.scale, t.shift))
#define SUM(t, i, left)                                                                 \
    (added ? (prefetch(residual + (i) + ahead), NORMALIZED(t, i, left) + load(residual + (i), left, 0)) \
           : NORMALIZED(t, i, left))
#define VALUE(t, i, left) (floored ? at_least(SUM(t, i, left), splat(0)) : SUM(t, i, left))
    if (direct) {
        WRITE_PLANES(y, planes, n, K, streaming, past, TERMS, VALUE)
    } else {
        WRITE_ACTIVATED_PLANES(y, planes, n, K, activation, past, TERMS, VALUE)
    }
#undef TERMS
#undef NORMALIZED
#undef SUM
#undef VALUE
}

/* y = activation((x - mean) * rstd * weight + bias + residual) for planes of n elements side by side, with a weight
 * and a bias each; K of them share a mean and rstd. What lies `ahead`, if not 0, is wanted next. */
EXACT_SWEEP void affine(const element *x, const element *residual, element *y, ptrdiff_t planes, ptrdiff_t n,
                        ptrdiff_t K, const double *mean, const double *rstd, const real *weight, const real *bias,
                        int activation, seam *past, ptrdiff_t ahead)
{
#define PLANES(direct, added, streaming, floored)                                       \
    affine_planes(direct, added, streaming, floored, x, residual, y, planes, n, K, mean, rstd, weight, bias, \
                  activation, past, ahead)
    if (activation > RELU || n < LANES)
        PLANES(0, residual != 0, 0, activation == RELU);
    else if (residual)
        SPECIALIZE(past, activation, PLANES, 1)
    else
        SPECIALIZE(past, activation, PLANES, 0)
#undef PLANES
}

/* (x - pivot) * scale + shift, then * w + b where there are weights and a bias. */
ALWAYS vec along(const int weighted, const int biased, vec x, vec pivot, vec scale, vec shift, vec w, vec b)
{
    const vec x_hat = fused(x - pivot, scale, shift);
    return weighted && biased ? fused(x_hat, w, b) : weighted ? x_hat * w : biased ? x_hat + b : x_hat;
}

/* Some rows side by side, which share the loads of what runs along them. */
ALWAYS void affine_rows_along(const int rows, const int weighted, const int biased, const element *x,
                              const real *weight, const real *bias, element *y, ptrdiff_t n, const real *pivot,
                              const real *scale, const real *shift, ptrdiff_t ahead)
{
    const ptrdiff_t head = head_of(y, n);
    vec first[PAIR], last[PAIR], p[PAIR], a[PAIR], s[PAIR];
    for (int k = 0; k < rows; k++)
        p[k] = splat(pivot[k]), a[k] = splat(scale[k]), s[k] = splat(shift[k]);
#define PARAMETERS(w, b, i, left)                                                       \
    const vec w = weighted ? load_real(weight + (i), left, 0) : splat(1);               \
    const vec b = biased ? load_real(bias + (i), left, 0) : splat(0);
#define VALUE(k, i, left, w, b)                                                         \
    (prefetch(x + (k) * n + (i) + ahead),                                               \
     along(weighted, biased, load(x + (k) * n + (i), left, 0), p[k], a[k], s[k], w, b))
    if (n < LANES) {
        PARAMETERS(w, b, 0, n)
        for (int k = 0; k < rows; k++)
            store(y + k * n, VALUE(k, 0, n, w, b), n);
        return;
    }
    {
        PARAMETERS(w, b, 0, LANES)
        PARAMETERS(last_w, last_b, n - LANES, LANES)
        for (int k = 0; k < rows; k++) {
            first[k] = head ? VALUE(k, 0, LANES, w, b) : splat(0);
            last[k] = VALUE(k, n - LANES, LANES, last_w, last_b);
        }
    }
    ptrdiff_t i = head;
    for (; i + 2 * LANES < n; i += 2 * LANES) {
        PARAMETERS(w, b, i, LANES)
        PARAMETERS(next_w, next_b, i + LANES, LANES)
        for (int k = 0; k < rows; k++) {
            const vec one = VALUE(k, i, LANES, w, b), two = VALUE(k, i + LANES, LANES, next_w, next_b);
            store_two(y + k * n + i, one, two);
        }
    }
    if (i + LANES < n) {
        PARAMETERS(w, b, i, LANES)
        for (int k = 0; k < rows; k++)
            store(y + k * n + i, VALUE(k, i, LANES, w, b), LANES);
    }
    for (int k = 0; k < rows; k++) {
        if (head)
            store(y + k * n, first[k], LANES);
        store(y + k * n + n - LANES, last[k], LANES);
    }
#undef PARAMETERS
#undef VALUE
}

/* The same for `rows` rows, with a pivot, a scale and a shift each, and weight and bias, of which the first row takes
 * the n from `begin` on, the others what follows, round and round the `length` there are:
 * y = activation(((x - pivot) * scale + shift) * weight + bias + residual). What lies `ahead`, 0 if nothing does, is
 * wanted next. Rows `far` from the caches are taken one by one: the hardware follows fewer streams better. */
SWEEP void affine_along(const element *x, const real *weight, const real *bias, const element *residual,
                        element *y, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t begin, ptrdiff_t length, const real *pivot,
                        const real *scale, const real *shift, int activation, int far, seam *past, ptrdiff_t ahead)
{
    const vec floor = floor_of(activation);
    /* Rows so short take longer on their way than they take to make: they are put together first. */
    const int together = n < (activation > RELU ? SCRATCH / 4 : residual || activation || past ? 2 * LANES : 0);
#define SCALED(i, left)                                                                 \
    along(1, 1, load(x + (i), left, 0), p, a, s, w ? load_real(w + (i), left, 0) : splat(1), \
          b ? load_real(b + (i), left, 0) : splat(0))
#define ADDED(i, left) at_least(SCALED(i, left) + (residual ? load(residual + (i), left, 0) : splat(0)), floor)
#define NEXT(VALUE, i, left) (prefetch(x + (i) + ahead), VALUE(i, left))
#define VALUE(i, left) NEXT(SCALED, i, left)
#define WITH_TAIL(i, left) NEXT(ADDED, i, left)
#define ROWS(rows)                                                                      \
    {                                                                                   \
        if (w && b)                                                                     \
            affine_rows_along(rows, 1, 1, x, w, b, y, n, pivot, scale, shift, ahead);   \
        else if (w)                                                                     \
            affine_rows_along(rows, 1, 0, x, w, b, y, n, pivot, scale, shift, ahead);   \
        else if (b)                                                                     \
            affine_rows_along(rows, 0, 1, x, w, b, y, n, pivot, scale, shift, ahead);   \
        else                                                                            \
            affine_rows_along(rows, 0, 0, x, w, b, y, n, pivot, scale, shift, ahead);   \
    }
    while (together && rows > 0) {
        real scratch[SCRATCH + LANES];
        const ptrdiff_t some = MIN(rows, SCRATCH / n);
        for (ptrdiff_t k = 0; k < some; k++, x += n, residual = NTH(1, residual, n)) {
            const vec p = splat(pivot[k]), a = splat(scale[k]), s = splat(shift[k]);
            const real *const w = NTH(1, weight, begin), *const b = NTH(1, bias, begin);
            FOR_VECTORS(i, left, n, store_real(scratch + k * n + i, ADDED(i, left), LANES);)
            begin = begin + n < length ? begin + n : 0;
        }
        activate(scratch, some * n, activation);
        deliver(scratch, y, some * n, past);
        y += some * n, rows -= some, pivot += some, scale += some, shift += some;
    }
    while (rows > 0) {
        const vec p = splat(*pivot), a = splat(*scale), s = splat(*shift);
        const real *const w = NTH(1, weight, begin), *const b = NTH(1, bias, begin);
        ptrdiff_t done = 1;
        if (residual || activation) {
            WRITE_ACTIVATED(y, n, activation, past, start, WITH_TAIL)
        } else if (past) {
            WRITE_PAST(y, n, past, VALUE)
        } else if (rows >= PAIR && n == length && !far) {
            ROWS(PAIR)
            done = PAIR;
        } else {
            ROWS(1)
        }
        x += done * n, y += done * n, rows -= done;
        pivot += done, scale += done, shift += done;
        residual = NTH(1, residual, done * n);
        begin = begin + n < length ? begin + n : 0;
    }
#undef SCALED
#undef ADDED
#undef NEXT
#undef VALUE
#undef WITH_TAIL
#undef ROWS
}

ALWAYS plane_terms backward_terms(const real *mean, const real *rstd, const real *b, const real *c, const real *weight)
{
    const real w = weight ? *weight : 1;
    plane_terms t = {{0}};
    t.rstd = splat(*rstd), t.weight = splat(w), t.scale = splat(*rstd * w);
    if (b)
        t.pivot = splat(*mean), t.b = splat(*b), t.c = splat(*c);
    return t;
}

ALWAYS void backward_planes(const int direct, const int through, const int streaming, const int fetching,
                            const element *grad_y, const element *x, element *grad_x, ptrdiff_t planes, ptrdiff_t n,
                            ptrdiff_t K, const real *mean, const real *rstd, const real *b, const real *c,
                            const real *weight, seam *past, ptrdiff_t ahead)
{
#define TERMS(p, unit)                                                                  \
    backward_terms(mean + (unit), rstd + (unit), NTH(unit, b, 1), NTH(unit, c, 1), NTH(p, weight, 1))
#define NEXT(p) (fetching ? prefetch((p) + ahead) : (void)0)
#define LINE(t, i, left) (NEXT(x + (i)), fused(load(x + (i), left, 0) - t.pivot, t.b, t.c))
#define VALUE(t, i, left)                                                               \
    (NEXT(grad_y + (i)), through ? t.rstd * (load(grad_y + (i), left, 0) * t.weight + LINE(t, i, left)) \
                                 : t.scale * load(grad_y + (i), left, 0))
    if (direct) {
        WRITE_PLANES(grad_x, planes, n, K, streaming, past, TERMS, VALUE)
    } else {
        WRITE_ACTIVATED_PLANES(grad_x, planes, n, K, 0, past, TERMS, VALUE)
    }
#undef TERMS
#undef NEXT
#undef LINE
#undef VALUE
}

/* grad_x = rstd * (grad_y * weight + b * (x - mean) + c) for planes of n elements side by side, with a weight each; K
 * of them share the rest. No x: statistics held constant, grad_x = rstd * grad_y * weight. What lies `ahead`, if not
 * 0, is wanted next. Where a unit is constant the terms cancel, and rstd is large: the product is rounded as in the
 * sums, before anything is added. */
EXACT_SWEEP void backward_affine(const element *grad_y, const element *x, element *grad_x, ptrdiff_t planes,
                                 ptrdiff_t n, ptrdiff_t K, const real *mean, const real *rstd, const real *b,
                                 const real *c, const real *weight, seam *past, ptrdiff_t ahead)
{
#define PLANES(direct, through, streaming, fetching)                                    \
    backward_planes(direct, through, streaming, fetching, grad_y, x, grad_x, planes, n, K, mean, rstd, b, c, weight, \
                    past, ahead)
    if (n < LANES)
        PLANES(0, x != 0, 0, 0);
    else if (x)
        SPECIALIZE(past, ahead, PLANES, 1)
    else
        SPECIALIZE(past, ahead, PLANES, 0)
#undef PLANES
}

/* Of a row, or whatever shares a statistic, from its three sums over 1 / inverse values:
 * grad_x = rstd * (grad_y * weight + b * (x - mean) + c), and x_hat = (x - mean) * rstd + s. The mean arrives rounded:
 * what was rounded away is the mean of what is left. */
typedef struct {
    double b, c, s;
} row_terms;

ALWAYS row_terms terms_of_row(double g, double gx, double x, double inverse, int centred, double rstd)
{
    const double rest = centred ? x * inverse : 0, b = -rstd * rstd * (gx - rest * g) * inverse;
    const row_terms t = {b, centred ? -g * inverse - b * rest : 0, -rest * rstd};
    return t;
}

/* The same for some rows with a weight running along, and grad_total added; grad_weight and grad_bias get the sums of
 * grad_y * x_hat and of grad_y. The rows after these are fetched if so wanted. `all` says that there is everything but a
 * grad_total. */
ALWAYS void backward_rows(const int rows, const int all, const int way, const int fetching, const element *grad_y,
                          const element *x, const real *weight, const element *grad_total, element *grad_x,
                          ptrdiff_t n, const real *mean, const real *rstd, const double *sums, double inverse,
                          real *grad_weight, real *grad_bias, seam *past)
{
    vec pivot[PAIR], r[PAIR], s[PAIR], b[PAIR], c[PAIR], first[PAIR], over[PAIR];
    phase p[PAIR];
    for (int k = 0; k < rows; k++, sums += 3) {
        if (way == JOINED)
            p[k] = phase_of(way, grad_x + k * n), first[k] = over[k] = splat(0);
        const row_terms t = terms_of_row(sums[0], sums[1], sums[2], inverse, mean != 0, rstd[k]);
        pivot[k] = splat(mean ? mean[k] : 0), r[k] = splat(rstd[k]);
        b[k] = splat(t.b), c[k] = splat(t.c), s[k] = splat(t.s);
    }
    FOR_VECTORS(i, left, n, {
        const vec w = all || weight ? load_real(weight + i, left, 0) : splat(1);
        vec weight_sum = {0}, bias_sum = {0};
        _Pragma("GCC unroll 2") /* or what is kept of each row would lie in memory */
        for (int k = 0; k < rows; k++) {
            const vec g = load(grad_y + k * n + i, left, 0), t = load(x + k * n + i, left, 0) - pivot[k];
            if (fetching)
                prefetch(x + (rows + k) * n + i), prefetch(grad_y + (rows + k) * n + i);
            if (all || grad_x) {
                vec out = r[k] * (g * w + fused(t, b[k], c[k]));
                if (!all && grad_total)
                    out += load(grad_total + k * n + i, left, 0);
                if (way != JOINED)
                    put(grad_x + k * n + i, out, left, way);
                else if (i == 0)
                    first[k] = over[k] = picked(out, p[k].order);
                else
                    over[k] = go_on(grad_x + k * n + i, picked(out, p[k].order), left, p[k], over[k]);
            }
            weight_sum = fused(g, fused(t, r[k], s[k]), weight_sum);
            bias_sum += g;
        }
        if (all || grad_weight) {
            store_real(grad_weight + i, load_real(grad_weight + i, left, 0) + weight_sum, left);
            store_real(grad_bias + i, load_real(grad_bias + i, left, 0) + bias_sum, left);
        }
    })
    for (int k = 0; way == JOINED && k < rows; k++) {
        begin_row(past, grad_x + k * n, first[k], LANES, p[k]);
        end_row(past, grad_x + k * n, n, p[k], over[k]);
    }
}

/* Up to PAIR rows of which the sums are known, over 1 / inverse values; no mean: not centred. What is not wanted, and
 * what there is not, is NULL; grad_weight and grad_bias together. */
EXACT_SWEEP void backward_affine_along(const element *grad_y, const element *x, const real *weight,
                                       const element *grad_total, element *grad_x, ptrdiff_t rows, ptrdiff_t n,
                                       const real *mean, const real *rstd, const double *sums, double inverse,
                                       real *grad_weight, real *grad_bias, seam *past, int fetching)
{
    const int all = weight && grad_x && grad_weight && !grad_total;
    const int way = n < LANES ? PLAIN : way_of(past, grad_x, n, n);
#define ROWS(all, rows, way, fetching)                                                  \
    backward_rows(rows, all, way, fetching, grad_y, x, weight, grad_total, grad_x, n, mean, rstd, sums, inverse, \
                  grad_weight, grad_bias, past)
#define BY_ANY_WAY(rows)                                                                \
    if (way == JOINED)                                                                  \
        ROWS(0, rows, JOINED, fetching);                                                \
    else                                                                                \
        ROWS(0, rows, way, fetching);
    if (rows == PAIR && all && way != JOINED) {
        SPECIALIZE(way, fetching, ROWS, PAIR)
    } else if (rows == PAIR && all) {
        ROWS(1, PAIR, JOINED, fetching);
    } else if (rows == PAIR) {
        BY_ANY_WAY(PAIR)
    } else {
        for (ptrdiff_t k = 0; k < rows; k++) {
            BY_ANY_WAY(1)
            grad_y += n, x += n, grad_total = NTH(1, grad_total, n), grad_x = NTH(1, grad_x, n);
            mean = NTH(1, mean, 1), rstd++, sums += 3;
        }
    }
#undef BY_ANY_WAY
#undef ROWS
}

/* Adds n reals to as many doubles, and leaves zeros. */
SWEEP void flush_reals(double *restrict wide, real *restrict sums, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        wide[i] += sums[i], sums[i] = 0;
}

/* --------------------------------------------------------------------------- rows in registers */

/* Whether as many rows of n values as fit are taken to a vector. */
ALWAYS int several_a_vector(ptrdiff_t n)
{
    return n > 1 && n <= MIN(8, LANES);
}

/* Whether eps is still something, and not infinite, as a real. */
ALWAYS int survives(double eps)
{
    return eps == 0 || (eps > 1e-37 && eps < 1e37);
}

/* y = (x - mean) * rstd * weight + bias for M rows of n elements, `vectors` vectors of which the last may be partly
 * filled. Of weight and bias, `length` long, the first row takes the n from `begin` on, the others what follows. */
ALWAYS void rows_in_registers(const int vectors, const int centred, const element *x, const real *weight,
                              const real *bias, element *y, ptrdiff_t M, ptrdiff_t n, ptrdiff_t begin,
                              ptrdiff_t length, double eps, real *mean, real *var, real *rstd, seam *past)
{
    const ptrdiff_t left = n - (vectors - 1) * LANES;
    const int way = way_of(past, y, n, n);
    const double inverse = 1.0 / n;
#define LEFT(v) ((v) < vectors - 1 ? LANES : left)
    for (ptrdiff_t m = 0; m < M; m++, x += n, y += n) {
        const real first = centred ? load_one(x) : 0;
        vec t[SHORT_VECTORS], sum = {0}, squares = {0};
        for (int v = 0; v < vectors; v++) {
            t[v] = load(x + v * LANES, LEFT(v), first);
            if (centred)
                sum += t[v] - first;
        }
        if (centred) {
            const double mu = first + lanes_sum(sum) * inverse;
            const real pivot = mu, rest = mu - pivot;
            for (int v = 0; v < vectors; v++)
                t[v] = difference(t[v], splat(pivot)) - rest;
            if (left < LANES)
                t[vectors - 1] = choose(first_mask(left), t[vectors - 1], splat(0));
            mean[m] = pivot;
        }
        for (int v = 0; v < vectors; v++)
            squares = fused(t[v], t[v], squares);
        const double variance = lanes_sum(squares) * inverse;
        const real scale = rstd[m] = 1 / sqrt(variance + eps);
        if (var)
            var[m] = variance;
        vec over = splat(0);
        const phase p = phase_of(way, y);
#pragma GCC unroll 8 /* or t would lie in memory */
        for (int v = 0; v < vectors; v++) {
            vec out = t[v] * scale;
            if (centred) {
                const ptrdiff_t i = begin + v * LANES;
                out = fused(out, weight ? load_real(weight + i, LEFT(v), 0) : splat(1),
                            bias ? load_real(bias + i, LEFT(v), 0) : splat(0));
            } else if (weight)
                out *= load_real(weight + v * LANES, LEFT(v), 0);
            over = put_on_way(way, past, y, v * LANES, out, LEFT(v), p, over);
        }
        if (way == JOINED)
            end_row(past, y, n, p, over);
        begin = begin + n < length ? begin + n : 0;
    }
#undef LEFT
}

/* Of every `width` lanes of v the sum, in each of them. */
ALWAYS vec sums_of_rows(vec v, const int width)
{
    for (int apart = 1; apart < width; apart *= 2)
        v += picked(v, lanes() ^ apart);
    return v;
}

/* y as of rows_in_registers for as many rows at once as fit into a vector, `width` lanes, a power of two, for each;
 * with one weight and one bias for all of them. `gaps` says that n is less. */
ALWAYS void rows_of_a_vector(const int width, const int gaps, const int centred, const element *x, const real *weight,
                             const real *bias, element *y, ptrdiff_t M, ptrdiff_t n, double eps, real *mean, real *var,
                             real *rstd, seam *past)
{
    const ptrdiff_t some = LANES / width;
    const int way = gaps ? PLAIN : way_of(past, y, LANES, LANES);
    const phase p = phase_of(way, y);
    const bits_vec column = lanes() & (width - 1), first_column = lanes() - column;
    const bits_vec each = lanes() * width & (int)(LANES - 1), filled = column < (int)n;
    bits_vec apart = lanes(), close = lanes();
    for (ptrdiff_t i = 0; gaps && i < LANES; i++)
        apart[i] = MIN(i / width * n + i % width, LANES - 1), close[i] = MIN(i / n * width + i % n, LANES - 1);
    const vec w = weight ? picked(load_real(weight, n, 0), column) : splat(1);
    const vec b = bias ? picked(load_real(bias, n, 0), column) : splat(0);
    const real inverse = (real)1 / n;
    real scratch[SCRATCH + LANES];
    ptrdiff_t waiting = 0;
    vec over = splat(0);
#define FILLED(v) (gaps ? choose(filled, v, splat(0)) : (v))
    for (ptrdiff_t m = 0; m < M; m += some) {
        const ptrdiff_t rows = MIN(some, M - m), left = rows * n;
        vec t = load(x + m * n, left, 0), mu = splat(0);
        t = gaps ? FILLED(picked(t, apart)) : t;
        if (centred) {
            const vec first = picked(t, first_column);
            const vec pivot = first + sums_of_rows(FILLED(t - first), width) * inverse;
            t = FILLED(t - pivot);
            const vec rest = sums_of_rows(t, width) * inverse;
            t = FILLED(t - rest), mu = pivot + rest;
            store_real(mean + m, picked(mu, each), rows);
        }
        const vec variance = sums_of_rows(t * t, width) * inverse, scale = 1 / roots(variance + (real)eps);
        store_real(rstd + m, picked(scale, each), rows);
        if (var)
            store_real(var + m, picked(variance, each), rows);
        const vec out = centred ? fused(t * scale, w, b) : t * scale * w;
        if (!gaps) {
            over = put_on_way(way, past, y, m * n, out, left, p, over);
            continue;
        }
        store_real(scratch + waiting, picked(out, close), LANES);
        waiting += left;
        if (waiting > SCRATCH - LANES || m + some >= M) {
            deliver(scratch, y, waiting, past);
            y += waiting, waiting = 0;
        }
    }
    if (way == JOINED)
        end_row(past, y, M * n, p, over);
#undef FILLED
}

#define SHORT_ROWS(centred)                                                             \
    if (several_a_vector(n) && n == length && survives(eps))                            \
        switch (n) {                                                                    \
            PACKED(2, 2, 0, centred) PACKED(3, 4, 1, centred) PACKED(4, 4, 0, centred)  \
            PACKED(5, 8, 1, centred) PACKED(6, 8, 1, centred) PACKED(7, 8, 1, centred)  \
            PACKED(8, 8, 0, centred)                                                    \
        }                                                                               \
    else                                                                                \
    switch ((n + LANES - 1) / LANES) {                                                  \
        CASE(1, centred) CASE(2, centred) CASE(3, centred) CASE(4, centred) MORE(centred) \
    }
#define PACKED(k, width, gaps, centred)                                                 \
    case k:                                                                             \
        rows_of_a_vector(width, gaps, centred, x, weight, bias, y, M, k, eps, mean, var, rstd, past); \
        break;
#define CASE(v, centred)                                                                \
    case v:                                                                             \
        rows_in_registers(v, centred, x, weight, bias, y, M, n, begin, length, eps, mean, var, rstd, past); \
        break;
#if SHORT_VECTORS > 4
#define MORE(centred) CASE(5, centred) CASE(6, centred) CASE(7, centred) CASE(8, centred)
#else
#define MORE(centred)
#endif

/* For rows of at most SHORT_VECTORS vectors either of the two. No mean: not centred, y = x * rstd * weight, with one
 * weight for all rows. */
EXACT_SWEEP void normalize_short(const element *x, const real *weight, const real *bias, element *y, ptrdiff_t M,
                                 ptrdiff_t n, ptrdiff_t begin, ptrdiff_t length, double eps, real *mean, real *var,
                                 real *rstd, seam *past)
{
    if (mean) {
        SHORT_ROWS(1)
    } else {
        SHORT_ROWS(0)
    }
}
#undef SHORT_ROWS
#undef PACKED
#undef CASE
#undef MORE

/* The gradients of M rows, each `period` rows after the one before and with a weight, or none, that runs along it;
 * grad_weight and grad_bias, (n,), are added to, or NULL together. */
ALWAYS void backward_in_registers(const int vectors, const element *grad_y, const element *x, const real *weight,
                                  const element *grad_total, element *grad_x, ptrdiff_t M, ptrdiff_t n,
                                  ptrdiff_t period, const real *mean, const real *rstd, double *grad_weight,
                                  double *grad_bias, seam *past)
{
    const ptrdiff_t left = n - (vectors - 1) * LANES;
    /* The lines that rows apart share with others are stored in parts: plainly. */
    const int way = period == 1 || n % LANES == 0 ? way_of(past, grad_x, period * n, n) : PLAIN;
    const double inverse = 1.0 / n;
    vec w[BACKWARD_SHORT], weight_sum[BACKWARD_SHORT], bias_sum[BACKWARD_SHORT];
#define LEFT(v) ((v) < vectors - 1 ? LANES : left)
    for (int v = 0; v < vectors; v++) {
        w[v] = weight ? load_real(weight + v * LANES, LEFT(v), 0) : splat(1);
        weight_sum[v] = bias_sum[v] = splat(0);
    }
    for (ptrdiff_t m = 0; m < M; m++, grad_y += period * n, x += period * n) {
        const real pivot = mean ? mean[m * period] : 0, r = rstd[m * period];
        const ptrdiff_t here = m * period * n;
        vec t[BACKWARD_SHORT], g[BACKWARD_SHORT], g_sum = {0}, gx_sum = {0}, x_sum = {0};
        for (int v = 0; v < vectors; v++) {
            t[v] = load(x + v * LANES, LEFT(v), pivot) - pivot;
            g[v] = load(grad_y + v * LANES, LEFT(v), 0);
            g_sum += g[v] * w[v], gx_sum += g[v] * w[v] * t[v], x_sum += t[v];
        }
        const row_terms terms =
            terms_of_row(lanes_sum(g_sum), lanes_sum(gx_sum), mean ? lanes_sum(x_sum) : 0, inverse, mean != 0, r);
        const real b = terms.b, c = terms.c, s = terms.s;
        vec over = splat(0);
        const phase p = phase_of(way, grad_x + here);
        for (int v = 0; v < vectors; v++) {
            if (grad_x) {
                vec out = r * (g[v] * w[v] + fused(t[v], splat(b), splat(c)));
                if (grad_total)
                    out += load(grad_total + here + v * LANES, LEFT(v), 0);
                over = put_on_way(way, past, grad_x + here, v * LANES, out, LEFT(v), p, over);
            }
            weight_sum[v] = fused(g[v], fused(t[v], splat(r), splat(s)), weight_sum[v]);
            bias_sum[v] += g[v];
        }
        if (way == JOINED)
            end_row(past, grad_x + here, n, p, over);
        if (grad_weight && (m % BACKWARD_ROWS == BACKWARD_ROWS - 1 || m == M - 1))
            for (int v = 0; v < vectors; v++) {
                add_to_sums(grad_weight + v * LANES, weight_sum[v], LEFT(v));
                add_to_sums(grad_bias + v * LANES, bias_sum[v], LEFT(v));
                weight_sum[v] = bias_sum[v] = splat(0);
            }
    }
#undef LEFT
}

EXACT_SWEEP void backward_short(const element *grad_y, const element *x, const real *weight,
                                const element *grad_total, element *grad_x, ptrdiff_t M, ptrdiff_t n,
                                ptrdiff_t period, const real *mean, const real *rstd, double *grad_weight,
                                double *grad_bias, seam *past)
{
#if BACKWARD_SHORT > 6
#define MORE CASE(7) CASE(8)
#else
#define MORE
#endif
#define CASE(v)                                                                         \
    case v:                                                                             \
        backward_in_registers(v, grad_y, x, weight, grad_total, grad_x, M, n, period, mean, rstd, grad_weight, \
                              grad_bias, past);                                         \
        break;
    switch ((n + LANES - 1) / LANES) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) MORE
    }
#undef CASE
#undef MORE
}

/* ------------------------------------------------------------- down a strip of columns: sums */

/* Takes the columns of a strip COLUMN_VECTORS vectors at a time, then one by one. */
#define FOR_COLUMNS(j, vectors, left, width, ...)                                       \
    {                                                                                   \
        ptrdiff_t j = 0;                                                                \
        for (; j + COLUMN_VECTORS * LANES <= (width); j += COLUMN_VECTORS * LANES) {    \
            const int vectors = COLUMN_VECTORS;                                         \
            const ptrdiff_t left = LANES;                                               \
            __VA_ARGS__                                                                 \
        }                                                                               \
        for (; j + LANES <= (width); j += LANES) {                                      \
            const int vectors = 1;                                                      \
            const ptrdiff_t left = LANES;                                               \
            __VA_ARGS__                                                                 \
        }                                                                               \
        if (j < (width)) {                                                              \
            const int vectors = 1;                                                      \
            const ptrdiff_t left = (width) - j;                                         \
            __VA_ARGS__                                                                 \
        }                                                                               \
    }

/* Merges what the sums of `rows` rows say of n columns with the moments of the `above` rows above them. */
ALWAYS void merge_rows(const real *pivot, const real *sum, const real *squares, ptrdiff_t rows, ptrdiff_t n,
                       double above, double *mean, double *m2)
{
    const double all = above + rows, share = rows / all, weight = above * rows / all, inverse = 1.0 / rows;
    for (ptrdiff_t k = 0; k < n; k++) {
        const double rest = sum[k] * inverse, block_mean = pivot[k] + rest;
        const double block_m2 = squares[k] - rest * sum[k];
        if (above == 0) {
            mean[k] = block_mean, m2[k] = block_m2;
        } else {
            const double delta = block_mean - mean[k];
            mean[k] += delta * share;
            m2[k] += block_m2 + delta * delta * weight;
        }
    }
}

/* Merges the moments of some rows with those of the `above` rows above them; see stretch_moments. */
ALWAYS void vectors_moments(const int vectors, const ptrdiff_t left, const element *x, ptrdiff_t rows,
                            ptrdiff_t stride, double above, double *mean, double *m2)
{
    vec pivot[COLUMN_VECTORS], sum[COLUMN_VECTORS], squares[COLUMN_VECTORS];
    for (int v = 0; v < vectors; v++) {
        sum[v] = squares[v] = splat(0);
        if (above == 0) {
            pivot[v] = load(x + v * LANES, left, 0);
        } else {
            real rounded_mean[LANES];
            for (ptrdiff_t k = 0; k < left; k++)
                rounded_mean[k] = mean[v * LANES + k];
            pivot[v] = load_real(rounded_mean, left, 0);
        }
    }
    if (above == 0) {
        const ptrdiff_t some = MIN(rows, ROUGH_ROWS);
        for (ptrdiff_t r = 1; r < some; r++)
            for (int v = 0; v < vectors; v++)
                sum[v] += difference(load(x + r * stride + v * LANES, left, 0), pivot[v]);
        for (int v = 0; v < vectors; v++)
            pivot[v] += sum[v] / (real)some, sum[v] = splat(0);
    }
    for (ptrdiff_t r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const vec t = load(x + r * stride + v * LANES, left, 0) - pivot[v];
            sum[v] += t, squares[v] += t * t;
        }
    for (int v = 0; v < vectors; v++)
        merge_rows((const real *)(pivot + v), (const real *)(sum + v), (const real *)(squares + v), rows, left,
                   above, mean + v * LANES, m2 + v * LANES);
}

/* Adds what a few rows hold to the sums of n columns; what lies `ahead`, 0 if nothing does, is wanted next. */
ALWAYS void add_rows(const int together, const element *x, ptrdiff_t stride, ptrdiff_t n, const real *pivot,
                     real *sum, real *squares, ptrdiff_t ahead)
{
    FOR_VECTORS(j, left, n, {
        const vec p = load_real(pivot + j, left, 0);
        vec s = {0}, q = {0};
        for (int k = 0; k < together; k++) {
            prefetch(x + k * stride + j + ahead);
            add_one(load(x + k * stride + j, left, 0) - p, &s, &q);
        }
        store_real(sum + j, load_real(sum + j, left, 0) + s, left);
        store_real(squares + j, load_real(squares + j, left, 0) + q, left);
    })
}

/* How far away the rows lie that come after those taken TOGETHER, of the `left` ones from these on. */
#define NEXT_ROWS(left) (2 * TOGETHER <= (left) ? TOGETHER * stride : 0)

/* Whether rows of n elements are taken one by one: from memory that is how the hardware foresees them, where they
 * lie side by side. Elsewhere it foresees no steps from row to row, and TOGETHER they take fewer loads of sums. */
#define ONE_BY_ONE(far, stride, n) (far && (stride) == (n))

/* As vectors_moments for up to SEGMENT columns, along the rows, `far` where they are not in the caches. Below these rows
 * come `below` more. */
ALWAYS void segment_moments(const element *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t n, double above,
                            ptrdiff_t below, int far, double *mean, double *m2)
{
    segment_reals pivot, sum, squares;
    const ptrdiff_t some = MIN(rows, ROUGH_ROWS);
    for (ptrdiff_t k = 0; k < n; k++)
        sum[k] = squares[k] = 0, pivot[k] = above == 0 ? 0 : mean[k];
    if (above == 0) {
        FOR_VECTORS(j, left, n, {
            const vec first = load(x + j, left, 0);
            vec total = {0};
            for (ptrdiff_t r = 1; r < some; r++)
                total += difference(load(x + r * stride + j, left, 0), first);
            store_real(pivot + j, first + total / (real)some, left);
        })
    }
    ptrdiff_t r = 0;
    for (; !ONE_BY_ONE(far, stride, n) && r + TOGETHER <= rows; r += TOGETHER)
        add_rows(TOGETHER, x + r * stride, stride, n, pivot, sum, squares, NEXT_ROWS(rows + below - r));
    for (; r < rows; r++)
        add_rows(1, x + r * stride, stride, n, pivot, sum, squares, 0);
    merge_rows(pivot, sum, squares, rows, n, above, mean, m2);
}

/* Whether strips are taken a few vectors at a time, straight down, with sums in registers. */
ALWAYS int straight(ptrdiff_t rows, ptrdiff_t width, int far)
{
    return rows <= 2 * TOGETHER || width <= (far ? COLUMN_VECTORS : STRAIGHT_VECTORS) * LANES;
}

/* Mean and m2 of every column of a strip, `far` where it is not in the caches. */
SWEEP void column_moments(const element *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t width, int far, double *mean,
                          double *m2)
{
    for (ptrdiff_t start = 0; start < rows; start += COLUMN_ROWS, x += COLUMN_ROWS * stride) {
        const ptrdiff_t count = MIN(COLUMN_ROWS, rows - start);
        if (straight(rows, width, far)) {
            FOR_COLUMNS(j, vectors, left, width,
                        vectors_moments(vectors, left, x + j, count, stride, start, mean + j, m2 + j);)
        } else {
            for (ptrdiff_t j = 0; j < width; j += SEGMENT)
                segment_moments(x + j, count, stride, MIN(SEGMENT, width - j), start, rows - start - count, far,
                                mean + j, m2 + j);
        }
    }
}

ALWAYS void vectors_squares(const int vectors, const ptrdiff_t left, const element *x, ptrdiff_t rows,
                            ptrdiff_t stride, double *squares)
{
    vec sum[COLUMN_VECTORS];
    for (int v = 0; v < vectors; v++)
        sum[v] = splat(0);
    for (ptrdiff_t r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const vec t = load(x + r * stride + v * LANES, left, 0);
            sum[v] += t * t;
        }
    for (int v = 0; v < vectors; v++)
        add_to_sums(squares + v * LANES, sum[v], left);
}

/* Adds the sum of squares of every column of a strip. */
SWEEP void column_squares(const element *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t width, double *squares)
{
    for (ptrdiff_t start = 0; start < rows; start += COLUMN_ROWS, x += COLUMN_ROWS * stride) {
        const ptrdiff_t count = MIN(COLUMN_ROWS, rows - start);
        FOR_COLUMNS(j, vectors, left, width,
                    vectors_squares(vectors, left, x + j, count, stride, squares + j);)
    }
}

ALWAYS void vectors_backward_sums(const int vectors, const ptrdiff_t left, const element *grad_y,
                                  const element *x, const real *weight, ptrdiff_t rows, ptrdiff_t stride,
                                  ptrdiff_t ahead, const real *mean, double *g_sum, double *gx_sum,
                                  double *x_sum)
{
    vec m[COLUMN_VECTORS], a[COLUMN_VECTORS], b[COLUMN_VECTORS], c[COLUMN_VECTORS];
    for (int v = 0; v < vectors; v++) {
        m[v] = load_real(mean + v * LANES, left, 0);
        a[v] = b[v] = c[v] = splat(0);
    }
    for (ptrdiff_t r = 0; r < rows; r++) {
        const real w = weight ? weight[r] : 1;
        for (int v = 0; v < vectors; v++) {
            const ptrdiff_t i = r * stride + v * LANES;
            prefetch(x + i + ahead), prefetch(grad_y + i + ahead);
            const vec t = load(x + i, left, 0) - m[v], g = load(grad_y + i, left, 0) * w;
            a[v] += g, b[v] += g * t, c[v] += t;
        }
    }
    for (int v = 0; v < vectors; v++) {
        add_to_sums(g_sum + v * LANES, a[v], left);
        add_to_sums(gx_sum + v * LANES, b[v], left);
        if (x_sum)
            add_to_sums(x_sum + v * LANES, c[v], left);
    }
}

/* How far away the columns lie that are summed next: to the right, or the first ones of the `count` rows below. What
 * is taken in one go lies in the order of memory, which the hardware foresees. */
#define NEXT_COLUMNS(j, vectors, count)                                                 \
    ((j) + (vectors) * LANES < width          ? (vectors) * LANES                       \
     : (j) > 0 && start + 2 * (count) <= rows ? (count) * stride - (j)                  \
                                              : 0)

/* Adds what a few rows hold to the sums of n columns; see add_rows. */
ALWAYS void add_backward_rows(const int together, const int centred, const element *grad_y, const element *x,
                              const real *weight, ptrdiff_t stride, ptrdiff_t n, const real *mean, real *g_sum,
                              real *gx_sum, real *x_sum, ptrdiff_t ahead)
{
    FOR_VECTORS(j, left, n, {
        const vec m = load_real(mean + j, left, 0);
        vec a = {0}, b = {0}, c = {0};
        for (int k = 0; k < together; k++) {
            const ptrdiff_t i = k * stride + j;
            prefetch(x + i + ahead), prefetch(grad_y + i + ahead);
            const vec t = load(x + i, left, 0) - m;
            const vec g = load(grad_y + i, left, 0) * (weight ? weight[k] : (real)1);
            a += g, b += g * t, c += t;
        }
        store_real(g_sum + j, load_real(g_sum + j, left, 0) + a, left);
        store_real(gx_sum + j, load_real(gx_sum + j, left, 0) + b, left);
        if (centred)
            store_real(x_sum + j, load_real(x_sum + j, left, 0) + c, left);
    })
}

/* As vectors_backward_sums for up to SEGMENT columns, along the rows. */
ALWAYS void segment_backward_sums(const int centred, const element *grad_y, const element *x, const real *weight,
                                  ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t below,
                                  int far, const real *mean, double *g_sum, double *gx_sum, double *x_sum)
{
    segment_reals a, b, c;
    ptrdiff_t r = 0;
    for (ptrdiff_t k = 0; k < n; k++)
        a[k] = b[k] = c[k] = 0;
#define ADD(together, ahead)                                                            \
    add_backward_rows(together, centred, grad_y + r * stride, x + r * stride, NTH(1, weight, r), \
                      stride, n, mean, a, b, c, ahead)
    for (; !ONE_BY_ONE(far, stride, n) && r + TOGETHER <= rows; r += TOGETHER)
        ADD(TOGETHER, NEXT_ROWS(rows + below - r));
    for (; r < rows; r++)
        ADD(1, 0);
#undef ADD
    for (ptrdiff_t k = 0; k < n; k++)
        g_sum[k] += a[k], gx_sum[k] += b[k];
    for (ptrdiff_t k = 0; centred && k < n; k++)
        x_sum[k] += c[k];
}

/* Adds, for every column, the sums of g, g * (x - mean) and, unless x_sum is NULL, x - mean, where
 * g = grad_y * weight and the weight, if there is one, belongs to the row. */
SWEEP void column_backward_sums(const element *grad_y, const element *x, const real *weight, ptrdiff_t rows,
                                ptrdiff_t stride, ptrdiff_t width, int far, const real *mean, double *g_sum,
                                double *gx_sum, double *x_sum)
{
    for (ptrdiff_t start = 0; start < rows; start += BACKWARD_ROWS) {
        const ptrdiff_t count = MIN(BACKWARD_ROWS, rows - start), here = start * stride;
        const real *weights = NTH(1, weight, start);
        if (straight(rows, width, far)) {
            FOR_COLUMNS(j, vectors, left, width,
                        vectors_backward_sums(vectors, left, grad_y + here + j, x + here + j, weights, count, stride,
                                              NEXT_COLUMNS(j, vectors, count), mean + j, g_sum + j, gx_sum + j,
                                              NTH(1, x_sum, j));)
        } else {
#define SEGMENTS(centred)                                                               \
    for (ptrdiff_t j = 0; j < width; j += SEGMENT)                                      \
        segment_backward_sums(centred, grad_y + here + j, x + here + j, weights, count, stride, \
                              MIN(SEGMENT, width - j), rows - start - count, far, mean + j, g_sum + j, \
                              gx_sum + j, x_sum + j)
            if (x_sum) {
                SEGMENTS(1);
            } else {
                SEGMENTS(0);
            }
#undef SEGMENTS
        }
    }
}

ALWAYS void set_groups(const ptrdiff_t K, const double *restrict mean, const double *restrict rstd,
                       const real *restrict weight, const real *restrict bias, ptrdiff_t groups,
                       real *restrict pivot, real *restrict scale, real *restrict shift)
{
    for (ptrdiff_t g = 0; g < groups; g++) {
        const double mu = mean[g], r = rstd[g];
        const real p = mu;
        for (ptrdiff_t i = g * K; i < (g + 1) * K; i++) {
            const double a = r * (weight ? weight[i] : (real)1);
            pivot[i] = p, scale[i] = a;
            shift[i] = (bias ? bias[i] : (real)0) + (p - mu) * a;
        }
    }
}

/* pivot, scale and shift of a transform for some groups of K channels; weight and bias may be NULL. */
SWEEP void set_columns(ptrdiff_t K, const double *mean, const double *rstd, const real *weight, const real *bias,
                       ptrdiff_t groups, real *pivot, real *scale, real *shift)
{
    if (K == 1)
        set_groups(1, mean, rstd, weight, bias, groups, pivot, scale, shift);
    else
        set_groups(K, mean, rstd, weight, bias, groups, pivot, scale, shift);
}

/* shift, b and c of backward_strip, from the sums of column_backward_sums. */
EXACT_SWEEP void finish_backward(const double *g_sum, const double *gx_sum, const double *x_sum, ptrdiff_t n,
                                 ptrdiff_t rows, const real *rstd, int centred, real *restrict shift,
                                 real *restrict b, real *restrict c)
{
    const double inverse = 1.0 / rows;
    for (ptrdiff_t i = 0; i < n; i++) {
        const row_terms t = terms_of_row(g_sum[i], gx_sum[i], x_sum[i], inverse, centred, rstd[i]);
        shift[i] = t.s, b[i] = t.b, c[i] = t.c;
    }
}

ALWAYS void combine_groups(const ptrdiff_t K, const int through, ptrdiff_t groups, const double *restrict g,
                           const double *restrict gx, const double *restrict x, const real *restrict weight,
                           double n, const real *restrict rstd, double *restrict grad_weight,
                           double *restrict grad_bias, real *restrict b, real *restrict c)
{
    const double inverse = 1 / n;
    for (ptrdiff_t i = 0; i < groups; i++) {
        double g_sum = 0, gx_sum = 0, x_sum = 0;
        for (ptrdiff_t k = i * K; k < (i + 1) * K; k++) {
            const double w = weight ? weight[k] : 1;
            g_sum += w * g[k], gx_sum += w * gx[k], x_sum += through ? x[k] : 0;
        }
        const row_terms t = terms_of_row(g_sum, gx_sum, x_sum, inverse, through, rstd[i]);
        if (grad_weight)
            for (ptrdiff_t k = i * K; k < (i + 1) * K; k++)
                grad_weight[k] += rstd[i] * gx[k] + t.s * g[k], grad_bias[k] += g[k];
        b[i] = t.b, c[i] = t.c;
    }
}

/* The b and c of backward_affine for `groups` groups of K channels, statistics over n values, from the sums of
 * the channels; adds to the gradients of the parameters, unless NULL. */
EXACT_SWEEP void combine_channels(ptrdiff_t K, ptrdiff_t groups, const double *g, const double *gx, const double *x,
                                  const real *weight, double n, int through, const real *rstd, double *grad_weight,
                                  double *grad_bias, real *b, real *c)
{
#define GROUPS(K, through)                                                              \
    combine_groups(K, through, groups, g, gx, x, weight, n, rstd, grad_weight, grad_bias, b, c)
    if (K == 1 && through)
        GROUPS(1, 1);
    else if (through)
        GROUPS(K, 1);
    else if (K == 1)
        GROUPS(1, 0);
    else
        GROUPS(K, 0);
#undef GROUPS
}

/* ------------------------------------------------------------------- groups of few rows, at once */

/* Groups of K channels in at most NARROW_ROWS rows, G of them side by side: as many as fit into a vector together, each
 * lane with the sums of its group; larger ones by themselves. What is read twice stays in L1. */

/* Whether groups end and begin where vectors do that are aligned. */
ALWAYS int in_vectors(const element *y, ptrdiff_t stride, ptrdiff_t K)
{
    return rows_aligned(y, stride) && (LANES % K == 0 || K % LANES == 0);
}

/* Statistics of groups of at most LANES channels, and y or, without one, the terms of set_columns for it. */
EXACT_SWEEP void normalize_groups(const element *x, element *y, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t K,
                                  ptrdiff_t G, double eps, const real *weight, const real *bias, seam *past,
                                  real *mean, real *var, real *rstd, real *pivot, real *scale, real *shift)
{
    const int streaming = past && in_vectors(y, stride, K);
    const ptrdiff_t some = LANES / K, rough = MIN(rows, ROUGH_ROWS);
    const real inverse = (real)1 / (rows * K), rough_inverse = (real)1 / (rough * K);
    const bits_vec group = parts_of_lanes(0, K), first = group * (lane_bits)K, each = lanes() * (lane_bits)K;
    for (ptrdiff_t g = 0; g < G; g += some) {
        const ptrdiff_t j = g * K, count = MIN(some, G - g), left = count * K;
        vec p = picked(load(x + j, left, 0), first), guess = {0}, total = {0};
        vec sum = {0}, squares = {0}, s = {0}, q = {0};
        for (ptrdiff_t n = 0; n < rough; n++)
            guess += difference(load(x + j + n * stride, left, 0), p);
        for (ptrdiff_t k = 0; k < K; k++)
            total += picked(guess, first + (lane_bits)k);
        p += total * rough_inverse;
        for (ptrdiff_t n = 0; n < rows;) {
            const ptrdiff_t end = MIN(rows, n + BACKWARD_ROWS);
            vec a = {0}, b = {0};
            for (; n < end; n++) {
                const vec t = load(x + j + n * stride, left, 0) - p;
                a += t, b = fused(t, t, b);
            }
            sum += a, squares += b;
        }
        for (ptrdiff_t k = 0; k < K; k++) {
            const bits_vec kth = first + (lane_bits)k;
            s += picked(sum, kth), q += picked(squares, kth);
        }
        const vec rest = s * inverse, v = at_least((q - rest * s) * inverse, splat(0)), r = 1 / roots(v + (real)eps);
        store_real(mean + g, picked(p + rest, each), count);
        if (var)
            store_real(var + g, picked(v, each), count);
        if (rstd)
            store_real(rstd + g, picked(r, each), count);
        const vec a = weight ? r * load_real(weight + j, left, 0) : r;
        const vec b = (bias ? load_real(bias + j, left, 0) : splat(0)) - rest * a;
        if (!y)
            store_real(pivot + j, p, left), store_real(scale + j, a, left), store_real(shift + j, b, left);
        for (ptrdiff_t n = 0, i = j; y && n < rows; n++, i += stride)
            put(y + i, fused(load(x + i, left, 0) - p, a, b), left, streaming);
    }
}

/* The sums down `left` columns that gradients are made of. */
ALWAYS backward_vecs columns_sums(const element *grad_y, const element *x, ptrdiff_t rows, ptrdiff_t stride,
                                  ptrdiff_t left, real fill, vec mean)
{
    backward_vecs sum = {{0}, {0}, {0}};
    for (ptrdiff_t n = 0; n < rows;) {
        const ptrdiff_t end = MIN(rows, n + BACKWARD_ROWS);
        vec a = {0}, b = {0}, c = {0};
        for (; n < end; n++) {
            const vec t = load(x + n * stride, left, fill) - mean, g = load(grad_y + n * stride, left, 0);
            a += g, b = fused(g, t, b), c += t;
        }
        sum.g += a, sum.gx += b, sum.x += c;
    }
    return sum;
}

/* grad_x, unless NULL, of `left` columns, and what they add to the gradients of the parameters, unless NULL: from the
 * terms of their groups and their own sums. */
ALWAYS void differentiate_columns(const element *grad_y, const element *x, element *grad_x, ptrdiff_t rows,
                                  ptrdiff_t stride, ptrdiff_t left, vec mean, vec r, vec w, vec b, vec c, vec s,
                                  vec g, vec gx, int streaming, double *grad_weight, double *grad_bias)
{
    if (grad_weight)
        add_to_sums(grad_weight, r * gx + s * g, left), add_to_sums(grad_bias, g, left);
    for (ptrdiff_t n = 0, i = 0; grad_x && n < rows; n++, i += stride) {
        const vec t = load(x + i, left, 0) - mean, y = load(grad_y + i, left, 0);
        put(grad_x + i, r * (w * y + fused(t, b, c)), left, streaming);
    }
}

ALWAYS void backward_together(const element *grad_y, const element *x, element *grad_x, ptrdiff_t rows,
                              ptrdiff_t stride, ptrdiff_t K, ptrdiff_t G, const real *weight, const real *mean,
                              const real *rstd, int streaming, double *grad_weight, double *grad_bias)
{
    const ptrdiff_t some = LANES / K;
    const real inverse = (real)1 / (rows * K);
    const bits_vec group = parts_of_lanes(0, K), first = group * (lane_bits)K;
    for (ptrdiff_t i = 0; i < G; i += some) {
        const ptrdiff_t j = i * K, count = MIN(some, G - i), left = count * K;
        const vec m = picked(load_real(mean + i, count, 0), group), r = picked(load_real(rstd + i, count, 0), group);
        const vec w = weight ? load_real(weight + j, left, 0) : splat(1);
        const backward_vecs sum = columns_sums(grad_y + j, x + j, rows, stride, left, 0, m);
        const vec wg = w * sum.g, wgx = w * sum.gx;
        vec g_sum = {0}, gx_sum = {0}, x_sum = {0};
        for (ptrdiff_t k = 0; k < K; k++) {
            const bits_vec kth = first + (lane_bits)k;
            g_sum += picked(wg, kth), gx_sum += picked(wgx, kth), x_sum += picked(sum.x, kth);
        }
        /* As in terms_of_row. */
        const vec rest = x_sum * inverse, b = -r * (r * (gx_sum - rest * g_sum) * inverse);
        const vec c = -g_sum * inverse - b * rest;
        differentiate_columns(grad_y + j, x + j, NTH(1, grad_x, j), rows, stride, left, m, r, w, b, c, -rest * r, sum.g,
                              sum.gx, streaming, NTH(1, grad_weight, j), NTH(1, grad_bias, j));
    }
}

ALWAYS void backward_one(const element *grad_y, const element *x, element *grad_x, ptrdiff_t rows, ptrdiff_t stride,
                         ptrdiff_t K, const real *weight, real mean, real rstd, int streaming, double *grad_weight,
                         double *grad_bias)
{
    const vec m = splat(mean), r = splat(rstd);
    real g[FEW_CHANNELS], gx[FEW_CHANNELS];
    double g_sum = 0, gx_sum = 0, x_sum = 0;
    ptrdiff_t added = 0;
    backward_vecs all = {{0}, {0}, {0}};
    backward_wides wide;
    clear(&wide);
    FOR_VECTORS(j, left, K, {
        const backward_vecs sum = columns_sums(grad_y + j, x + j, rows, stride, left, mean, m);
        const vec w = weight ? load_real(weight + j, left, 0) : splat(1);
        store_real(g + j, sum.g, left), store_real(gx + j, sum.gx, left);
        all.g += w * sum.g, all.gx += w * sum.gx, all.x += sum.x;
        if ((added += rows) >= BACKWARD_VECTORS)
            flush(&wide, &all), added = 0;
    })
    flush(&wide, &all);
    add_wides(&wide, &g_sum, &gx_sum, &x_sum);
    const row_terms t = terms_of_row(g_sum, gx_sum, x_sum, 1.0 / (rows * K), 1, rstd);
    const vec b = splat(t.b), c = splat(t.c), s = splat(t.s);
    FOR_VECTORS(j, left, K, {
        differentiate_columns(grad_y + j, x + j, NTH(1, grad_x, j), rows, stride, left, m, r,
                              weight ? load_real(weight + j, left, 0) : splat(1), b, c, s, load_real(g + j, left, 0),
                              load_real(gx + j, left, 0), streaming, NTH(1, grad_weight, j), NTH(1, grad_bias, j));
    })
}

/* The gradients: grad_x, unless NULL; those of the parameters, unless NULL, are added to. K is at most FEW_CHANNELS. */
EXACT_SWEEP void backward_groups(const element *grad_y, const element *x, element *grad_x, ptrdiff_t rows,
                                 ptrdiff_t stride, ptrdiff_t K, ptrdiff_t G, const real *weight, const real *mean,
                                 const real *rstd, seam *past, double *grad_weight, double *grad_bias)
{
    const int streaming = past && in_vectors(grad_x, stride, K);
    if (K <= LANES) {
        backward_together(grad_y, x, grad_x, rows, stride, K, G, weight, mean, rstd, streaming, grad_weight, grad_bias);
        return;
    }
    for (ptrdiff_t g = 0, j = 0; g < G; g++, j += K)
        backward_one(grad_y + j, x + j, NTH(1, grad_x, j), rows, stride, K, NTH(1, weight, j), mean[g], rstd[g],
                     streaming, NTH(1, grad_weight, j), NTH(1, grad_bias, j));
}

/* --------------------------------------------------------- the rows of a strip: element by element */

/* Rows are taken TOGETHER, column by column, where they lie close or in the cache, or not side by side: one after
 * the other is how the prefetchers of the hardware follow them best, but with gaps they do not. */
#define CLOSE_BYTES 1024

/* The `rows` rows of a sweep, `stride` apart and `width` wide: PREPARE(j, left), then AT(i, left) for element i of
 * column j in each row. */
#define FOR_BLOCK(PREPARE, AT)                                                          \
    {                                                                                   \
        const int close = cached || stride != width                                     \
                          || TOGETHER * stride * (ptrdiff_t)sizeof(element) <= CLOSE_BYTES; \
        ptrdiff_t row = 0;                                                              \
        for (; close && row + TOGETHER <= rows; row += TOGETHER)                        \
            FOR_VECTORS(j, left, width, PREPARE(j, left)                                \
                AT(row * stride + j, left)                                              \
                AT((row + 1) * stride + j, left)                                        \
                AT((row + 2) * stride + j, left)                                        \
                AT((row + 3) * stride + j, left))                                       \
        for (; row < rows; row++)                                                       \
            FOR_VECTORS(j, left, width, PREPARE(j, left) AT(row * stride + j, left))    \
    }
_Static_assert(TOGETHER == 4, "FOR_BLOCK counts them");

/* Writes VALUE(j, left), of column j of the row that begins at `start`, to the rows of a sweep, which are JOINED. */
#define JOIN_ROWS(y, VALUE)                                                             \
    for (ptrdiff_t row = 0, start = 0; row < rows; row++, start += width)               \
        WRITE_PAST((y) + start, width, past, VALUE)

/* y = activation((x - pivot) * scale + shift + residual): pivot, scale and shift per column. */
SWEEP void affine_block(const element *x, const element *residual, element *y, ptrdiff_t rows, ptrdiff_t stride,
                        ptrdiff_t width, const real *pivot, const real *scale, const real *shift,
                        int activation, seam *past, int cached)
{
    const vec floor = floor_of(activation);
    const int way = way_of(past, y, stride, width);
#define COLUMNS(j, left)                                                                \
    const vec p = load_real(pivot + (j), left, 0), a = load_real(scale + (j), left, 0); \
    const vec b = load_real(shift + (j), left, 0);
#define VALUE(i, left) fused(load(x + (i), left, 0) - p, a, b)
#define ADDED(i, left) (VALUE(i, left) + load(residual + (i), left, 0))
#define PUT(i, value, left) put(y + (i), value, left, way);
#define PUT_VALUE(i, left) PUT(i, VALUE(i, left), left)
#define PUT_ADDED(i, left) PUT(i, ADDED(i, left), left)
#define CUT_VALUE(i, left) PUT(i, at_least(VALUE(i, left), floor), left)
#define CUT_ADDED(i, left) PUT(i, at_least(ADDED(i, left), floor), left)
#define IN_STRETCH(j, left)                                                             \
    ({                                                                                  \
        COLUMNS(j, left)                                                                \
        at_least(residual ? ADDED(start + (j), left) : VALUE(start + (j), left), floor); \
    })
    if (way == JOINED && activation <= RELU) {
        JOIN_ROWS(y, IN_STRETCH)
    } else if (activation > RELU) {
        for (ptrdiff_t row = 0, start = 0; row < rows; row++, start += stride)
            WRITE_ACTIVATED(y + start, width, activation, way ? past : 0, done, IN_STRETCH)
    } else if (residual && activation) {
        FOR_BLOCK(COLUMNS, CUT_ADDED)
    } else if (residual) {
        FOR_BLOCK(COLUMNS, PUT_ADDED)
    } else if (activation) {
        FOR_BLOCK(COLUMNS, CUT_VALUE)
    } else {
        FOR_BLOCK(COLUMNS, PUT_VALUE)
    }
#undef VALUE
#undef ADDED
#undef PUT
#undef PUT_VALUE
#undef PUT_ADDED
#undef CUT_VALUE
#undef CUT_ADDED
#undef IN_STRETCH
#undef COLUMNS
}

/* grad_x = rstd * (grad_y * weight + b * (x - mean) + c) with all but the arrays per column; no x:
 * grad_x = rstd * weight * grad_y. See backward_affine. */
EXACT_SWEEP void backward_block(const element *grad_y, const element *x, element *grad_x, ptrdiff_t rows,
                                ptrdiff_t stride, ptrdiff_t width, const real *mean, const real *rstd,
                                const real *b, const real *c, const real *weight, seam *past, int cached)
{
    const int way = way_of(past, grad_x, stride, width);
#define COLUMNS(j, left) \
    const vec r = load_real(rstd + j, left, 0), w = load_real(weight + j, left, 0);
#define ALL_COLUMNS(j, left)                                                            \
    COLUMNS(j, left)                                                                    \
    const vec m = load_real(mean + j, left, 0), b_ = load_real(b + j, left, 0);         \
    const vec c_ = load_real(c + j, left, 0);
#define PUT(i, value, left) put(grad_x + (i), value, left, way);
#define HELD(i, left) (r * w * load(grad_y + (i), left, 0))
#define ALL(i, left) (r * (load(grad_y + (i), left, 0) * w + fused(load(x + (i), left, 0) - m, b_, c_)))
#define FROZEN(i, left) PUT(i, HELD(i, left), left)
#define THROUGH(i, left) PUT(i, ALL(i, left), left)
#define FROZEN_IN_STRETCH(j, left) ({ COLUMNS(j, left) HELD(start + (j), left); })
#define THROUGH_IN_STRETCH(j, left) ({ ALL_COLUMNS(j, left) ALL(start + (j), left); })
    if (way == JOINED && !x) {
        JOIN_ROWS(grad_x, FROZEN_IN_STRETCH)
    } else if (way == JOINED) {
        JOIN_ROWS(grad_x, THROUGH_IN_STRETCH)
    } else if (!x) {
        FOR_BLOCK(COLUMNS, FROZEN)
    } else {
        FOR_BLOCK(ALL_COLUMNS, THROUGH)
    }
#undef HELD
#undef ALL
#undef FROZEN
#undef THROUGH
#undef FROZEN_IN_STRETCH
#undef THROUGH_IN_STRETCH
#undef COLUMNS
#undef ALL_COLUMNS
#undef PUT
}

/* AT(together, row) of the rows of a sweep, with a weight each. They are taken TOGETHER where all is in the cache, or
 * with gaps between them, unless they are JOINED; where not, `ahead` is how far away lies what is read next: it is
 * fetched, row by row, as the hardware follows. */
#define FOR_ROWS(AT)                                                                    \
    {                                                                                   \
        const int by_row = way == JOINED || (ahead && stride == width);                 \
        ptrdiff_t row = 0;                                                              \
        for (; !by_row && row + TOGETHER <= rows; row += TOGETHER)                      \
            AT(TOGETHER, row);                                                          \
        for (; row < rows; row++)                                                       \
            AT(1, row);                                                                 \
    }

ALWAYS vec row_value(vec x, vec pivot, vec scale, vec shift, const real *weight, const real *bias)
{
    return along(1, 1, x, pivot, scale, shift, splat(weight ? *weight : 1), splat(bias ? *bias : 0));
}

ALWAYS void affine_rows(const int together, const element *x, element *y, ptrdiff_t stride, ptrdiff_t width,
                        const real *pivot, const real *scale, const real *shift, const real *weight,
                        const real *bias, int way, ptrdiff_t ahead)
{
    FOR_VECTORS(j, left, width, {
        const vec p = load_real(pivot + j, left, 0), a = load_real(scale + j, left, 0);
        const vec b = load_real(shift + j, left, 0);
        for (int k = 0; k < together; k++) {
            const ptrdiff_t i = k * stride + j;
            if (together == 1)
                prefetch(x + i + ahead);
            put(y + i, row_value(load(x + i, left, 0), p, a, b, NTH(k, weight, 1), NTH(k, bias, 1)), left, way);
        }
    })
}

/* y = ((x - pivot) * scale + shift) * weight + bias: pivot, scale and shift per column, weight and bias,
 * which may be NULL, per row. */
EXACT_SWEEP void affine_strip(const element *x, element *y, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t width,
                              const real *pivot, const real *scale, const real *shift, const real *weight,
                              const real *bias, seam *past, ptrdiff_t ahead)
{
    const int way = way_of(past, y, stride, width);
#define IN_STRETCH(j, left)                                                             \
    (prefetch(x + start + (j) + ahead),                                                 \
     row_value(load(x + start + (j), left, 0), load_real(pivot + (j), left, 0), load_real(scale + (j), left, 0), \
               load_real(shift + (j), left, 0), NTH(row, weight, 1), NTH(row, bias, 1)))
#define AT(together, row)                                                               \
    affine_rows(together, x + row * stride, y + row * stride, stride, width, pivot, scale, shift, \
                NTH(row, weight, 1), NTH(row, bias, 1), way, ahead)
    if (way == JOINED) {
        JOIN_ROWS(y, IN_STRETCH)
    } else {
        FOR_ROWS(AT)
    }
#undef IN_STRETCH
#undef AT
}

ALWAYS void backward_strip_rows(const int together, const int parameters, const element *grad_y,
                                const element *x, const real *weight, const element *grad_total,
                                element *grad_x, ptrdiff_t stride, ptrdiff_t width, const real *mean,
                                const real *rstd, const real *shift, const real *b, const real *c,
                                double *grad_weight, double *grad_bias, const int way, seam *past, ptrdiff_t ahead)
{
    const phase p = phase_of(way, grad_x);
    vec weight_sum[TOGETHER], bias_sum[TOGETHER], over = splat(0);
    for (int k = 0; k < together; k++)
        weight_sum[k] = bias_sum[k] = splat(0);
    FOR_VECTORS(j, left, width, {
        const vec m = load_real(mean + j, left, 0), r = load_real(rstd + j, left, 0);
        const vec s = load_real(shift + j, left, 0), b_ = load_real(b + j, left, 0);
        const vec c_ = load_real(c + j, left, 0);
        for (int k = 0; k < together; k++) {
            const ptrdiff_t i = k * stride + j;
            if (together == 1)
                prefetch(grad_y + i + ahead), prefetch(x + i + ahead);
            const vec g = load(grad_y + i, left, 0), t = load(x + i, left, 0) - m;
            if (grad_x) {
                vec out = r * (g * (weight ? weight[k] : (real)1) + fused(t, b_, c_));
                if (grad_total)
                    out += load(grad_total + i, left, 0);
                if (together == 1)
                    over = put_on_way(way, past, grad_x, i, out, left, p, over);
                else
                    put(grad_x + i, out, left, way);
            }
            if (parameters) {
                weight_sum[k] = fused(g, fused(t, r, s), weight_sum[k]);
                bias_sum[k] += g;
            }
        }
    })
    for (int k = 0; parameters && k < together; k++) {
        grad_weight[k] += lanes_sum(weight_sum[k]);
        grad_bias[k] += lanes_sum(bias_sum[k]);
    }
    if (way == JOINED)
        end_row(past, grad_x, width, p, over);
}

/* grad_x = rstd * (grad_y * weight + b * (x - mean) + c) + grad_total with the weight per row, all else per
 * column; see backward_affine. Adds to grad_weight and grad_bias, which may be NULL together, the sums over
 * each row of grad_y * ((x - mean) * rstd + shift) and of grad_y. */
EXACT_SWEEP void backward_strip(const element *grad_y, const element *x, const real *weight,
                                const element *grad_total, element *grad_x, ptrdiff_t rows, ptrdiff_t stride,
                                ptrdiff_t width, const real *mean, const real *rstd, const real *shift,
                                const real *b, const real *c, double *grad_weight, double *grad_bias,
                                seam *past, ptrdiff_t ahead)
{
    const int way = way_of(past, grad_x, stride, width);
#define ROWS(together, parameters, row)                                                 \
    backward_strip_rows(together, parameters, grad_y + row * stride, x + row * stride,  \
                        NTH(row, weight, 1), NTH(row, grad_total, stride), NTH(row, grad_x, stride), stride, width, \
                        mean, rstd, shift, b, c, grad_weight + row, grad_bias + row, way, past, ahead)
#define SUMMED(together, row) ROWS(together, 1, row)
#define ALONE(together, row) ROWS(together, 0, row)
    if (grad_weight) {
        FOR_ROWS(SUMMED)
    } else {
        FOR_ROWS(ALONE)
    }
#undef ROWS
#undef SUMMED
#undef ALONE
}

/* ------------------------------------------------------------------------------ running statistics */

/* Moves n running statistics towards what is new: the mean over B rows of n, times a factor. */
ALWAYS void move_towards(const ptrdiff_t B, real *restrict running, const real *restrict new_, ptrdiff_t stride,
                         ptrdiff_t n, double factor, double momentum)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        double sum = 0;
        for (ptrdiff_t b = 0; b < B; b++)
            sum += new_[b * stride + i];
        running[i] = (1 - momentum) * running[i] + momentum * (sum / B * factor);
    }
}

EXACT_SWEEP void move_running(real *running, const real *new_, ptrdiff_t B, ptrdiff_t stride, ptrdiff_t n,
                              double factor, double momentum)
{
    if (B == 1)
        move_towards(1, running, new_, stride, n, factor, momentum);
    else
        move_towards(B, running, new_, stride, n, factor, momentum);
}

/* Each of `count` values so many times. */
SWEEP void repeat_each(const real *values, ptrdiff_t count, ptrdiff_t times, real *out)
{
    const ptrdiff_t whole = LANES / times, rest = LANES % times, n = count * times;
    if (times == 1) {
        memcpy(out, values, count * sizeof(real));
        return;
    }
    for (ptrdiff_t k = 0; times >= LANES && k < count; k++, out += times)
        FOR_VECTORS(i, left, times, store_real(out + i, splat(values[k]), left);)
    if (times >= LANES)
        return;
    /* The lanes of a vector begin with what is left of the k-th value. */
    for (ptrdiff_t i = 0, k = 0, gone = 0; i < n; i += LANES) {
        const vec some = load_real(values + k, MIN(LANES, count - k), 0);
        store_real(out + i, picked(some, parts_of_lanes(gone, times)), MIN(LANES, n - i));
        k += whole, gone += rest;
        if (gone >= times)
            gone -= times, k++;
    }
}

/* set_columns of statistics that are given, as reals. */
SWEEP void set_given_columns(ptrdiff_t K, const real *restrict mean, const real *restrict rstd,
                             const real *restrict weight, const real *restrict bias, ptrdiff_t groups,
                             real *restrict pivot, real *restrict scale, real *restrict shift)
{
    const ptrdiff_t n = groups * K;
    repeat_each(mean, groups, K, pivot);
    repeat_each(rstd, groups, K, scale);
    for (ptrdiff_t i = 0; weight && i < n; i++)
        scale[i] *= weight[i];
    for (ptrdiff_t i = 0; i < n; i++)
        shift[i] = bias ? bias[i] : 0;
}

/* rstd of variances that are given: in reals where they hold eps, which takes a third of the time. What the kernels are
 * not told themselves is found alike by _front.pyx, for Numba, and by _canonical.py. */
SWEEP void invert_roots(const real *restrict var, ptrdiff_t n, double eps, real *restrict rstd)
{
    if (eps == 0 || eps >= FLT_MIN)
        for (ptrdiff_t i = 0; i < n; i++) {
            const real v = var[i] + (real)eps;
            rstd[i] = 1 / (sizeof(real) == sizeof(double) ? __builtin_sqrt(v) : __builtin_sqrtf(v));
        }
    else
        for (ptrdiff_t i = 0; i < n; i++)
            rstd[i] = 1 / sqrt(var[i] + eps);
}

/* ------------------------------------------------------------------------------ elements and reals */

SWEEP void widen_stretch(const element *x, real *y, ptrdiff_t n)
{
    FOR_VECTORS(i, left, n, store_real(y + i, load(x + i, left, 0), left);)
}

SWEEP void narrow_stretch(const real *x, element *y, ptrdiff_t n)
{
    FOR_VECTORS(i, left, n, store(y + i, load_real(x + i, left, 0), left);)
}

/* ------------------------------------------------------------------------------ speed of memory */

/* y = x and grad_x = grad_y - x, with the stores of the kernels: what they are measured by. */
SWEEP void copy_stretch(const element *x, element *y, ptrdiff_t n, int streaming)
{
#define VALUE(i, left) load(x + (i), left, 0)
    seam joint, *const past = open_seam(&joint, streaming);
    WRITE_EITHER(y, n, past, VALUE)
    end_seam(past);
#undef VALUE
}

SWEEP void triad_stretch(const element *grad_y, const element *x, element *grad_x, ptrdiff_t n, int streaming)
{
#define VALUE(i, left) (load(grad_y + (i), left, 0) - load(x + (i), left, 0))
    seam joint, *const past = open_seam(&joint, streaming);
    WRITE_EITHER(grad_x, n, past, VALUE)
    end_seam(past);
#undef VALUE
}

#if !defined(__clang__)
#pragma GCC pop_options
#endif

#endif
