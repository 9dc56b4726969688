/* The forward of a quantized Llama on a CPU with AVX-512 VNNI: one call a step, one parallel region a call.
 *
 * Weights are blocks of 32 along the input, 4 or 8 bits a weight, with a scale and a minimum, as a GGUF file holds them;
 * activations are rounded with a scale for each block of 32 in a row: to one 8-bit digit (llama.cpp's Q8_1), or to two in
 * the few blocks that are far larger than their row and would bring most of the error. Sums within a block are integers;
 * across blocks they are added in one order. So a row's result never depends on its neighbours, on how many there are,
 * nor on the number of threads: a step of 1 row and a prefill of 256 take the same way.
 *
 * Knows rows, pages and weights; knows nothing of requests. native.py packs the weights, fills the structures below and
 * is the only caller. Plain C11 with intrinsics; no library but the OpenMP runtime that torch has loaded already.
 */
#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 32, LANES = 16, TILE = 32, PAGE = 32, ROWS = 4, MOST_GROUP = 8, MOST_ROWS = 256 };

/* A block whose largest value is above so many root mean squares of its row has two digits: one in eight of the embedded
 * model's. Its divergence from the file's own distribution is 0.0006 nats so, 0.003 with one digit everywhere. */
#define OUTLIER 4.0f

/* ---- what native.py fills (the same fields in the same order there) */

/* (out, in): tiles of 32 outputs; in a tile block after block; in a block first 16 outputs, then the others: levels of 8
 * groups of 4 inputs for each output, 16 scales, 16 minima (float16). weight = level * scale + minimum. Of 4 bits groups
 * 0-3 are the low halves of bytes whose high halves are groups 4-7. */
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
    uint16_t *pool;     /* (layers, pages, kv_heads, 2, PAGE * head_dim) float16: keys (head_dim, PAGE), values (PAGE, head_dim) */
    int64_t pages;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
    int (*team)(void);                                              /* omp_get_num_threads */
} Model;

/* A block of activations: what the low digit is worth, that times the sum of both digits and of the high one alone, and
 * the sum of the squares. */
typedef struct {
    float scale, both, coarse, squares;
} Unit;

typedef struct {
    int8_t *high, *low; /* (rows, width): value = (256 * high + low) * scale, or without the low */
    Unit *units;        /* (rows, width / BLOCK) */
} Digits;

typedef struct {
    int32_t rows, wanted, columns;
    const int64_t *ids;       /* (rows,) */
    const int32_t *positions; /* (rows,) */
    const int32_t *owners;    /* (rows,): which line of `pages` is the row's */
    const int32_t *pages;     /* (owners, columns) */
    const int32_t *last;      /* (wanted,): the rows whose logits are asked */
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

/* The next jobs of this phase, [*from, *to); false when none are left. A slow core takes fewer of them. */
static int take(Worker *w, int jobs, int *from, int *to) {
    int some = jobs / (w->threads * 4);
    if (some < 1) some = 1;
    *from = atomic_fetch_add_explicit(&w->region->s->jobs[w->phase], some, memory_order_relaxed);
    *to = *from + some < jobs ? *from + some : jobs;
    return *from < jobs;
}

#define EACH(w, jobs, i) \
    for (int from_, to_; take(w, jobs, &from_, &to_);) \
        for (int i = from_; i < to_; i++)

/* ---- numbers */

static inline __m512 half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), x)); /* NaN stays: the second operand */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f); /* Cephes' expf */
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
}

/* 32 values as digits; one that is no number makes all of them none. */
static inline void digits_of(__m512 a, __m512 b, const Digits *to, int64_t block) {
    float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    if (_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q)) most = NAN; /* the maximum passed over it */
    const __m512i middle = _mm512_set1_epi32(128);
    const float range = 127 * 256;
    __m512 inverse = _mm512_set1_ps(most > 0 ? range / most : 0.0f);
    __m512i i = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), j = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
    __m512i k = _mm512_srai_epi32(_mm512_add_epi32(i, middle), 8), l = _mm512_srai_epi32(_mm512_add_epi32(j, middle), 8);
    __m128i *high = (__m128i *)(to->high + block * BLOCK), *low = (__m128i *)(to->low + block * BLOCK);
    _mm_storeu_si128(high, _mm512_cvtsepi32_epi8(k));
    _mm_storeu_si128(high + 1, _mm512_cvtsepi32_epi8(l));
    _mm_storeu_si128(low, _mm512_cvtepi32_epi8(i)); /* cut off: what is left to the nearest multiple of 256 */
    _mm_storeu_si128(low + 1, _mm512_cvtepi32_epi8(j));
    float scale = most / range;
    to->units[block] = (Unit){
        scale,
        scale * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(i, j)),
        scale * 256.0f * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(k, l)),
        _mm512_reduce_add_ps(_mm512_fmadd_ps(a, a, _mm512_mul_ps(b, b))),
    };
}

/* From which scale on a block of a row has two digits. */
static void limits(const Digits *from, int rows, int blocks, float *limit) {
    const Unit *unit = from->units;
    for (int r = 0; r < rows; r++) {
        float squares = 0;
        for (int b = 0; b < blocks; b++) squares += unit++->squares;
        limit[r] = sqrtf(squares / (float)(blocks * BLOCK)) * (OUTLIER / (127 * 256));
    }
}

/* Row `to_row` of digits: this one, normalized (root mean square). */
static void norm_row(const float *x, const float *weight, int width, float epsilon, const Digits *to, int64_t to_row) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < width; i += LANES) {
        __m512 v = _mm512_loadu_ps(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)width + epsilon));
    for (int i = 0; i < width; i += BLOCK) {
        __m512 a = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor), _mm512_loadu_ps(weight + i));
        __m512 b = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i + LANES), factor), _mm512_loadu_ps(weight + i + LANES));
        digits_of(a, b, to, (to_row * width + i) / BLOCK);
    }
}

/* ---- matrix products */

/* Bytes of a block of a tile, for one vector of its outputs. */
#define FACE(bits) ((bits) * 64 + 64)

static inline int64_t tile_bytes(const Matrix *m) { return (int64_t)(m->in / BLOCK) * 2 * FACE(m->bits); }

/* The levels of a block for 16 outputs, and their scales and minima. */
static inline __attribute__((always_inline)) void levels(const uint8_t *face, int bits, __m512i *w, __m512 *scale, __m512 *minimum) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int g = 0; g < bits; g++) {
        w[g] = _mm512_loadu_si512(face + 64 * g);
        if (bits == 8) continue;
        w[g + 4] = _mm512_and_si512(_mm512_srli_epi16(w[g], 4), low);
        w[g] = _mm512_and_si512(w[g], low);
    }
    *scale = half((const uint16_t *)(face + bits * 64));
    *minimum = half((const uint16_t *)(face + bits * 64) + LANES);
}

/* x, y: += 32 digits times the levels of two vectors of outputs. */
static inline __attribute__((always_inline)) void dot(const int8_t *digits, const __m512i *v, const __m512i *w, __m512i *x, __m512i *y) {
    for (int g = 0; g < 8; g++) {
        int32_t four;
        memcpy(&four, digits + 4 * g, 4);
        __m512i same = _mm512_set1_epi32(four);
        *x = _mm512_dpbusd_epi32(*x, v[g], same);
        *y = _mm512_dpbusd_epi32(*y, w[g], same);
    }
}

/* One tile for `rows` rows, a constant where it is inlined: sum[r], its 32 outputs. Each digit that is loaded meets both
 * vectors of weights, and what is held fits the 32 registers for up to 4 rows. ahead: `share` bytes of it for each block
 * are fetched from memory. */
static inline __attribute__((always_inline)) void tile_rows(
    const uint8_t *tile, int bits, int blocks, const Digits *from, int first, int rows, const float *limit,
    const uint8_t *ahead, int share, __m512 (*sum)[2]) {
    __m512 a[ROWS], b[ROWS];
    for (int r = 0; r < rows; r++) a[r] = b[r] = _mm512_setzero_ps();
    for (int block = 0; block < blocks; block++, tile += 2 * FACE(bits)) {
        for (int line = 0; line < share; line += 64) _mm_prefetch((const char *)ahead + line, _MM_HINT_T0);
        ahead += share;
        __m512i v[8], w[8];
        __m512 vscale, vminimum, wscale, wminimum;
        levels(tile, bits, v, &vscale, &vminimum);
        levels(tile + FACE(bits), bits, w, &wscale, &wminimum);
        for (int r = 0; r < rows; r++) {
            int64_t at = (int64_t)(first + r) * blocks + block;
            const Unit *unit = from->units + at;
            __m512i x = _mm512_setzero_si512(), y = x;
            dot(from->high + at * BLOCK, v, w, &x, &y);
            float scale = unit->scale * 256.0f, whole = unit->coarse;
            if (unit->scale > limit[first + r]) {
                x = _mm512_slli_epi32(x, 8);
                y = _mm512_slli_epi32(y, 8);
                dot(from->low + at * BLOCK, v, w, &x, &y);
                scale = unit->scale, whole = unit->both;
            }
            __m512 size = _mm512_set1_ps(scale), total = _mm512_set1_ps(whole);
            a[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_mul_ps(vscale, size), a[r]);
            a[r] = _mm512_fmadd_ps(vminimum, total, a[r]);
            b[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(y), _mm512_mul_ps(wscale, size), b[r]);
            b[r] = _mm512_fmadd_ps(wminimum, total, b[r]);
        }
    }
    for (int r = 0; r < rows; r++) sum[r][0] = a[r], sum[r][1] = b[r];
}

/* ROWS rows of a tile, from `first` on, or those that are left of `all`; how many there are changes no row. */
static int tile_some(const Matrix *m, int index, const Digits *from, int first, int all, const float *limit, __m512 (*sum)[2]) {
    int rows = all - first < ROWS ? all - first : ROWS, blocks = m->in / BLOCK;
    int64_t bytes = tile_bytes(m);
    const uint8_t *tile = m->data + index * bytes;
    /* While some rows take this tile, their share of the next one comes from memory. */
    const uint8_t *ahead = tile + bytes + bytes * first / all;
    int share = 0;
    if (all <= 2 * ROWS) share = (int)(bytes / blocks * rows / all);
    else for (int64_t at = 0; at < bytes * rows / all; at += 64) _mm_prefetch((const char *)ahead + at, _MM_HINT_T1);
    switch (rows * 16 + m->bits) {
#define CASE(rows, bits) case rows * 16 + bits: tile_rows(tile, bits, blocks, from, first, rows, limit, ahead, share, sum); break;
        CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(1, 8) CASE(2, 8) CASE(3, 8) CASE(4, 8)
#undef CASE
    }
    return rows;
}

/* out = or += rows @ matrix.T, a phase. out: (rows, matrix->out) */
static void product(Worker *w, const Matrix *m, const Digits *from, int rows, float *out, int add) {
    __m512 sum[ROWS][2];
    float limit[MOST_ROWS];
    limits(from, rows, m->in / BLOCK, limit);
    EACH(w, m->out / TILE, tile) {
        for (int first = 0; first < rows; first += ROWS) {
            int some = tile_some(m, tile, from, first, rows, limit, sum);
            for (int r = 0; r < some; r++) {
                float *to = out + (int64_t)(first + r) * m->out + tile * TILE;
                for (int i = 0; i < 2; i++, to += LANES)
                    _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][i]) : sum[r][i]);
            }
        }
    }
    meet(w);
}

/* digits of silu(gate) * up, a phase. The matrix holds all gates, then all ups. */
static void gated(Worker *w, const Matrix *m, const Digits *from, int rows, const Digits *to) {
    __m512 gates[ROWS][2], ups[ROWS][2];
    float limit[MOST_ROWS];
    const __m512 one = _mm512_set1_ps(1.0f);
    int tiles = m->out / 2 / TILE;
    limits(from, rows, m->in / BLOCK, limit);
    EACH(w, tiles, tile) {
        for (int first = 0; first < rows; first += ROWS) {
            int some = tile_some(m, tile, from, first, rows, limit, gates);
            tile_some(m, tiles + tile, from, first, rows, limit, ups);
            for (int r = 0; r < some; r++) {
                __m512 value[2];
                for (int i = 0; i < 2; i++) {
                    __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gates[r][i])));
                    value[i] = _mm512_mul_ps(_mm512_div_ps(gates[r][i], below), ups[r][i]);
                }
                /* A tile's outputs are a block of the next matrix's inputs. */
                digits_of(value[0], value[1], to, (int64_t)(first + r) * tiles + tile);
            }
        }
    }
    meet(w);
}

static void normed(Worker *w, const Step *s, const float *x, const int32_t *which, int rows, int width, const float *norm) {
    EACH(w, rows, r) {
        const float *row = x + (int64_t)(which ? which[r] : r) * width;
        norm_row(row, norm, width, w->region->m->epsilon, &s->digits, r);
    }
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
            _mm256_storeu_si256((__m256i *)halves, _mm512_cvtps_ph(_mm512_loadu_ps(key + i), 0));
            for (int j = 0; j < LANES; j++) keys[(i + j) * PAGE + place] = halves[j];
            _mm256_storeu_si256((__m256i *)(values + i), _mm512_cvtps_ph(_mm512_loadu_ps(value + i), 0));
        }
    }
}

/* What `group` (a constant where it is inlined) query heads of a row see through one key head, page after page with a
 * running maximum (https://arxiv.org/abs/1805.02867). seen: (group, head_dim) */
static inline __attribute__((always_inline)) void look(
    const Model *m, const Step *s, int layer, int row, int head, const float *queries, int group, float *seen) {
    int dim = m->head_dim, tokens = s->positions[row] + 1;
    const int32_t *pages = s->pages + (int64_t)s->owners[row] * s->columns;
    float most[MOST_GROUP], mass[MOST_GROUP], part[MOST_GROUP][PAGE], fade[MOST_GROUP];
    for (int g = 0; g < group; g++) most[g] = -INFINITY, mass[g] = 0;
    memset(seen, 0, sizeof(float) * group * dim);
    for (int first = 0; first < tokens; first += PAGE) {
        int here = tokens - first < PAGE ? tokens - first : PAGE;
        const uint16_t *keys = page_of(m, layer, pages[first / PAGE], head), *values = keys + PAGE * dim;
        __m512 score[MOST_GROUP][2];
        for (int g = 0; g < group; g++) score[g][0] = score[g][1] = _mm512_setzero_ps();
        for (int i = 0; i < dim; i++) {
            __m512 a = half(keys + i * PAGE), b = half(keys + i * PAGE + LANES);
            for (int g = 0; g < group; g++) {
                __m512 q = _mm512_set1_ps(queries[g * dim + i]);
                score[g][0] = _mm512_fmadd_ps(q, a, score[g][0]);
                score[g][1] = _mm512_fmadd_ps(q, b, score[g][1]);
            }
        }
        uint32_t there = here == PAGE ? ~0u : (1u << here) - 1; /* the rest of the page is not the row's */
        for (int g = 0; g < group; g++) {
            const __m512 never = _mm512_set1_ps(-INFINITY);
            __m512 a = _mm512_mask_mov_ps(never, (__mmask16)there, score[g][0]);
            __m512 b = _mm512_mask_mov_ps(never, (__mmask16)(there >> 16), score[g][1]);
            float high = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
            if (!(high > most[g])) high = most[g];
            /* exp(-inf) is not zero here; the first page has nothing to fade. */
            fade[g] = first ? _mm512_cvtss_f32(exponential(_mm512_set1_ps(most[g] - high))) : 0.0f;
            most[g] = high;
            a = _mm512_maskz_mov_ps((__mmask16)there, exponential(_mm512_sub_ps(a, _mm512_set1_ps(high))));
            b = _mm512_maskz_mov_ps((__mmask16)(there >> 16), exponential(_mm512_sub_ps(b, _mm512_set1_ps(high))));
            _mm512_storeu_ps(part[g], a);
            _mm512_storeu_ps(part[g] + LANES, b);
            mass[g] = mass[g] * fade[g] + _mm512_reduce_add_ps(_mm512_add_ps(a, b));
        }
        for (int i = 0; i < dim; i += LANES) {
            __m512 sum[MOST_GROUP];
            for (int g = 0; g < group; g++) sum[g] = _mm512_mul_ps(_mm512_loadu_ps(seen + g * dim + i), _mm512_set1_ps(fade[g]));
            for (int t = 0; t < here; t++) {
                __m512 v = half(values + t * dim + i);
                for (int g = 0; g < group; g++) sum[g] = _mm512_fmadd_ps(_mm512_set1_ps(part[g][t]), v, sum[g]);
            }
            for (int g = 0; g < group; g++) _mm512_storeu_ps(seen + g * dim + i, sum[g]);
        }
    }
    for (int g = 0; g < group; g++) {
        __m512 by = _mm512_set1_ps(1.0f / mass[g]);
        for (int i = 0; i < dim; i += LANES) _mm512_storeu_ps(seen + g * dim + i, _mm512_mul_ps(_mm512_loadu_ps(seen + g * dim + i), by));
    }
}

static void attend(const Model *m, const Step *s, int layer, int row, int head) {
    int dim = m->head_dim, group = m->heads / m->kv_heads, width = m->heads * dim;
    const float *queries = s->qkv + ((int64_t)row * (m->heads + 2 * m->kv_heads) + head * group) * dim;
    float seen[MOST_GROUP * 256];
    switch (group) {
#define CASE(n) case n: look(m, s, layer, row, head, queries, n, seen); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
    int64_t at = (int64_t)row * width + head * group * dim;
    for (int i = 0; i < group * dim; i += BLOCK)
        digits_of(_mm512_loadu_ps(seen + i), _mm512_loadu_ps(seen + i + LANES), &s->digits, (at + i) / BLOCK);
}

/* ---- the step */

static float weight_at(const Matrix *m, int row, int column) {
    const uint8_t *block = m->data + row / TILE * tile_bytes(m) + (column / BLOCK * 2 + row % TILE / LANES) * FACE(m->bits);
    int group = column % BLOCK / 4, lane = row % LANES, at = lane * 4 + column % 4;
    int level = m->bits == 8 ? block[group * 64 + at] : block[group % 4 * 64 + at] >> (group < 4 ? 0 : 4) & 15;
    const uint16_t *facts = (const uint16_t *)(block + m->bits * 64);
    return (float)level * _cvtsh_ss(facts[lane]) + _cvtsh_ss(facts[LANES + lane]);
}

static void work(void *given) {
    Region *region = given;
    const Model *m = region->m;
    const Step *s = region->s;
    Worker worker = {region, m->threads > 1 ? m->team() : 1, 0}, *w = &worker;
    int rows = s->rows, width = m->table.in;
    EACH(w, rows, r) for (int i = 0; i < width; i++) s->x[(int64_t)r * width + i] = weight_at(&m->table, (int)s->ids[r], i);
    meet(w);
    for (int i = 0; i < m->layers; i++) {
        const Layer *layer = &m->layer[i];
        normed(w, s, s->x, NULL, rows, width, layer->norm);
        product(w, &layer->qkv, &s->digits, rows, s->qkv, 0);
        EACH(w, rows, r) turn_row(m, s, i, r);
        meet(w);
        EACH(w, rows * m->kv_heads, job) attend(m, s, i, job / m->kv_heads, job % m->kv_heads);
        meet(w);
        product(w, &layer->output, &s->digits, rows, s->x, 1);
        normed(w, s, s->x, NULL, rows, width, layer->mlp_norm);
        gated(w, &layer->gate_up, &s->digits, rows, &s->hidden);
        product(w, &layer->down, &s->hidden, rows, s->x, 1);
    }
    if (s->wanted) {
        normed(w, s, s->x, s->last, s->wanted, width, m->norm);
        product(w, &m->head, &s->digits, s->wanted, s->logits, 0);
    }
}

/* Phases of a step: so many counters `jobs` must hold. */
int32_t lab_phases(const Model *m) { return 1 + 8 * m->layers + 2; }

void lab_step(const Model *m, const Step *s) {
    Region region = {m, s, 0, 0};
    if (m->threads == 1) work(&region);
    else m->parallel(work, &region, (unsigned)m->threads, 0);
}

int32_t lab_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
