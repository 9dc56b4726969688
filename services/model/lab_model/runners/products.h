/* Activations rounded to 8 bits, and their products with quantized matrices.
 *
 * Knows rows and matrices. Knows nothing of attention or pages.
 */
#pragma once
#include <math.h>

#include "step.h"

/* ---- numbers */

INLINE Floats exponential(Floats x) {
    x = larger(same(-87.0f), smaller(same(88.0f), x)); /* NaN is kept, because it is the second operand */
    Floats n = nearest(times(x, same(1.44269504f)));
    Floats r = times_plus(n, same(-0.693359375f), x);
    r = times_plus(n, same(2.12194440e-4f), r);
    Floats y = same(1.9875691500e-4f); /* Cephes' expf */
    y = times_plus(y, r, same(1.3981999507e-3f));
    y = times_plus(y, r, same(8.3334519073e-3f));
    y = times_plus(y, r, same(4.1665795894e-2f));
    y = times_plus(y, r, same(1.6666665459e-1f));
    y = times_plus(y, r, same(5.0000001201e-1f));
    y = times_plus(y, times(r, r), plus(r, same(1.0f)));
    return scaled(y, n);
}

/* 32 values as digits; a NaN makes all of them NaN. */
INLINE void round_block(Floats a, Floats b, int8_t *digits, Unit *unit) {
    float most = largest(larger(magnitude(a), magnitude(b)));
    if (unordered(a, b)) most = NAN; /* the maximum ignored it */
    Floats inverse = same(most > 0 ? 127 / most : 0.0f);
    Ints i = rounded(times(a, inverse)), j = rounded(times(b, inverse));
    store_nearest(digits, i);
    store_nearest(digits + LANES, j);
    *unit = (Unit){most / 127, most / 127 * (float)sum_of_ints(plus_ints(i, j))};
}

/* Row `row` of `to`: these values, of which the peaks are set to 0. */
static void round_row(float *values, int width, const Rounded *to, int64_t row) {
    int8_t *digits = to->digits + row * width;
    Unit *unit = to->units + row * (width / BLOCK);
    Peak *peaks = to->peaks + row * MOST_PEAKS(width);
    Floats squares = same(0);
    for (int i = 0; i < width; i += LANES) squares = times_plus(load(values + i), load(values + i), squares);
    float limit = PEAK * sqrtf(sum_of(squares) / (float)width);
    int count = 0;
    for (int i = 0; i < width; i += LANES) {
        for (unsigned left = above(limit, magnitude(load(values + i))); left; left &= left - 1) {
            int place = i + __builtin_ctz(left);
            if (count == MOST_PEAKS(width)) break; /* by rounding, or because squares are too small for a float */
            peaks[count++] = (Peak){values[place], place};
            values[place] = 0;
        }
    }
    to->counts[row] = count;
    for (int i = 0; i < width; i += BLOCK, digits += BLOCK, unit++)
        round_block(load(values + i), load(values + i + LANES), digits, unit);
}

/* to = x, normalized (root mean square). */
static void norm_row(const float *x, const float *weight, int width, float epsilon, float *to) {
    Floats sum = same(0);
    for (int i = 0; i < width; i += LANES) {
        Floats v = load(x + i);
        sum = times_plus(v, v, sum);
    }
    Floats factor = same(1.0f / sqrtf(sum_of(sum) / (float)width + epsilon));
    for (int i = 0; i < width; i += LANES) store(to + i, times(times(load(x + i), factor), load(weight + i)));
}

/* ---- matrix products */

/* Bytes of a block of a tile, for one vector of its outputs. */
#define FACE(bits) ((bits) * 64 + 64)

static inline int64_t tile_bytes(const Matrix *m) { return (int64_t)(m->in / BLOCK) * 2 * FACE(m->bits); }

/* x[r]: a block's sums for `rows` rows, a constant where it is inlined, and SIDES vectors of outputs from `face` on.
 * digits: the first row's, the next one's `width` further. */
INLINE void dots(const uint8_t *face, int bits, const int8_t *digits, int64_t width, int rows, Ints (*x)[SIDES]) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < SIDES; i++) x[r][i] = same_int(0);
#pragma GCC unroll 8
    for (int g = 0; g < bits; g++, face += 64, digits += 4) {
        for (int upper = 0; upper < (bits == 4 ? 2 : 1); upper++) {
            Ints w[SIDES];
            for (int i = 0; i < SIDES; i++) {
                w[i] = load_bytes(face + i * FACE(bits));
                if (bits == 4) w[i] = upper ? high_nibbles(w[i]) : low_nibbles(w[i]);
            }
            for (int r = 0; r < rows; r++) {
                Ints d = same_4(digits + r * width + upper * 16);
                for (int i = 0; i < SIDES; i++) x[r][i] = dot4(x[r][i], w[i], d, bits);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < SIDES; i++) x[r][i] = dotted(x[r][i], bits);
}

/* a += a block's sums x, scaled by `worth`, and its minima times `whole`. */
INLINE void weigh(const uint8_t *face, int bits, const Ints *x, float worth, float whole, Floats *a) {
    for (int i = 0; i < SIDES; i++) {
        const uint16_t *facts = (const uint16_t *)(face + i * FACE(bits) + bits * 64);
        a[i] = times_plus(floats(x[i]), times(load_halves(facts), same(worth)), a[i]);
        a[i] = times_plus(load_halves(facts + LANES), same(whole), a[i]);
    }
}

/* One tile for the digits of `rows` rows, a constant where it is inlined: sum[r], its 32 outputs. ahead: `share` bytes
 * of it for each block are fetched from memory.
 *
 * Not faster with AVX2: 5 or 6 rows, digits fetched ahead, 8-bit digits widened once a block. To unpack a tile once for
 * many rows gained 4 %, not enough. */
INLINE void all_blocks(
    const uint8_t *tile, int bits, int blocks, const int8_t *digits, const Unit *units, int rows, const uint8_t *ahead,
    int share, Floats (*sum)[2]) {
    Floats a[ROWS][2];
    Ints x[ROWS][SIDES];
    for (int r = 0; r < rows; r++) a[r][0] = a[r][1] = same(0);
    for (int block = 0; block < blocks; block++, digits += BLOCK, units++) {
        for (int line = 0; line < share; line += 64) _mm_prefetch((const char *)ahead + line, _MM_HINT_T0);
        ahead += share;
#pragma GCC unroll 1 /* else the compiler keeps the digits for the other side, in memory */
        for (int side = 0; side < 2; side += SIDES, tile += SIDES * FACE(bits)) {
            dots(tile, bits, digits, (int64_t)blocks * BLOCK, rows, x);
            SETTLE(a);
            for (int r = 0; r < rows; r++)
                weigh(tile, bits, x[r], units[r * blocks].worth, units[r * blocks].sum, &a[r][side]);
        }
    }
    for (int r = 0; r < rows; r++) sum[r][0] = a[r][0], sum[r][1] = a[r][1];
}

/* sum += a row's peaks times one tile. */
INLINE void all_peaks(const uint8_t *tile, int bits, const Peak *peak, int count, Floats *sum) {
    for (; count--; peak++) {
        unsigned place = (unsigned)peak->place, group = place % BLOCK / 4;
        int shift = place % 4 * 8 + (group < (unsigned)bits ? 0 : 4);
        const uint8_t *face = tile + (int64_t)(place / BLOCK) * 2 * FACE(bits);
        for (int i = 0; i < 2; i++, face += FACE(bits)) {
            const uint16_t *facts = (const uint16_t *)(face + bits * 64);
            Floats level = floats(low_bits(shifted_right(load_bytes(face + group % bits * 64), shift), bits));
            Floats weight = times_plus(level, load_halves(facts), load_halves(facts + LANES));
            sum[i] = times_plus(weight, same(peak->value), sum[i]);
        }
    }
}

/* ROWS rows of a tile, from `first` on, or fewer at the end of `all`; their number does not change a row's result. */
static int tile_some(const Matrix *m, int index, const Rounded *from, int first, int all, Floats (*sum)[2]) {
    int rows = all - first < ROWS ? all - first : ROWS, blocks = m->in / BLOCK;
    int64_t bytes = tile_bytes(m), at = (int64_t)first * blocks;
    const uint8_t *tile = m->data + index * bytes;
    const int8_t *digits = from->digits + at * BLOCK;
    const Unit *units = from->units + at;
    /* While some rows take this tile, their share of the next one comes from memory. */
    const uint8_t *ahead = tile + bytes + bytes * first / all;
    int share = 0;
    if (all <= 2 * ROWS) share = (int)(bytes / blocks * rows / all);
    else for (int64_t i = 0; i < bytes * rows / all; i += 64) _mm_prefetch((const char *)ahead + i, _MM_HINT_T1);
    switch (rows * 16 + m->bits) {
#define CASE(n, bits) \
    case n * 16 + bits: all_blocks(tile, bits, blocks, digits, units, n, ahead, share, sum); break;
        CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(1, 8) CASE(2, 8) CASE(3, 8) CASE(4, 8)
#undef CASE
    }
    for (int r = 0; r < rows; r++) {
        const Peak *peaks = from->peaks + (int64_t)(first + r) * MOST_PEAKS(m->in);
        if (m->bits == 4) all_peaks(tile, 4, peaks, from->counts[first + r], sum[r]);
        else all_peaks(tile, 8, peaks, from->counts[first + r], sum[r]);
    }
    return rows;
}

/* out = rows @ matrix.T, a phase; or, with `which`, these rows of out += it, each once. out: (.., matrix->out) */
static void product(Worker *w, const Matrix *m, const Rounded *from, const int32_t *which, int rows, float *out) {
    Floats sum[ROWS][2];
    EACH(w, m->out / TILE, tile) {
        for (int first = 0; first < rows; first += ROWS) {
            int some = tile_some(m, tile, from, first, rows, sum);
            for (int r = 0; r < some; r++) {
                float *to = out + (int64_t)(which ? which[first + r] : first + r) * m->out + tile * TILE;
                for (int i = 0; i < 2; i++, to += LANES)
                    store(to, which ? plus(load(to), sum[r][i]) : sum[r][i]);
            }
        }
    }
    meet(w);
}

/* out = silu(gate) * up, a phase. The matrix holds all gates, then all ups. out: (rows, matrix->out / 2) */
static void gated(Worker *w, const Matrix *m, const Rounded *from, int rows, float *out) {
    Floats gates[ROWS][2], ups[ROWS][2];
    const Floats one = same(1.0f);
    int tiles = m->out / 2 / TILE;
    EACH(w, tiles, tile) {
        for (int first = 0; first < rows; first += ROWS) {
            int some = tile_some(m, tile, from, first, rows, gates);
            tile_some(m, tiles + tile, from, first, rows, ups);
            for (int r = 0; r < some; r++) {
                float *to = out + ((int64_t)(first + r) * tiles + tile) * TILE;
                for (int i = 0; i < 2; i++) {
                    Floats below = plus(one, exponential(minus(same(0), gates[r][i])));
                    store(to + i * LANES, times(over(gates[r][i], below), ups[r][i]));
                }
            }
        }
    }
    meet(w);
}

/* These rows, normalized and rounded, a phase. */
static void normed(Worker *w, const Step *s, const int32_t *which, int rows, int width, const float *norm) {
    EACH(w, rows, r) {
        float *values = s->values + (int64_t)r * width;
        norm_row(s->x + (int64_t)which[r] * width, norm, width, w->region->m->epsilon, values);
        round_row(values, width, &s->rounded, r);
    }
    meet(w);
}

/* The first `rows` rows of values, rounded, a phase. */
static void round_all(Worker *w, const Step *s, int rows, int width) {
    EACH(w, rows, r) round_row(s->values + (int64_t)r * width, width, &s->rounded, r);
    meet(w);
}
