/* The forward of a quantized Llama on an x86-64 processor with AVX2 or better: one call a step, one parallel region a
 * call.
 *
 * Weights are blocks of 32 along the input, 4 or 8 bits a weight, with a scale and a minimum, as a GGUF file holds
 * them; activations are rounded with a scale for each block of 32 in a row: to one 8-bit digit (llama.cpp's Q8_1), or
 * to two in the few blocks that are far larger than their row and would bring most of the error. Sums within a block
 * are integers that a float holds exactly; across blocks they are added in one order, the second digits after all the
 * first. So a row's result never depends on its neighbours, on how many there are, on the number of threads nor on the
 * processor: a step of 1 row and a prefill of 256 take the same way.
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

enum { BLOCK = 32, LANES = 16, TILE = 32, PAGE = 32, ROWS = 4, MOST_GROUP = 8, MOST_HEAD = 256, MOST_ROWS = 256 };

/* A block whose largest value is above so many root mean squares of its row has two digits: one in six of the embedded
 * model's. Its divergence from the file's own distribution is 0.0004 nats so, 0.003 with one digit everywhere. Chosen
 * from six values between 2 and none by that, by speed, and seeing whether an answer that is nearly a tie stayed. */
#define OUTLIER 4.0f

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

/* A block of activations: what the high digit is worth (the low one a 256th of it), the sum of the high digits' values
 * and of the low ones', and of the squares. */
typedef struct {
    float worth, high, low, squares;
} Unit;

typedef struct {
    int8_t *high, *low; /* (rows, width): value = (high + low / 256) * worth, or without the low */
    Unit *units;        /* (rows, width / BLOCK) */
} Digits;

typedef struct {
    int32_t rows, wanted, columns;
    const int64_t *ids;       /* (rows,) */
    const int32_t *positions; /* (rows,) */
    const int32_t *owners;    /* (rows,): which line of `pages` is the row's */
    const int32_t *pages;     /* (owners, columns) */
    const int32_t *last;      /* (wanted,): the rows whose logits are asked, each once */
    float *logits;            /* (wanted, vocab) */
    /* scratch */
    float *x, *qkv;        /* (rows, width), (rows, heads + 2 kv_heads, head_dim) */
    Digits digits, hidden; /* of the widest input but the MLP's, of the MLP's width */
    atomic_int *jobs;      /* zeros, one for each phase */
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
INLINE void digits_of(Floats a, Floats b, const Digits *to, int64_t block) {
    float most = largest(larger(magnitude(a), magnitude(b)));
    if (unordered(a, b)) most = NAN; /* the maximum passed over it */
    const Ints middle = same_int(128);
    const float range = 127 * 256;
    Floats inverse = same(most > 0 ? range / most : 0.0f);
    Ints i = rounded(times(a, inverse)), j = rounded(times(b, inverse));
    Ints k = shifted_down(plus_ints(i, middle), 8), l = shifted_down(plus_ints(j, middle), 8);
    int8_t *high = to->high + block * BLOCK, *low = to->low + block * BLOCK;
    store_nearest(high, k);
    store_nearest(high + LANES, l);
    store_lowest(low, i); /* what is left to the nearest multiple of 256 */
    store_lowest(low + LANES, j);
    float least = most / range, sum = (float)sum_of_ints(plus_ints(i, j));
    float highs = 256 * (float)sum_of_ints(plus_ints(k, l));
    to->units[block] = (Unit){
        least * 256,
        least * highs,
        least * (sum - highs),
        sum_of(times_plus(a, a, times(b, b))),
    };
}

#define WORDS(blocks) (((blocks) + 63) / 64)

/* Which blocks of each row have two digits: (rows, WORDS(blocks)), a bit for each. */
static void outliers(const Digits *from, int rows, int blocks, uint64_t *two) {
    const Unit *unit = from->units;
    memset(two, 0, sizeof(uint64_t) * rows * WORDS(blocks));
    for (int r = 0; r < rows; r++, unit += blocks, two += WORDS(blocks)) {
        float squares = 0;
        for (int b = 0; b < blocks; b++) squares += unit[b].squares;
        float limit = sqrtf(squares / (float)(blocks * BLOCK)) * (OUTLIER / 127);
        for (int b = 0; b < blocks; b++) two[b / 64] |= (uint64_t)(unit[b].worth > limit) << b % 64;
    }
}

/* Row `to_row` of digits: this one, normalized (root mean square). */
static void norm_row(const float *x, const float *weight, int width, float epsilon, const Digits *to, int64_t to_row) {
    Floats sum = same(0);
    for (int i = 0; i < width; i += LANES) {
        Floats v = load(x + i);
        sum = times_plus(v, v, sum);
    }
    Floats factor = same(1.0f / sqrtf(sum_of(sum) / (float)width + epsilon));
    for (int i = 0; i < width; i += BLOCK) {
        Floats a = times(times(load(x + i), factor), load(weight + i));
        Floats b = times(times(load(x + i + LANES), factor), load(weight + i + LANES));
        digits_of(a, b, to, (to_row * width + i) / BLOCK);
    }
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

/* One tile for the first digits of `rows` rows, a constant where it is inlined: sum[r], its 32 outputs. ahead: `share`
 * bytes of it for each block are fetched from memory.
 *
 * Not faster with AVX2: 5 or 6 rows, digits fetched ahead, 8-bit digits widened once a block. To unpack a tile once for
 * many rows gained 4 %, not enough. */
INLINE void first_digits(
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
                weigh(tile, bits, x[r], units[r * blocks].worth, units[r * blocks].high, &a[r][side]);
        }
    }
    for (int r = 0; r < rows; r++) sum[r][0] = a[r][0], sum[r][1] = a[r][1];
}

/* sum += the second digits of a row, where `two` says that it has them. */
INLINE void second_digits(
    const uint8_t *tile, int bits, int blocks, const int8_t *digits, const Unit *units, const uint64_t *two,
    Floats *sum) {
    Ints x[1][SIDES];
    for (int word = 0; word < WORDS(blocks); word++) {
        for (uint64_t left = two[word]; left; left &= left - 1) {
            int block = word * 64 + __builtin_ctzll(left);
            const uint8_t *face = tile + (int64_t)block * 2 * FACE(bits);
            for (int side = 0; side < 2; side += SIDES, face += SIDES * FACE(bits)) {
                dots(face, bits, digits + block * BLOCK, 0, 1, x);
                weigh(face, bits, x[0], units[block].worth / 256, units[block].low, &sum[side]);
            }
        }
    }
}

/* ROWS rows of a tile, from `first` on, or those that are left of `all`; how many there are changes no row. */
static int tile_some(
    const Matrix *m, int index, const Digits *from, int first, int all, const uint64_t *two, Floats (*sum)[2]) {
    int rows = all - first < ROWS ? all - first : ROWS, blocks = m->in / BLOCK;
    int64_t bytes = tile_bytes(m), at = (int64_t)first * blocks;
    const uint8_t *tile = m->data + index * bytes;
    const int8_t *high = from->high + at * BLOCK, *low = from->low + at * BLOCK;
    const Unit *units = from->units + at;
    /* While some rows take this tile, their share of the next one comes from memory. */
    const uint8_t *ahead = tile + bytes + bytes * first / all;
    int share = 0;
    if (all <= 2 * ROWS) share = (int)(bytes / blocks * rows / all);
    else for (int64_t i = 0; i < bytes * rows / all; i += 64) _mm_prefetch((const char *)ahead + i, _MM_HINT_T1);
    switch (rows * 16 + m->bits) {
#define CASE(n, bits) \
    case n * 16 + bits: first_digits(tile, bits, blocks, high, units, n, ahead, share, sum); break;
        CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(1, 8) CASE(2, 8) CASE(3, 8) CASE(4, 8)
#undef CASE
    }
    two += first * WORDS(blocks);
    for (int r = 0; r < rows; r++, low += blocks * BLOCK, units += blocks, two += WORDS(blocks)) {
        if (m->bits == 4) second_digits(tile, 4, blocks, low, units, two, sum[r]);
        else second_digits(tile, 8, blocks, low, units, two, sum[r]);
    }
    return rows;
}

/* out = rows @ matrix.T, a phase; or, with `which`, these rows of out += it, each once. out: (.., matrix->out) */
static void product(Worker *w, const Matrix *m, const Digits *from, const int32_t *which, int rows, float *out) {
    Floats sum[ROWS][2];
    uint64_t two[rows * WORDS(m->in / BLOCK)];
    outliers(from, rows, m->in / BLOCK, two);
    EACH(w, m->out / TILE, tile) {
        for (int first = 0; first < rows; first += ROWS) {
            int some = tile_some(m, tile, from, first, rows, two, sum);
            for (int r = 0; r < some; r++) {
                float *to = out + (int64_t)(which ? which[first + r] : first + r) * m->out + tile * TILE;
                for (int i = 0; i < 2; i++, to += LANES)
                    store(to, which ? plus(load(to), sum[r][i]) : sum[r][i]);
            }
        }
    }
    meet(w);
}

/* digits of silu(gate) * up, a phase. The matrix holds all gates, then all ups. */
static void gated(Worker *w, const Matrix *m, const Digits *from, int rows, const Digits *to) {
    Floats gates[ROWS][2], ups[ROWS][2];
    uint64_t two[rows * WORDS(m->in / BLOCK)];
    const Floats one = same(1.0f);
    int tiles = m->out / 2 / TILE;
    outliers(from, rows, m->in / BLOCK, two);
    EACH(w, tiles, tile) {
        for (int first = 0; first < rows; first += ROWS) {
            int some = tile_some(m, tile, from, first, rows, two, gates);
            tile_some(m, tiles + tile, from, first, rows, two, ups);
            for (int r = 0; r < some; r++) {
                Floats value[2];
                for (int i = 0; i < 2; i++) {
                    Floats below = plus(one, exponential(minus(same(0), gates[r][i])));
                    value[i] = times(over(gates[r][i], below), ups[r][i]);
                }
                /* A tile's outputs are a block of the next matrix's inputs. */
                digits_of(value[0], value[1], to, (int64_t)(first + r) * tiles + tile);
            }
        }
    }
    meet(w);
}

/* Digits of these rows, normalized, a phase. */
static void normed(Worker *w, const Step *s, const int32_t *which, int rows, int width, const float *norm) {
    EACH(w, rows, r) norm_row(s->x + (int64_t)which[r] * width, norm, width, w->region->m->epsilon, &s->digits, r);
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

/* Digits `at` and on: of what `rows` of these rows, 1 or 2, see through one key head. */
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
        for (int i = 0; i < dim; i += BLOCK)
            digits_of(load(seen[g] + i), load(seen[g] + i + LANES), &s->digits, (to + i) / BLOCK);
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
        product(w, &layer->qkv, &s->digits, NULL, rows, s->qkv);
        EACH(w, rows, r) turn_row(m, s, i, r);
        meet(w);
        /* What the last layer makes of the others nobody reads. */
        if (i == m->layers - 1) which = s->last, rows = s->wanted;
        if (!rows) return;
        EACH(w, (rows + 1) / 2 * m->kv_heads, job)
            attend_two(m, s, i, which, 2 * (job / m->kv_heads), rows, job % m->kv_heads);
        meet(w);
        product(w, &layer->output, &s->digits, which, rows, s->x);
        normed(w, s, which, rows, width, layer->mlp_norm);
        gated(w, &layer->gate_up, &s->digits, rows, &s->hidden);
        product(w, &layer->down, &s->hidden, which, rows, s->x);
    }
    normed(w, s, s->last, s->wanted, width, m->norm);
    product(w, &m->head, &s->digits, NULL, s->wanted, s->logits);
}

/* Phases of a step: so many counters `jobs` must hold. */
int32_t lab_phases(const Model *m) { return 1 + 8 * m->layers + 2; }

void lab_step(const Model *m, const Step *s) {
    Region region = {m, s, 0, 0};
    if (m->threads == 1) work(&region);
    else m->parallel(work, &region, (unsigned)m->threads, 0);
}
