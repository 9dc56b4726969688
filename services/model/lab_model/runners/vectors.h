/* Vectors of 16 numbers on x86-64 processors.
 *
 * Three implementations, by the compiler's flags: AVX-512 VNNI; AVX2 with AVX-VNNI; only AVX2 (each with FMA and F16C).
 * All round alike and sum a vector in one order, so that they give the same bits.
 */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512VNNI__)

/* Of a tile's two vectors of outputs both at once: levels and sums fit the 32 registers. */
#define SIDES 2
#define SETTLE(sums)

typedef __m512 Floats;
typedef __m512i Ints; /* 16 of 32 bits, or 64 bytes */

#define UNARY(to, name, from, op) \
    INLINE to name(from x) { return _mm512_##op(x); }
#define BINARY(type, name, op) \
    INLINE type name(type x, type y) { return _mm512_##op(x, y); }
#define LOWER(x) _mm512_castps512_ps256(x)
#define UPPER(x) _mm512_extractf32x8_ps(x, 1)
#define LOWER_INTS(x) _mm512_castsi512_si256(x)
#define UPPER_INTS(x) _mm512_extracti32x8_epi32(x, 1)

INLINE Floats load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, Floats x) { _mm512_storeu_ps(p, x); }
INLINE Floats load_halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_halves(uint16_t *p, Floats x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, 0)); }
INLINE Floats same(float x) { return _mm512_set1_ps(x); }
INLINE Floats times_plus(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
INLINE Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
INLINE Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
/* x * 2^n, n whole and from -126 to 127 */
INLINE Floats scaled(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
INLINE int unordered(Floats x, Floats y) { return _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q) != 0; }
/* A bit for each of the 16 that is above the limit. */
INLINE unsigned above(float limit, Floats x) { return _mm512_cmp_ps_mask(x, same(limit), _CMP_GT_OQ); }
/* The first `count` of x, then those of y; below 0 is as 0, above 16 as 16. */
INLINE Floats first_of(int count, Floats x, Floats y) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_mask_mov_ps(y, _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(count)), x);
}

INLINE Ints load_bytes(const void *p) { return _mm512_loadu_si512(p); }
INLINE Ints same_int(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Ints shifted_right(Ints x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
INLINE Ints low_bits(Ints x, int n) { return _mm512_and_si512(x, _mm512_set1_epi32((1 << n) - 1)); }
INLINE Ints low_nibbles(Ints x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE Ints high_nibbles(Ints x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
/* 16 as the nearest bytes. */
INLINE void store_nearest(int8_t *p, Ints x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(x)); }
/* x + 4 levels (unsigned, below 2^bits) times 4 digits (signed) in each of the 16. x starts at 0, takes at most 8 of
 * these and is what `dotted` makes of it. */
INLINE Ints dot4(Ints x, Ints levels, Ints digits, int bits) {
    (void)bits;
    return _mm512_dpbusd_epi32(x, levels, digits);
}
INLINE Ints dotted(Ints x, int bits) { return (void)bits, x; }

#else /* AVX2: two vectors of 8 */

/* The integers of 4 rows and one of a tile's two vectors fit the 16 registers if nothing else is held there meanwhile.
 * SETTLE: the sums of all blocks are in memory here, and nothing that is read afterwards was read before. */
#define SIDES 1
#define SETTLE(sums) __asm__ volatile("" : "+m"(sums) : : "memory")

typedef struct {
    __m256 a, b;
} Floats;

typedef struct {
    __m256i a, b;
} Ints;

#define UNARY(to, name, from, op) \
    INLINE to name(from x) { return (to){_mm256_##op(x.a), _mm256_##op(x.b)}; }
#define BINARY(type, name, op) \
    INLINE type name(type x, type y) { return (type){_mm256_##op(x.a, y.a), _mm256_##op(x.b, y.b)}; }
#define LOWER(x) (x).a
#define UPPER(x) (x).b
#define LOWER_INTS LOWER
#define UPPER_INTS UPPER

INLINE Floats load(const float *p) { return (Floats){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float *p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE Floats load_halves(const uint16_t *p) {
    const __m128i *from = (const __m128i *)p;
    return (Floats){_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
}
INLINE void store_halves(uint16_t *p, Floats x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128((__m128i *)p + 1, _mm256_cvtps_ph(x.b, 0));
}
INLINE Floats same(float x) { return (Floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats times_plus(Floats x, Floats y, Floats z) {
    return (Floats){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE Floats nearest(Floats x) { return (Floats){_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
INLINE Floats magnitude(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (Floats){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE __m256 power(__m256 n) { /* 2^n, from the bits of a float's exponent */
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE Floats scaled(Floats x, Floats n) {
    return (Floats){_mm256_mul_ps(x.a, power(n.a)), _mm256_mul_ps(x.b, power(n.b))};
}
INLINE int unordered(Floats x, Floats y) {
    __m256 a = _mm256_cmp_ps(x.a, y.a, _CMP_UNORD_Q), b = _mm256_cmp_ps(x.b, y.b, _CMP_UNORD_Q);
    return _mm256_movemask_ps(_mm256_or_ps(a, b));
}
INLINE unsigned above(float limit, Floats x) {
    int a = _mm256_movemask_ps(_mm256_cmp_ps(x.a, _mm256_set1_ps(limit), _CMP_GT_OQ));
    int b = _mm256_movemask_ps(_mm256_cmp_ps(x.b, _mm256_set1_ps(limit), _CMP_GT_OQ));
    return (unsigned)(a | b << 8);
}
INLINE Floats first_of(int count, Floats x, Floats y) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    __m256 a = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
    __m256 b = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lane));
    return (Floats){_mm256_blendv_ps(y.a, x.a, a), _mm256_blendv_ps(y.b, x.b, b)};
}

INLINE Ints load_bytes(const void *p) {
    const __m256i *from = p;
    return (Ints){_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
INLINE Ints same_int(int32_t x) { return (Ints){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Ints shifted_right(Ints x, int n) {
    __m128i count = _mm_cvtsi32_si128(n);
    return (Ints){_mm256_srl_epi32(x.a, count), _mm256_srl_epi32(x.b, count)};
}
INLINE Ints low_bits(Ints x, int n) {
    const __m256i mask = _mm256_set1_epi32((1 << n) - 1);
    return (Ints){_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
INLINE Ints low_nibbles(Ints x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return (Ints){_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
INLINE Ints high_nibbles(Ints x) { return low_nibbles((Ints){_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
INLINE void store_nearest(int8_t *p, Ints x) {
    /* Packing takes 4 of a, 4 of b, 4 of a, 4 of b. */
    __m256i y = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
}
#ifdef __AVXVNNI__
INLINE Ints dot4(Ints x, Ints levels, Ints digits, int bits) {
    (void)bits;
    return (Ints){_mm256_dpbusd_avx_epi32(x.a, levels.a, digits.a), _mm256_dpbusd_avx_epi32(x.b, levels.b, digits.b)};
}
INLINE Ints dotted(Ints x, int bits) { return (void)bits, x; }
#else
/* Products of bytes are added in pairs to 16 bits that saturate. With 4-bit levels 8 of these come to 30,720 at most
 * (8 * 2 * 15 * 128) and stay 16 bits; with 8-bit levels one may pass 32,767: they are multiplied as 16 bits. */
INLINE __m256i dot8(__m256i x, __m256i levels, __m256i digits, int bits) {
    if (bits == 4) return _mm256_add_epi16(x, _mm256_maddubs_epi16(levels, digits));
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(digits, 8), 8), odd = _mm256_srai_epi16(digits, 8);
    x = _mm256_add_epi32(x, _mm256_madd_epi16(_mm256_and_si256(levels, _mm256_set1_epi16(255)), even));
    return _mm256_add_epi32(x, _mm256_madd_epi16(_mm256_srli_epi16(levels, 8), odd));
}
INLINE Ints dot4(Ints x, Ints levels, Ints digits, int bits) {
    x = (Ints){dot8(x.a, levels.a, digits.a, bits), dot8(x.b, levels.b, digits.b, bits)};
    __asm__ volatile("" : "+x"(x.a), "+x"(x.b)); /* in this order: else products of all rows wait in memory for it */
    return x;
}
INLINE Ints dotted(Ints x, int bits) {
    const __m256i one = _mm256_set1_epi16(1);
    return bits == 8 ? x : (Ints){_mm256_madd_epi16(x.a, one), _mm256_madd_epi16(x.b, one)};
}
#endif
#endif

BINARY(Floats, plus, add_ps)
BINARY(Floats, minus, sub_ps)
BINARY(Floats, times, mul_ps)
BINARY(Floats, over, div_ps)
/* If one is NaN, the second. */
BINARY(Floats, larger, max_ps)
BINARY(Floats, smaller, min_ps)
BINARY(Ints, plus_ints, add_epi32)
UNARY(Floats, floats, Ints, cvtepi32_ps)
UNARY(Ints, rounded, Floats, cvtps_epi32) /* what is no number or too large: INT32_MIN */

INLINE Ints same_4(const int8_t *p) { /* these 4 bytes in each of the 16 */
    int32_t four;
    memcpy(&four, p, 4);
    return same_int(four);
}
INLINE float leading(Floats x) { return _mm256_cvtss_f32(LOWER(x)); }
INLINE float half(uint16_t x) { return _cvtsh_ss(x); }

INLINE float sum_of(Floats x) {
    __m256 y = _mm256_add_ps(LOWER(x), UPPER(x));
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}

INLINE float largest(Floats x) {
    __m256 y = _mm256_max_ps(LOWER(x), UPPER(x));
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

INLINE int32_t sum_of_ints(Ints x) {
    __m256i y = _mm256_add_epi32(LOWER_INTS(x), UPPER_INTS(x));
    __m128i z = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_add_epi32(z, _mm_unpackhi_epi64(z, z));
    return _mm_cvtsi128_si32(_mm_add_epi32(z, _mm_shuffle_epi32(z, 1)));
}
