/* One step: the structures that kernels.py and cpu.py fill, and the threads that share the work.
 *
 * Knows rows, pages and weights by their shapes. Computes nothing.
 */
#pragma once
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#include "vectors.h"

enum { BLOCK = 32, LANES = 16, TILE = 32, PAGE = 32, ROWS = 4 };
enum { MOST_GROUP = 8, MOST_HEAD = 256, MOST_ROWS = 256, PEAK = 4 };

/* A peak is a value above PEAK root mean squares of its row: at most one in PEAK * PEAK, of the embedded model's values
 * one in 150. Its divergence from the file's own distribution is 0.0007 nats so, 0.0004 with 3 and 0.003 without peaks;
 * with AVX2 a prefill takes 7 % more time with 3, and 10 % less without peaks. */
#define MOST_PEAKS(width) ((width) / (PEAK * PEAK))

/* ---- structures; kernels.py declares the same fields in the same order */

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

/* A block of activations: the value of a digit of 1, and the sum of all digits' values. */
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
    const int32_t *last;      /* (wanted,): the rows whose logits are wanted, each once */
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
        else sched_yield(); /* another thread has lost its core */
    }
}

/* The next jobs of this phase, [*from, *to); false when none are left. Chunks become smaller towards the end, so that a
 * slow core does not delay the others. */
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
