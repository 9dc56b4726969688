/* The forward of a quantized Llama on an x86-64 processor with AVX2 or better: one call a step, one parallel region a
 * call.
 *
 * Weights are blocks of 32 along the input, 4 or 8 bits a weight, with a scale and a minimum, as a GGUF file holds
 * them; activations are rounded to 8 bits with a scale for each block of 32 in a row (llama.cpp's Q8_1), except the
 * peaks: the few values that are far larger than the rest of their row and would cause most of the error are multiplied
 * without rounding. Sums within a block are integers that a float represents exactly; sums of blocks are added in one
 * order, the peaks after all blocks. So a row's result depends neither on its neighbours nor on their number, the
 * number of threads or the processor: a step of 1 row and a prefill of 256 are computed alike.
 *
 * This file is the step over all layers; step.h has the structures and threads, products.h the matrix products,
 * attention.h the attention, vectors.h the instructions of each kind of processor. cpu.py packs the weights, fills the
 * structures and is the only caller. GNU C11; no library but the OpenMP runtime that torch has loaded.
 * Knows rows, pages and weights. Knows nothing of requests.
 */
#include "attention.h"
#include "products.h"
#include "step.h"

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
        /* In the last layer only these rows' results are read. */
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

/* Phases of a step: the number of counters in `jobs`. */
int32_t lab_phases(const Model *m) { return 1 + 10 * m->layers + 2; }

void lab_step(const Model *m, const Step *s) {
    Region region = {m, s, 0, 0};
    if (m->threads == 1) work(&region);
    else m->parallel(work, &region, (unsigned)m->threads, 0);
}
