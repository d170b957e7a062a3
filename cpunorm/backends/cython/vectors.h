/* Elements and vectors: what one array holds, and how a register is filled from it.
 *
 * Every kernel is compiled once per element type, which the build names: ELEMENT_FLOAT32, _FLOAT64,
 * _FLOAT16 or _BFLOAT16. An `element` is what arrays of x's size hold; a `real` is what is computed
 * with, and what parameters and statistics hold: float for the first and the last two. Half types are
 * widened as they are loaded and rounded once, to nearest even, as they are stored.
 */
#ifndef CPUNORM_VECTORS_H
#define CPUNORM_VECTORS_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define ALWAYS static inline __attribute__((always_inline, unused))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

#if defined(ELEMENT_FLOAT64)
typedef double real;
typedef int64_t lane_bits;
#else
typedef float real;
typedef int32_t lane_bits;
#endif

#if defined(ELEMENT_FLOAT16) || defined(ELEMENT_BFLOAT16)
#define HALF 1
typedef uint16_t element;
#else
#define HALF 0
typedef real element;
#endif

#define LANES ((ptrdiff_t)(VECTOR_BYTES / sizeof(real)))

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef real loose_vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef lane_bits bits_vec __attribute__((vector_size(VECTOR_BYTES)));

/* In each lane one or the other. */
ALWAYS vec choose(bits_vec condition, vec yes, vec no)
{
#if defined(__AVX__) && !defined(__AVX512F__) && !defined(ELEMENT_FLOAT64)
    return (vec)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)condition);
#else
    return (vec)(((bits_vec)yes & condition) | ((bits_vec)no & ~condition));
#endif
}

/* -------------------------------------------------------------------------------- half types */

#if HALF
typedef uint32_t wide_bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t packed __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t loose_packed __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint16_t packed_two __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t loose_packed_two __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

#if defined(ELEMENT_BFLOAT16)

/* A permutation moves words between the upper halves of 32 bits and side by side. */

ALWAYS vec widen(packed h)
{
#if defined(__AVX512BW__)
    const __m512i order = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
    return (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, _mm512_castsi256_si512((__m256i)h));
#elif defined(__AVX2__)
    const __m256i order = _mm256_set_epi32(0x0f0e8080, 0x0d0c8080, 0x0b0a8080, 0x09088080, 0x07068080, 0x05048080,
                                           0x03028080, 0x01008080);
    return (vec)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)h), order);
#else
    return (vec)(__builtin_convertvector(h, wide_bits) << 16);
#endif
}

ALWAYS packed_two upper_halves(wide_bits a, wide_bits b)
{
#if defined(__AVX512BW__)
    const __m512i order = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                           23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return (packed_two)_mm512_permutex2var_epi16((__m512i)a, order, (__m512i)b);
#elif defined(__AVX2__)
    const __m256i quarters = _mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16));
    return (packed_two)_mm256_permute4x64_epi64(quarters, 0xd8);
#elif defined(__SSE4_1__)
    return (packed_two)_mm_packus_epi32((__m128i)(a >> 16), (__m128i)(b >> 16));
#else
    const packed halves[2] = {__builtin_convertvector(a >> 16, packed), __builtin_convertvector(b >> 16, packed)};
    packed_two both;
    memcpy(&both, halves, sizeof both);
    return both;
#endif
}

/* Whether there is a NaN in either. */
ALWAYS int any_nan(vec a, vec b)
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
#else
    const bits_vec nan = (a != a) | (b != b);
    int any = 0;
    for (ptrdiff_t i = 0; i < LANES; i++)
        any |= nan[i];
    return any;
#endif
}

/* To the nearest, ties to even: what the upper halves hold then. */
ALWAYS wide_bits nearest(vec v)
{
    const wide_bits u = (wide_bits)v;
    return u + (0x7fff + ((u >> 16) & 1));
}

/* The same of what may hold NaN; only quiet ones come here, as arithmetic makes them. */
ALWAYS wide_bits number_nearest(vec v)
{
    return (wide_bits)choose(v == v, (vec)nearest(v), v);
}

ALWAYS packed_two narrow_two(vec a, vec b)
{
#if defined(__AVX512BF16__)
    /* The instruction makes zeros of subnormal numbers, which are kept here. */
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    const int subnormal = 0x20;
    if (__builtin_expect(_mm512_testn_epi16_mask(both, _mm512_set1_epi16(0x7fff)) == 0, 1)
        || !(_mm512_fpclass_ps_mask((__m512)a, subnormal) | _mm512_fpclass_ps_mask((__m512)b, subnormal)))
        return (packed_two)both;
#endif
    if (__builtin_expect(any_nan(a, b), 0))
        return upper_halves(number_nearest(a), number_nearest(b));
    return upper_halves(nearest(a), nearest(b));
}

ALWAYS packed narrow(vec v)
{
    const packed_two both = narrow_two(v, v);
    packed h;
    memcpy(&h, &both, sizeof h);
    return h;
}

#elif defined(__AVX512F__)

ALWAYS vec widen(packed h)
{
    return (vec)_mm512_cvtph_ps((__m256i)h);
}

ALWAYS packed narrow(vec v)
{
    return (packed)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__F16C__)

ALWAYS vec widen(packed h)
{
    return (vec)_mm256_cvtph_ps((__m128i)h);
}

ALWAYS packed narrow(vec v)
{
    packed h = (packed)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* In a register: a conversion to memory takes an eighth longer than with a store of its own (AMD). */
    __asm__("" : "+x"(h));
    return h;
}

#else

/* The exponent moves from bias 15 to 127 by a product, which also normalises what was subnormal. */
ALWAYS vec widen(packed h)
{
    const wide_bits u = __builtin_convertvector(h, wide_bits), magnitude = (u & 0x7fff) << 13;
    const wide_bits special = (wide_bits)(magnitude >= 0x0f800000) & 0x7f800000;
    const vec scaled = (vec)magnitude * 0x1p112f;
    return (vec)((wide_bits)scaled | special | ((u & 0x8000) << 16));
}

/* Adding 0.5 makes the processor round a subnormal where its last bit will be. */
ALWAYS packed narrow(vec v)
{
    const wide_bits u = (wide_bits)v & 0x7fffffff, sign = ((wide_bits)v >> 16) & 0x8000;
    const wide_bits nan = (wide_bits)(u > 0x7f800000), large = (wide_bits)(u >= 0x47800000);
    const wide_bits small = (wide_bits)(u < 0x38800000);
    const wide_bits subnormal = (wide_bits)((vec)u + 0.5f) - 0x3f000000;
    const wide_bits normal = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
    wide_bits h = (subnormal & small) | (normal & ~small);
    h = (h & ~large) | (0x7c00 & large) | ((0x200 | ((u >> 13) & 0x3ff)) & nan);
    return __builtin_convertvector(h | sign, packed);
}

#endif
#endif

/* --------------------------------------------------------------------------- loads and stores */

/* What takes `left` lanes of a vector, from the first, takes all of them where the compiler sees that
 * left == LANES; lanes that are not loaded are `fill`. */

ALWAYS vec splat(real value)
{
    return (vec){0} + value;
}

/* The number of each lane. */
ALWAYS bits_vec lanes(void)
{
    bits_vec lane;
    for (ptrdiff_t i = 0; i < LANES; i++)
        lane[i] = i;
    return lane;
}

/* The lanes of which there are `left`, all bits set. */
ALWAYS bits_vec first_mask(ptrdiff_t left)
{
    return lanes() < (bits_vec){0} + (lane_bits)left;
}

#if defined(__SSE2__) && !defined(__AVX512F__)

/* Where there are no masks for it, the end of a stretch goes in pieces of 8, 4 and 2 bytes: fewer than 16, of
 * items of `size` bytes. */
ALWAYS __m128i load_bytes(const void *p, ptrdiff_t bytes, const int size)
{
    const char *end = (const char *)p + bytes;
    __m128i v = _mm_setzero_si128();
    if (size <= 2 && bytes & 2) {
        uint16_t last;
        memcpy(&last, end -= 2, 2);
        v = _mm_cvtsi32_si128(last);
    }
    if (size <= 4 && bytes & 4) {
        int32_t next;
        memcpy(&next, end -= 4, 4);
        v = _mm_or_si128(_mm_slli_si128(v, 4), _mm_cvtsi32_si128(next));
    }
    if (bytes & 8)
        v = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)p), v);
    return v;
}

ALWAYS void store_bytes(void *p, __m128i v, ptrdiff_t bytes, const int size)
{
    char *next = p;
    if (bytes & 8) {
        _mm_storel_epi64((__m128i *)next, v);
        v = _mm_unpackhi_epi64(v, v), next += 8;
    }
    if (size <= 4 && bytes & 4) {
        const int32_t low = _mm_cvtsi128_si32(v);
        memcpy(next, &low, 4);
        v = _mm_srli_si128(v, 4), next += 4;
    }
    if (size <= 2 && bytes & 2) {
        const uint16_t low = (uint16_t)_mm_cvtsi128_si32(v);
        memcpy(next, &low, 2);
    }
}

#endif

ALWAYS vec load_real(const real *p, ptrdiff_t left, real fill)
{
    if (left >= LANES)
        return *(const loose_vec *)p;
#if defined(__AVX512F__) && defined(ELEMENT_FLOAT64)
    return (vec)_mm512_mask_loadu_pd((__m512d)splat(fill), (__mmask8)((1u << left) - 1), p);
#elif defined(__AVX512F__)
    return (vec)_mm512_mask_loadu_ps((__m512)splat(fill), (__mmask16)((1u << left) - 1), p);
#else
    const bits_vec mask = first_mask(left);
#if defined(__AVX__) && defined(ELEMENT_FLOAT64)
    const vec v = (vec)_mm256_maskload_pd(p, (__m256i)mask);
#elif defined(__AVX__)
    const vec v = (vec)_mm256_maskload_ps(p, (__m256i)mask);
#elif defined(__SSE2__)
    const vec v = (vec)load_bytes(p, left * sizeof(real), sizeof(real));
#else
    vec v = {0};
    for (ptrdiff_t i = 0; i < left; i++)
        v[i] = p[i];
#endif
    return (vec)((bits_vec)v | ((bits_vec)splat(fill) & ~mask));
#endif
}

ALWAYS void store_real(real *p, vec v, ptrdiff_t left)
{
    if (left >= LANES) {
        *(loose_vec *)p = v;
        return;
    }
#if defined(__AVX512F__) && defined(ELEMENT_FLOAT64)
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << left) - 1), (__m512d)v);
#elif defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << left) - 1), (__m512)v);
#elif defined(__AVX__)
    /* Masked stores take dozens of cycles on some processors. */
    __m128i low = _mm256_castsi256_si128((__m256i)v);
    if (left >= LANES / 2) {
        _mm_storeu_si128((__m128i *)p, low);
        low = _mm256_extractf128_si256((__m256i)v, 1);
        p += LANES / 2, left -= LANES / 2;
    }
    store_bytes(p, low, left * sizeof(real), sizeof(real));
#elif defined(__SSE2__)
    store_bytes(p, (__m128i)v, left * sizeof(real), sizeof(real));
#else
    for (ptrdiff_t i = 0; i < left; i++)
        p[i] = v[i];
#endif
}

#if HALF

ALWAYS vec load(const element *p, ptrdiff_t left, real fill)
{
    if (left >= LANES)
        return widen((packed) * (const loose_packed *)p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 mask = (__mmask16)((1u << left) - 1);
    const vec v = widen((packed)_mm256_maskz_loadu_epi16(mask, p));
    return (vec)_mm512_mask_blend_ps(mask, (__m512)splat(fill), (__m512)v);
#else
    packed h = {0};
#if defined(__SSE2__)
    const __m128i eight = load_bytes(p, left * sizeof(element), sizeof(element));
    memcpy(&h, &eight, sizeof h);
#else
    for (ptrdiff_t i = 0; i < left; i++)
        h[i] = p[i];
#endif
    return choose(first_mask(left), widen(h), splat(fill));
#endif
}

ALWAYS void store(element *p, vec v, ptrdiff_t left)
{
    const packed h = narrow(v);
    if (left >= LANES) {
        *(loose_packed *)p = h;
        return;
    }
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << left) - 1), (__m256i)h);
#elif defined(__SSE2__)
    __m128i low = _mm_setzero_si128();
    memcpy(&low, &h, sizeof h);
    store_bytes(p, low, left * sizeof(element), sizeof(element));
#else
    for (ptrdiff_t i = 0; i < left; i++)
        p[i] = h[i];
#endif
}

#else

ALWAYS vec load(const element *p, ptrdiff_t left, real fill)
{
    return load_real(p, left, fill);
}

ALWAYS void store(element *p, vec v, ptrdiff_t left)
{
    store_real(p, v, left);
}

#endif

/* Two whole vectors, one after the other. */
ALWAYS void store_two(element *p, vec a, vec b)
{
#if defined(ELEMENT_BFLOAT16)
    *(loose_packed_two *)p = narrow_two(a, b);
#else
    store(p, a, LANES), store(p + LANES, b, LANES);
#endif
}

/* Elements i to i + left of a stretch, in any lanes, the others `fill`. At its end a whole vector is loaded,
 * where there is one, and what belongs to the vector before is put out. */
ALWAYS vec load_any(const element *x, ptrdiff_t i, ptrdiff_t left, real fill)
{
    if (left >= LANES || i == 0)
        return load(x + i, left, fill);
    return choose(first_mask(LANES - left), splat(fill), load(x + i + left - LANES, LANES, 0));
}

/* The same of reals. */
ALWAYS vec load_any_real(const real *x, ptrdiff_t i, ptrdiff_t left)
{
    if (left >= LANES || i == 0)
        return load_real(x + i, left, 0);
    return (vec)((bits_vec)load_real(x + i + left - LANES, LANES, 0) & ~first_mask(LANES - left));
}

ALWAYS real load_one(const element *p)
{
#if HALF
    return load(p, 1, 0)[0];
#else
    return *p;
#endif
}

/* Whether there are stores past the caches. */
#if defined(__AVX__) || (defined(__SSE2__) && !HALF)
#define CAN_STREAM 1
#else
#define CAN_STREAM 0
#endif

/* One, to an aligned p. */
ALWAYS void stream(element *p, vec v)
{
#if !CAN_STREAM
    store(p, v, LANES);
#elif HALF && defined(__AVX512F__)
    _mm256_stream_si256((__m256i *)p, (__m256i)narrow(v));
#elif HALF
    _mm_stream_si128((__m128i *)p, (__m128i)narrow(v));
#elif defined(__AVX512F__) && defined(ELEMENT_FLOAT64)
    _mm512_stream_pd(p, (__m512d)v);
#elif defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__) && defined(ELEMENT_FLOAT64)
    _mm256_stream_pd(p, (__m256d)v);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(ELEMENT_FLOAT64)
    _mm_stream_pd(p, (__m128d)v);
#else
    _mm_stream_ps(p, (__m128)v);
#endif
}

ALWAYS void prefetch(const element *p)
{
    __builtin_prefetch(p, 0, 3);
}

ALWAYS void prefetch_to_write(const element *p)
{
    __builtin_prefetch(p, 1, 3);
}

/* Streamed stores are not ordered with others: once, before a thread says that it is done. */
ALWAYS void stream_fence(void)
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Elements before the first aligned store. */
ALWAYS ptrdiff_t until_aligned(const element *p)
{
    return (ptrdiff_t)((uintptr_t)(-(intptr_t)p) % (LANES * sizeof(element)) / sizeof(element));
}

/* Whether rows that are `stride` apart begin with aligned stores. */
ALWAYS int rows_aligned(const element *p, ptrdiff_t stride)
{
    return until_aligned(p) == 0 && stride % LANES == 0;
}

/* ------------------------------------------------------------------------------- within a vector */

#if defined(__AVX512F__)
#define SHUFFLE(a, b, order) ((vec)_mm512_shuffle_ps((__m512)(a), (__m512)(b), order))
#elif defined(__AVX__)
#define SHUFFLE(a, b, order) ((vec)_mm256_shuffle_ps((__m256)(a), (__m256)(b), order))
#elif defined(__SSE2__)
#define SHUFFLE(a, b, order) ((vec)_mm_shuffle_ps((__m128)(a), (__m128)(b), order))
#endif

#if defined(__AVX__) && !defined(__AVX512F__) && !defined(ELEMENT_FLOAT64)
ALWAYS __m128 halves_sum(vec v)
{
    return _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
}
#endif

ALWAYS real lanes_sum(vec v)
{
#if defined(__AVX512F__) && !defined(ELEMENT_FLOAT64)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX512F__)
    return _mm512_reduce_add_pd((__m512d)v);
#elif defined(__AVX__) && defined(ELEMENT_FLOAT64)
    const __m128d two = _mm256_castpd256_pd128((__m256d)v) + _mm256_extractf128_pd((__m256d)v, 1);
    return two[0] + two[1];
#elif defined(__SSE2__) && !defined(ELEMENT_FLOAT64)
#if defined(__AVX__)
    const __m128 four = halves_sum(v);
#else
    const __m128 four = (__m128)v;
#endif
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
#else
    real sum = 0;
    for (ptrdiff_t i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
#endif
}

/* The sums over the lanes of each of LANES vectors: far fewer steps than one after the other. */
ALWAYS vec lanes_sums(const vec *v)
{
#if defined(__SSE2__) && !defined(ELEMENT_FLOAT64)
    /* First to four lanes; then what is added up in quarters of 128 bits comes out in order. */
    vec four[4];
    for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
        const __m512 a = (__m512)v[i], b = (__m512)v[4 + i], c = (__m512)v[8 + i], d = (__m512)v[12 + i];
        const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
        const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
        four[i] = (vec)(_mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd));
#elif defined(__AVX__)
        four[i] = (vec)_mm256_set_m128(halves_sum(v[4 + i]), halves_sum(v[i]));
#else
        four[i] = v[i];
#endif
    }
    const vec first = SHUFFLE(four[0], four[1], 0x44) + SHUFFLE(four[0], four[1], 0xee);
    const vec last = SHUFFLE(four[2], four[3], 0x44) + SHUFFLE(four[2], four[3], 0xee);
    return SHUFFLE(first, last, 0x88) + SHUFFLE(first, last, 0xdd);
#else
    vec sums;
    for (ptrdiff_t i = 0; i < LANES; i++)
        sums[i] = lanes_sum(v[i]);
    return sums;
#endif
}

/* Which part each lane belongs to, of parts of `size` lanes, after so many of the first. */
ALWAYS bits_vec parts_of_lanes(ptrdiff_t gone, ptrdiff_t size)
{
    const vec middle = __builtin_convertvector(lanes(), vec) + ((real)0.5 + (real)gone);
    return __builtin_convertvector(middle * ((real)1 / size), bits_vec);
}

/* In each lane the lane of v that is asked for. */
ALWAYS vec picked(vec v, bits_vec which)
{
#if defined(__clang__)
    vec out;
    for (ptrdiff_t i = 0; i < LANES; i++)
        out[i] = v[which[i]];
    return out;
#else
    return __builtin_shuffle(v, which);
#endif
}

/* What to pick to move lanes on by `count`, the last ones to the front. */
ALWAYS bits_vec turn(ptrdiff_t count)
{
    return (lanes() - (lane_bits)count) & (lane_bits)(LANES - 1);
}

ALWAYS vec roots(vec v)
{
    real root[LANES];
    store_real(root, v, LANES);
    for (ptrdiff_t i = 0; i < LANES; i++)
        root[i] = sizeof(real) == sizeof(double) ? __builtin_sqrt(root[i]) : __builtin_sqrtf(root[i]);
    return load_real(root, LANES, 0);
}

/* a * b + c, rounded once where the processor can. */
ALWAYS vec fused(vec a, vec b, vec c)
{
#if defined(__AVX512F__) && defined(ELEMENT_FLOAT64)
    return (vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(ELEMENT_FLOAT64)
    return (vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__SSE2__)
    /* What is added later is not to be added first in one place and last in another, as the compiler likes. */
    vec sum = a * b;
    __asm__("" : "+x"(sum));
    sum += c;
    __asm__("" : "+x"(sum));
    return sum;
#elif defined(__aarch64__) && defined(ELEMENT_FLOAT64)
    return (vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* a - b, which the compiler is not to take apart: the sum of such differences would become one of the values, which
 * may be large where what they differ by is not. */
ALWAYS vec difference(vec a, vec b)
{
    vec d = a - b;
#if defined(__SSE2__)
    __asm__("" : "+x"(d));
#elif defined(__aarch64__)
    __asm__("" : "+w"(d));
#endif
    return d;
}

/* v where it is not below floor; NaN stays NaN. */
ALWAYS vec at_least(vec v, vec floor)
{
    /* The instructions give the second operand where either is NaN. */
#if defined(__AVX512F__) && !defined(ELEMENT_FLOAT64)
    return (vec)_mm512_max_ps((__m512)floor, (__m512)v);
#elif defined(__AVX512F__)
    return (vec)_mm512_max_pd((__m512d)floor, (__m512d)v);
#elif defined(__AVX__) && !defined(ELEMENT_FLOAT64)
    return (vec)_mm256_max_ps((__m256)floor, (__m256)v);
#elif defined(__AVX__)
    return (vec)_mm256_max_pd((__m256d)floor, (__m256d)v);
#else
    return choose(v < floor, floor, v);
#endif
}

/* Adds `left` lanes to as many sums. */
ALWAYS void add_to_sums(double *sums, vec v, ptrdiff_t left)
{
#if defined(__AVX512F__) && !defined(ELEMENT_FLOAT64)
    const __mmask16 mask = (__mmask16)((1u << left) - 1);
    const __mmask8 high = mask >> 8;
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    const __m512d b = _mm512_cvtps_pd((__m256)_mm512_extractf64x4_pd((__m512d)v, 1));
    _mm512_mask_storeu_pd(sums, (__mmask8)mask, a + _mm512_maskz_loadu_pd((__mmask8)mask, sums));
    if (high)
        _mm512_mask_storeu_pd(sums + 8, high, b + _mm512_maskz_loadu_pd(high, sums + 8));
#else
    for (ptrdiff_t k = 0; k < left; k++)
        sums[k] += v[k];
#endif
}

/* A vector's worth of float64 sums. */
typedef double doubles __attribute__((vector_size(VECTOR_BYTES)));

#if defined(ELEMENT_FLOAT64)

typedef struct {
    doubles low;
} wide_vec;

ALWAYS void add_wide(wide_vec *sum, vec v)
{
    sum->low += v;
}

ALWAYS double wide_sum(const wide_vec *sum)
{
    return lanes_sum(sum->low);
}

#else

typedef struct {
    doubles low, high;
} wide_vec;

typedef float half_vec __attribute__((vector_size(VECTOR_BYTES / 2)));

ALWAYS void add_wide(wide_vec *sum, vec v)
{
    half_vec halves[2];
    memcpy(halves, &v, sizeof v);
    sum->low += __builtin_convertvector(halves[0], doubles);
    sum->high += __builtin_convertvector(halves[1], doubles);
}

ALWAYS double wide_sum(const wide_vec *sum)
{
    const doubles both = sum->low + sum->high;
    double total = 0;
    for (ptrdiff_t i = 0; i < LANES / 2; i++)
        total += both[i];
    return total;
}

#endif

#endif
