/* The forward of a quantized Llama on an x86-64 processor with AVX2 or better: one call a step, one parallel region a
 * call.
 *
 * Weights are blocks of 32 along the input, 4 or 8 bits a weight, with a scale and a minimum, as a GGUF file holds
 * them; activations are rounded to 8 bits with a scale for each block of 32 in a row (llama.cpp's Q8_1), but for the
 * peaks: the few values that are far larger than their row and would bring most of the error are multiplied as they
 * are. Sums within a block are integers that a float holds exactly; across blocks they are added in one order, the
 * peaks after all blocks. So a row's result never depends on its neighbours, on how many there are, on the number of
 * threads nor on the processor: a step of 1 row and a prefill of 256 take the same way.
 *
 * Knows rows, pages and weights; knows nothing of requests. native.py packs the weights, fills the structures below and
 * is the only caller; vectors.h holds what processors differ in. GNU C11; no library but the OpenMP runtime that
 * torch has loaded already.
 */
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "vectors.h"

enum { BLOCK = 32, LANES = 16, TILE = 32, PAGE = 32, ROWS = 4 };
enum { MOST_GROUP = 8, MOST_HEAD = 256, MOST_ROWS = 256, PEAK = 4 };

/* A peak is a value above PEAK root mean squares of its row: at most one in PEAK * PEAK, of the embedded model's values
 * one in 150. Its divergence from the file's own distribution is 0.0007 nats so, 0.0004 with 3 and 0.003 without peaks;
 * with AVX2 a prefill takes 7 % more with 3, and 10 % less without. */
#define MOST_PEAKS(width) ((width) / (PEAK * PEAK))

/* ---- what native.py fills (the same fields in the same order there) */

/* (out, in): tiles of 32 outputs; in a tile block after block; in a block first 16 outputs, then the others: levels of
 * 8 groups of 4 inputs for each output, 16 scales, 16 minima (float16). weight = level * scale + minimum. Of 4 bits
 * groups 0-3 are the low halves of bytes whose high halves are groups 4-7. */
typedef struct {
    const uint8_t *data;
    int32_t out, in, bits;
} Matrix;

typedef struct {
    const float *norm;
    Matrix qkv, output;
    const float *mlp_norm;
    Matrix gate_up, down;
} Layer;

typedef struct {
    int32_t layers, heads, kv_heads, head_dim, threads;
    float epsilon;
    const Layer *layer;
    Matrix table, head; /* table: the embedding, (vocab, width) */
    const float *norm;
    const float *turns; /* (context, head_dim / 2, 2): cosine and sine */
    /* (layers, pages, kv_heads, 2, PAGE * head_dim) float16: keys (head_dim, PAGE), values (PAGE, head_dim) */
    uint16_t *pool;
    int64_t pages;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
    int (*team)(void);                                              /* omp_get_num_threads */
} Model;

/* A block of activations: what a digit is worth, and the sum of all digits' values. */
typedef struct {
    float worth, sum;
} Unit;

typedef struct {
    float value;
    int32_t place;
} Peak;

/* Rows of activations: value = digit * worth, or a peak, whose digit is 0. */
typedef struct {
    int8_t *digits;  /* (rows, width) */
    Unit *units;     /* (rows, width / BLOCK) */
    Peak *peaks;     /* (rows, MOST_PEAKS(width)) */
    int32_t *counts; /* (rows,): how many peaks */
} Rounded;

typedef struct {
    int32_t rows, wanted, columns;
    const int64_t *ids;       /* (rows,) */
    const int32_t *positions; /* (rows,) */
    const int32_t *owners;    /* (rows,): which line of `pages` is the row's */
    const int32_t *pages;     /* (owners, columns) */
    const int32_t *last;      /* (wanted,): the rows whose logits are asked, each once */
    float *logits;            /* (wanted, vocab) */
    /* scratch */
    float *x, *qkv, *values; /* (rows, width), (rows, heads + 2 kv_heads, head_dim), (rows, the widest input) */
    Rounded rounded;         /* of the widest input */
    atomic_int *jobs;        /* zeros, one for each phase */
} Step;

/* ---- the team: phases of jobs, a barrier after each */

typedef struct {
    const Model *m;
    const Step *s;
    atomic_int arrived, generation;
} Region;

typedef struct {
    Region *region;
    int threads, phase;
} Worker;

static void meet(Worker *w) {
    w->phase++;
    if (w->threads == 1) return;
    Region *r = w->region;
    int generation = atomic_load_explicit(&r->generation, memory_order_acquire);
    if (atomic_fetch_add(&r->arrived, 1) == w->threads - 1) {
        atomic_store(&r->arrived, 0);
        atomic_fetch_add(&r->generation, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&r->generation, memory_order_acquire) == generation; spins++) {
        if (spins < 4000) _mm_pause();
        else sched_yield(); /* a fellow lost its core */
    }
}

/* The next jobs of this phase, [*from, *to); false when none are left. A slow core takes fewer of them: few at a time
 * towards the end, so that nobody waits long for the last. */
static int take(Worker *w, int jobs, int *from, int *to) {
    atomic_int *taken = &w->region->s->jobs[w->phase];
    int some = (jobs - atomic_load_explicit(taken, memory_order_relaxed)) / (w->threads * 4);
    if (some < 1) some = 1;
    *from = atomic_fetch_add_explicit(taken, some, memory_order_relaxed);
    *to = *from + some < jobs ? *from + some : jobs;
    return *from < jobs;
}

#define EACH(w, jobs, i) \
    for (int from_, to_; take(w, jobs, &from_, &to_);) \
        for (int i = from_; i < to_; i++)

/* ---- numbers */

INLINE Floats exponential(Floats x) {
    x = larger(same(-87.0f), smaller(same(88.0f), x)); /* NaN stays: the second operand */
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

/* 32 values as digits; one that is no number makes all of them none. */
INLINE void round_block(Floats a, Floats b, int8_t *digits, Unit *unit) {
    float most = largest(larger(magnitude(a), magnitude(b)));
    if (unordered(a, b)) most = NAN; /* the maximum passed over it */
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
            if (count == MOST_PEAKS(width)) break; /* by a hair, or squares too small for a float */
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

/* a += a block's sums x, one of which is worth `worth`, and its minima times `whole`. */
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

/* ROWS rows of a tile, from `first` on, or those that are left of `all`; how many there are changes no row. */
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

/* ---- attention */

/* The keys of a page and head, (head_dim, PAGE); its values, (PAGE, head_dim), follow. */
static inline uint16_t *page_of(const Model *m, int layer, int page, int head) {
    return m->pool + (((int64_t)layer * m->pages + page) * m->kv_heads + head) * 2 * PAGE * m->head_dim;
}

/* Queries (scaled) and keys turned by their position; keys and values into the row's page. */
static void turn_row(const Model *m, const Step *s, int layer, int row) {
    int dim = m->head_dim, both = m->heads + m->kv_heads, position = s->positions[row];
    float *heads = s->qkv + (int64_t)row * (both + m->kv_heads) * dim;
    const float *turns = m->turns + (int64_t)position * dim;
    float scale = 1.0f / sqrtf((float)dim);
    for (int h = 0; h < both; h++) {
        float *head = heads + h * dim, by = h < m->heads ? scale : 1.0f;
        for (int i = 0; i < dim; i += 2) {
            float a = head[i] * by, b = head[i + 1] * by;
            head[i] = a * turns[i] - b * turns[i + 1];
            head[i + 1] = a * turns[i + 1] + b * turns[i];
        }
    }
    int page = s->pages[(int64_t)s->owners[row] * s->columns + position / PAGE], place = position % PAGE;
    for (int h = 0; h < m->kv_heads; h++) {
        uint16_t *keys = page_of(m, layer, page, h), *values = keys + PAGE * dim + place * dim;
        const float *key = heads + (m->heads + h) * dim, *value = heads + (both + h) * dim;
        for (int i = 0; i < dim; i += LANES) {
            uint16_t halves[LANES];
            store_halves(halves, load(key + i));
            for (int j = 0; j < LANES; j++) keys[(i + j) * PAGE + place] = halves[j];
            store_halves(values + i, load(value + i));
        }
    }
}

/* What `count` (a constant where it is inlined) query heads see of `tokens` tokens through one key head, page by page
 * with a running maximum (https://arxiv.org/abs/1805.02867). `later` of them, the last ones, see one token more, in the
 * same page. queries: the heads'; seen: (count, MOST_HEAD), of which head_dim are filled */
INLINE void look(
    const Model *m, int layer, int head, const int32_t *pages, const float *const *queries, int count, int tokens,
    int later, float (*seen)[MOST_HEAD]) {
    int dim = m->head_dim;
    float most[MOST_GROUP], mass[MOST_GROUP], part[MOST_GROUP][PAGE], fade[MOST_GROUP];
    for (int g = 0; g < count; g++) {
        most[g] = -INFINITY, mass[g] = 0;
        memset(seen[g], 0, sizeof(float) * dim);
    }
    for (int first = 0; first < tokens; first += PAGE) {
        int here = tokens - first < PAGE ? tokens - first : PAGE;
        int there = here < PAGE && later ? here + 1 : here;
        const uint16_t *keys = page_of(m, layer, pages[first / PAGE], head), *values = keys + PAGE * dim;
        Floats score[MOST_GROUP][2];
        for (int side = 0; side < 2; side += SIDES) {
            Floats sum[MOST_GROUP][SIDES], key[SIDES];
            for (int g = 0; g < count; g++)
                for (int j = 0; j < SIDES; j++) sum[g][j] = same(0);
            for (int i = 0; i < dim; i++) {
                for (int j = 0; j < SIDES; j++) key[j] = load_halves(keys + i * PAGE + (side + j) * LANES);
                for (int g = 0; g < count; g++)
                    for (int j = 0; j < SIDES; j++) sum[g][j] = times_plus(same(queries[g][i]), key[j], sum[g][j]);
            }
            for (int g = 0; g < count; g++)
                for (int j = 0; j < SIDES; j++) score[g][side + j] = sum[g][j];
        }
        for (int g = 0; g < count; g++) {
            const Floats never = same(-INFINITY), none = same(0); /* the rest of the page is not the row's */
            int own = g < count - later ? here : there;
            Floats a = first_of(own, score[g][0], never), b = first_of(own - LANES, score[g][1], never);
            float high = largest(larger(a, b));
            if (!(high > most[g])) high = most[g];
            /* exp(-inf) is not zero here; the first page has nothing to fade. */
            fade[g] = first ? leading(exponential(same(most[g] - high))) : 0.0f;
            most[g] = high;
            a = first_of(own, exponential(minus(a, same(high))), none);
            b = first_of(own - LANES, exponential(minus(b, same(high))), none);
            store(part[g], a);
            store(part[g] + LANES, b);
            mass[g] = mass[g] * fade[g] + sum_of(plus(a, b));
        }
        /* A few heads take twice as much at once: additions that wait for each other are slow. */
        int vectors = count > 3 ? 1 : 2;
        for (int i = 0; i < dim; i += vectors * LANES) {
            Floats sum[MOST_GROUP][2];
            const uint16_t *value = values + i;
            for (int g = 0; g < count; g++)
                for (int j = 0; j < vectors; j++) sum[g][j] = times(load(seen[g] + i + j * LANES), same(fade[g]));
            for (int t = 0; t < here; t++, value += dim) {
                for (int j = 0; j < vectors; j++) {
                    Floats v = load_halves(value + j * LANES);
                    for (int g = 0; g < count; g++) sum[g][j] = times_plus(same(part[g][t]), v, sum[g][j]);
                }
            }
            /* Not for all, though the others' part is 0: a value may be no number. */
            for (int j = 0; j < vectors && there > here; j++) {
                Floats v = load_halves(value + j * LANES);
                for (int g = count - later; g < count; g++) sum[g][j] = times_plus(same(part[g][here]), v, sum[g][j]);
            }
            for (int g = 0; g < count; g++)
                for (int j = 0; j < vectors; j++) store(seen[g] + i + j * LANES, sum[g][j]);
        }
    }
    for (int g = 0; g < count; g++) {
        Floats by = same(1.0f / mass[g]);
        for (int i = 0; i < dim; i += LANES) store(seen[g] + i, times(load(seen[g] + i), by));
    }
}

/* Values `at` and on: what `rows` of these rows, 1 or 2, see through one key head. */
static void attend(const Model *m, const Step *s, int layer, const int32_t *which, int at, int rows, int head) {
    int dim = m->head_dim, group = m->heads / m->kv_heads, all = m->heads + 2 * m->kv_heads;
    const int32_t *pages = s->pages + (int64_t)s->owners[which[at]] * s->columns;
    const float *queries[MOST_GROUP];
    float seen[MOST_GROUP][MOST_HEAD];
    for (int g = 0; g < rows * group; g++)
        queries[g] = s->qkv + ((int64_t)which[at + g / group] * all + head * group + g % group) * dim;
    int tokens = s->positions[which[at]] + 1;
    switch (rows * 16 + group) {
#define CASE(rows, n) \
    case rows * 16 + n: look(m, layer, head, pages, queries, rows * n, tokens, (rows - 1) * n, seen); break;
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8)
        CASE(2, 1) CASE(2, 2) CASE(2, 3)
#undef CASE
    }
    for (int g = 0; g < rows * group; g++) {
        int64_t to = (((int64_t)at + g / group) * m->heads + head * group + g % group) * dim;
        memcpy(s->values + to, seen[g], sizeof(float) * dim);
    }
}

/* The same for two rows, or the one that is left of `rows`. Those that follow each other in a text and a page read its
 * keys and values together, if their heads fit AVX2's registers. */
static void attend_two(const Model *m, const Step *s, int layer, const int32_t *which, int at, int rows, int head) {
    int two = at + 1 < rows, row = which[at], next = two ? which[at + 1] : row, position = s->positions[row] + 1;
    if (s->positions[next] == position && s->owners[next] == s->owners[row] && position % PAGE &&
        m->heads / m->kv_heads <= 3) {
        attend(m, s, layer, which, at, 2, head);
    } else {
        attend(m, s, layer, which, at, 1, head);
        if (two) attend(m, s, layer, which, at + 1, 1, head);
    }
}

/* ---- the step */

static float weight_at(const Matrix *m, int row, int column) {
    int face = column / BLOCK * 2 + row % TILE / LANES;
    const uint8_t *block = m->data + row / TILE * tile_bytes(m) + face * FACE(m->bits);
    int group = column % BLOCK / 4, lane = row % LANES, at = lane * 4 + column % 4;
    int level = m->bits == 8 ? block[group * 64 + at] : block[group % 4 * 64 + at] >> (group < 4 ? 0 : 4) & 15;
    const uint16_t *facts = (const uint16_t *)(block + m->bits * 64);
    return (float)level * half(facts[lane]) + half(facts[LANES + lane]);
}

static void work(void *given) {
    Region *region = given;
    const Model *m = region->m;
    const Step *s = region->s;
    Worker worker = {region, m->threads > 1 ? m->team() : 1, 0}, *w = &worker;
    int rows = s->rows, width = m->table.in;
    int32_t all[MOST_ROWS];
    const int32_t *which = all;
    for (int r = 0; r < rows; r++) all[r] = r;
    EACH(w, rows, r) {
        float *x = s->x + (int64_t)r * width;
        for (int i = 0; i < width; i++) x[i] = weight_at(&m->table, (int)s->ids[r], i);
    }
    meet(w);
    for (int i = 0; i < m->layers; i++) {
        const Layer *layer = &m->layer[i];
        normed(w, s, which, rows, width, layer->norm);
        product(w, &layer->qkv, &s->rounded, NULL, rows, s->qkv);
        EACH(w, rows, r) turn_row(m, s, i, r);
        meet(w);
        /* What the last layer makes of the others nobody reads. */
        if (i == m->layers - 1) which = s->last, rows = s->wanted;
        if (!rows) return;
        EACH(w, (rows + 1) / 2 * m->kv_heads, job)
            attend_two(m, s, i, which, 2 * (job / m->kv_heads), rows, job % m->kv_heads);
        meet(w);
        round_all(w, s, rows, layer->output.in);
        product(w, &layer->output, &s->rounded, which, rows, s->x);
        normed(w, s, which, rows, width, layer->mlp_norm);
        gated(w, &layer->gate_up, &s->rounded, rows, s->values);
        round_all(w, s, rows, layer->down.in);
        product(w, &layer->down, &s->rounded, which, rows, s->x);
    }
    normed(w, s, s->last, s->wanted, width, m->norm);
    product(w, &m->head, &s->rounded, NULL, s->wanted, s->logits);
}

/* Phases of a step: so many counters `jobs` must hold. */
int32_t lab_phases(const Model *m) { return 1 + 10 * m->layers + 2; }

void lab_step(const Model *m, const Step *s) {
    Region region = {m, s, 0, 0};
    if (m->threads == 1) work(&region);
    else m->parallel(work, &region, (unsigned)m->threads, 0);
}
