/* Attention over the pages of the KV pool: rotary positions, writing keys and values, and reading them.
 *
 * Knows pages and heads. Knows nothing of weights.
 */
#pragma once
#include <math.h>

#include "products.h" /* exponential */

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

/* Attention of `count` query heads (a constant where this is inlined) to `tokens` tokens through one key head, page by
 * page with a running maximum (https://arxiv.org/abs/1805.02867). The last `later` heads attend to one more token, in
 * the same page. queries: of the heads; seen: the results, (count, MOST_HEAD), of which head_dim are filled */
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
            const Floats never = same(-INFINITY), none = same(0); /* the rest of the page does not belong to the row */
            int own = g < count - later ? here : there;
            Floats a = first_of(own, score[g][0], never), b = first_of(own - LANES, score[g][1], never);
            float high = largest(larger(a, b));
            if (!(high > most[g])) high = most[g];
            /* exp(-inf) is not 0 here; at the first page there is nothing to scale down. */
            fade[g] = first ? leading(exponential(same(most[g] - high))) : 0.0f;
            most[g] = high;
            a = first_of(own, exponential(minus(a, same(high))), none);
            b = first_of(own - LANES, exponential(minus(b, same(high))), none);
            store(part[g], a);
            store(part[g] + LANES, b);
            mass[g] = mass[g] * fade[g] + sum_of(plus(a, b));
        }
        /* Few heads: two sums at once, because additions that depend on each other are slow. */
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
            /* Only these heads, although the others' weight is 0: the value may be NaN. */
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

/* Writes from value `at` on: the attention of `rows` of these rows, 1 or 2, through one key head. */
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

/* The same for two rows, or for the last one of `rows`. Two rows that are neighbours in one text and page read its keys
 * and values together, if their heads fit into AVX2's registers. */
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
