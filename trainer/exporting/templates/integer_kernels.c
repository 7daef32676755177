typedef struct {
    const uint8_t *bits;                     // gaps and codes, the first bit lowest; none: `values` are the numbers themselves
    const int8_t *values;                    // of the codes
    const uint8_t *gaps;                     // of the words; none: no number is zero
    const uint16_t *gap_words, *code_words;  // how many words of a canonical Huffman code have 1, 2, ... bits; none: one, empty
    int32_t count;                           // of numbers that are written
} weight;

typedef struct {
    uint16_t offset, channels, height, width, rows;  // rows: that are kept, in turn; of the image all, at 0xffff
    uint8_t zero;                                    // the byte that stands for 0
} map;

typedef struct {
    const weight *of;
    const bias_number *bias;
    int32_t half;           // what is added before the shift, so that it rounds
    uint16_t total, reach;  // how often it runs; how often what it reads must have run before
    uint16_t groups;
    uint16_t kernel[2], stride[2], before[2], dilation[2];
    uint8_t op, x, added;  // x, added: numbers of maps; added: 255 for none
    uint8_t relu, relu_after, bias_shift, added_shift;
    int8_t shift;  // to the right
} step;

typedef struct {
    const weight *of;
    const uint8_t *next;
    uint32_t bits;  // of a byte that are left, below a one
    int32_t left, at, value;
} walk;

static int32_t symbol(walk *w, const uint16_t *words)
{
    const uint8_t *next = w->next;
    uint32_t bits = w->bits;
    int32_t word = 0, before = 0;
    while (words) {
        if (bits == 1)
            bits = 0x100u | *next++;
        word = word * 2 + (int32_t)(bits & 1);
        bits >>= 1;
        int32_t count = *words++;
        before += count;
        word -= count;
        if (word < 0)
            break;
    }
    w->next = next;
    w->bits = bits;
    return before + word;
}

static walk start(const weight *of)
{
    walk w = {of, of->bits, 1, of->count, -1, 0};
    return w;
}

// Goes to the next number that is not zero; returns its place, after the last one INT32_MAX. A gap of 254 goes on in the next word.
static int32_t next(walk *w)
{
    const weight *of = w->of;
    if (--w->left < 0)
        return INT32_MAX;
    int32_t at = w->at + 1;
    if (of->gaps) {
        int32_t gap;
        do
            at += gap = of->gaps[symbol(w, of->gap_words)];
        while (gap == 254);
    }
    w->value = of->values[of->bits ? symbol(w, of->code_words) : at];
    return w->at = at;
}

// v / 2^shift, rounded down; of a negative shift v * 2^-shift.
static int32_t shifted(int32_t v, int32_t shift)
{
    if (shift < 0)
        return v * (1 << -shift);
    return v < 0 ? ~(~v >> shift) : v >> shift;
}

static uint8_t byte_of(int32_t v, const map *y)
{
    v += y->zero;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

// sum / (count * 2^shift), rounded; a half is rounded up.
static int32_t divided(int32_t sum, int32_t count, int32_t shift)
{
    if (shift < 0)
        sum *= 1 << -shift;
    else
        count *= 1 << shift;
    sum = 2 * sum + count;
    count *= 2;
    return sum < 0 ? -((count - 1 - sum) / count) : sum / count;
}

static uint8_t *made(const map *m, int32_t channel, int32_t row)
{
    return memory + m->offset + (row % m->rows * m->channels + channel) * m->width;
}

static const uint8_t *row_of(const uint8_t *image, const map *m, int32_t channel, int32_t row)
{
    return m->offset == 0xffff ? image + (channel * m->height + row) * m->width : made(m, channel, row);
}

static int32_t first_sum(const step *s, int32_t o)
{
    return s->bias ? s->bias[o] * (1 << s->bias_shift) : 0;
}

// What becomes of a sum, before it is a byte.
static int32_t finished(const step *s, int32_t v, const uint8_t *image, int32_t o, int32_t at, int32_t j)
{
    if (s->relu && v < 0)
        v = 0;
    if (s->added != 255) {
        const map *a = &maps[s->added];
        v += (row_of(image, a, o, at)[j] - a->zero) * (1 << s->added_shift);
        if (s->relu_after && v < 0)
            v = 0;
    }
    return shifted(v + s->half, s->shift);
}

static void linear(const step *s, const uint8_t *image, const map *x, const map *y, int32_t *logits)
{
    const uint8_t *from = row_of(image, x, 0, 0);
    walk w = start(s->of);
    int32_t size = x->channels * x->height * x->width, o = 0, sum = first_sum(s, 0), first = 0;
    for (;;) {
        int32_t at = next(&w);
        while (at >= first + size) {
            int32_t v = finished(s, sum, image, o, 0, 0);
            if (logits)
                logits[o] = v;
            else
                memory[y->offset + o] = byte_of(v, y);
            if (++o == y->channels)
                return;
            first += size;
            sum = first_sum(s, o);
        }
        sum += w.value * (from[at - first] - x->zero);
    }
}

// One row of a convolution. Each weight is read once, and added to the whole row of its output.
static void conv(const step *s, const uint8_t *image, const map *x, const map *y, int32_t row, int32_t *logits)
{
    static int32_t sums[WIDEST];
    walk w = start(s->of);
    int32_t area = s->kernel[0] * s->kernel[1], channels = x->channels / s->groups, size = channels * area;
    int32_t at = next(&w), first = 0;
    for (int32_t o = 0; o < y->channels; o++, first += size) {
        for (int32_t j = 0; j < y->width; j++)
            sums[j] = first_sum(s, o);
        for (; at < first + size; at = next(&w)) {
            int32_t channel = (at - first) / area + o / (y->channels / s->groups) * channels;
            int32_t spot = (at - first) % area;
            int32_t above = row * s->stride[0] + spot / s->kernel[1] * s->dilation[0] - s->before[0];
            int32_t column = spot % s->kernel[1] * s->dilation[1] - s->before[1];
            if (above < 0 || above >= x->height)
                continue;
            const uint8_t *from = row_of(image, x, channel, above);
            int32_t j = 0, beside = s->stride[1], zero = x->zero, value = w.value, end = x->width, last = y->width;
            for (; column < 0; column += beside)
                j++;
            for (; j < last && column < end; j++, column += beside)
                sums[j] += value * (from[column] - zero);
        }
        for (int32_t j = 0; j < y->width; j++) {
            int32_t v = finished(s, sums[j], image, o, row, j);
            if (logits)
                logits[(o * y->height + row) * y->width + j] = v;
            else
                made(y, o, row)[j] = byte_of(v, y);
        }
    }
}

static void max_pool(const step *s, const uint8_t *image, const map *x, const map *y, int32_t at)
{
    for (int32_t c = 0; c < y->channels; c++) {
        uint8_t *to = made(y, c, at);
        for (int32_t j = 0; j < y->width; j++) {
            uint8_t most = 0;
            for (int32_t k = 0; k < s->kernel[0]; k++)
                for (int32_t l = 0; l < s->kernel[1]; l++) {
                    int32_t row = at * s->stride[0] - s->before[0] + k * s->dilation[0];
                    int32_t column = j * s->stride[1] - s->before[1] + l * s->dilation[1];
                    if (row >= 0 && row < x->height && column >= 0 && column < x->width) {
                        uint8_t v = row_of(image, x, c, row)[column];
                        most = v > most ? v : most;
                    }
                }
            to[j] = most;
        }
    }
}

// Adds one row to the sums of its channels; after the last row these become bytes, in their place.
static void mean(const step *s, const uint8_t *image, const map *x, const map *y, int32_t at)
{
    int32_t *sums = (int32_t *)(void *)(memory + y->offset);
    int32_t count = x->height * x->width;
    for (int32_t c = 0; c < y->channels; c++) {
        const uint8_t *from = row_of(image, x, c, at);
        int32_t sum = at ? sums[c] : 0;
        for (int32_t j = 0; j < x->width; j++)
            sum += from[j] - x->zero;
        if (at < x->height - 1)
            sums[c] = sum;
        else {
            memory[y->offset + c] = byte_of(divided(sum, count, s->shift), y);
        }
    }
}

static void avg_pool(const step *s, const uint8_t *image, const map *x, const map *y, int32_t at)
{
    int32_t count = s->kernel[0] * s->kernel[1];
    for (int32_t c = 0; c < y->channels; c++) {
        uint8_t *to = made(y, c, at);
        for (int32_t j = 0; j < y->width; j++) {
            int32_t sum = 0;
            for (int32_t k = 0; k < s->kernel[0]; k++)
                for (int32_t l = 0; l < s->kernel[1]; l++)
                    sum += row_of(image, x, c, at * s->stride[0] + k)[j * s->stride[1] + l] - x->zero;
            to[j] = byte_of(divided(sum, count, s->shift), y);
        }
    }
}
