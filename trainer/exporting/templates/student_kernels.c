typedef struct {
    const uint8_t *bits;                     // gaps and codes, the first bit lowest; none: `values` are the numbers themselves
    const float *values;                     // of the codes
    const uint8_t *gaps;                     // of the words; none: no number is zero
    const uint16_t *gap_words, *code_words;  // how many words of a canonical Huffman code have 1, 2, ... bits; none: one, empty
    int32_t count;                           // of numbers that are written
} weight;

typedef struct {
    const uint8_t *bits;  // number i is (bits[i] + least) * step; none: floats[i]
    const float *floats;
    float step;
    int32_t least;
} vector;

typedef struct {
    const weight *of;
    const uint8_t *next;
    uint32_t bits;  // of a byte that are left, below a one
    int32_t left, at, waits;
    float value;
} walk;

typedef struct {
    int32_t channels, height, width, outputs, out_height, out_width;
    int32_t kernel[2], stride[2], before[2], after[2], dilation[2], groups;
} window;

static int32_t symbol(walk *w, const uint16_t *words)
{
    int32_t word = 0, first = 0, before = 0;
    if (!words)
        return 0;
    for (;; words++) {
        if (w->bits == 1)
            w->bits = 0x100u | *w->next++;
        word = word * 2 + (int32_t)(w->bits & 1);
        w->bits >>= 1;
        first *= 2;
        if (word - first < *words)
            return before + word - first;
        before += *words;
        first += *words;
    }
}

static walk start(const weight *of)
{
    walk w = {of, of->bits, 1, of->count, -1, 0, 0.0f};
    return w;
}

// Goes to the next non-zero number if it lies before `end`; its place is then w->at. A gap of 254 goes on in the next word.
static int found(walk *w, int32_t end)
{
    if (!w->waits) {
        const weight *of = w->of;
        if (!w->left)
            return 0;
        w->left--;
        w->at++;
        if (of->gaps) {
            int32_t gap;
            do
                w->at += gap = of->gaps[symbol(w, of->gap_words)];
            while (gap == 254);
        }
        w->value = of->values[of->bits ? symbol(w, of->code_words) : w->at];
        w->waits = 1;
    }
    if (w->at >= end)
        return 0;
    w->waits = 0;
    return 1;
}

static float number(const vector *v, int32_t i)
{
    return v->bits ? (float)(v->bits[i] + v->least) * v->step : v->floats[i];
}

static void linear(const float *x, float *y, int32_t rows, int32_t inputs, int32_t outputs, const weight *of,
                   const vector *bias)
{
    for (; rows > 0; rows--, x += inputs) {
        walk w = start(of);
        const float *row = x;
        for (int32_t o = 0; o < outputs; o++) {
            float sum = bias ? number(bias, o) : 0.0f;
            while (found(&w, (o + 1) * inputs))
                sum += w.value * row[w.at - o * inputs];
            *y++ = sum;
        }
    }
}

// Each weight is read once, and added to the whole map of its output.
static void conv(const float *x, float *y, const window *c, const weight *of, const vector *bias)
{
    walk w = start(of);
    int32_t plane = c->out_height * c->out_width, area = c->kernel[0] * c->kernel[1];
    int32_t channels = c->channels / c->groups, size = channels * area;
    for (int32_t o = 0; o < c->outputs; o++, y += plane) {
        float first = bias ? number(bias, o) : 0.0f;
        for (int32_t i = 0; i < plane; i++)
            y[i] = first;
        while (found(&w, (o + 1) * size)) {
            int32_t inside = w.at - o * size, spot = inside % area;
            int32_t channel = o / (c->outputs / c->groups) * channels + inside / area;
            int32_t down = spot / c->kernel[1] * c->dilation[0] - c->before[0];
            int32_t right = spot % c->kernel[1] * c->dilation[1] - c->before[1];
            int32_t left = right < 0 ? (-right + c->stride[1] - 1) / c->stride[1] : 0;
            for (int32_t i = 0; i < c->out_height; i++) {
                int32_t row = i * c->stride[0] + down;
                if (row < 0 || row >= c->height)
                    continue;
                const float *from = x + (channel * c->height + row) * c->width;
                int32_t column = left * c->stride[1] + right;
                for (int32_t j = left; j < c->out_width && column < c->width; j++, column += c->stride[1])
                    y[i * c->out_width + j] += w.value * from[column];
            }
        }
    }
}

static void affine(const float *x, float *y, int32_t outer, int32_t channels, int32_t inner, const float *scale,
                   const float *shift)
{
    for (; outer > 0; outer--)
        for (int32_t c = 0; c < channels; c++)
            for (int32_t i = 0; i < inner; i++)
                *y++ = *x++ * scale[c] + shift[c];
}

static void max_pool(const float *x, float *y, const window *c)
{
    for (int32_t o = 0; o < c->channels; o++, x += c->height * c->width)
        for (int32_t i = 0; i < c->out_height; i++)
            for (int32_t j = 0; j < c->out_width; j++) {
                float most = -FLT_MAX;
                for (int32_t k = 0; k < c->kernel[0]; k++)
                    for (int32_t l = 0; l < c->kernel[1]; l++) {
                        int32_t row = i * c->stride[0] - c->before[0] + k * c->dilation[0];
                        int32_t column = j * c->stride[1] - c->before[1] + l * c->dilation[1];
                        if (row >= 0 && row < c->height && column >= 0 && column < c->width &&
                            x[row * c->width + column] > most)
                            most = x[row * c->width + column];
                    }
                *y++ = most;
            }
}

// counted: whether numbers of the padding count in the mean.
static void avg_pool(const float *x, float *y, const window *c, int counted)
{
    for (int32_t o = 0; o < c->channels; o++, x += c->height * c->width)
        for (int32_t i = 0; i < c->out_height; i++)
            for (int32_t j = 0; j < c->out_width; j++) {
                float sum = 0.0f;
                int32_t count = 0;
                for (int32_t k = 0; k < c->kernel[0]; k++)
                    for (int32_t l = 0; l < c->kernel[1]; l++) {
                        int32_t row = i * c->stride[0] - c->before[0] + k;
                        int32_t column = j * c->stride[1] - c->before[1] + l;
                        if (row >= 0 && row < c->height && column >= 0 && column < c->width) {
                            sum += x[row * c->width + column];
                            count++;
                        } else if (counted && row < c->height + c->after[0] && column < c->width + c->after[1]) {
                            count++;
                        }
                    }
                *y++ = sum / (float)count;
            }
}

static void mean(const float *x, float *y, int32_t outer, int32_t size, int32_t inner)
{
    for (; outer > 0; outer--, x += size * inner)
        for (int32_t i = 0; i < inner; i++) {
            float sum = 0.0f;
            for (int32_t k = 0; k < size; k++)
                sum += x[k * inner + i];
            *y++ = sum / (float)size;
        }
}

static void amax(const float *x, float *y, int32_t outer, int32_t size, int32_t inner)
{
    for (; outer > 0; outer--, x += size * inner)
        for (int32_t i = 0; i < inner; i++) {
            float most = x[i];
            for (int32_t k = 1; k < size; k++)
                most = x[k * inner + i] > most ? x[k * inner + i] : most;
            *y++ = most;
        }
}

// e^x: x = n ln 2 + r, the series in r up to r^7, and the exponent n put in by its bits.
static float exponential(float x)
{
    if (x > 88.0f)
        x = 88.0f;
    if (x < -87.0f)
        return 0.0f;
    int32_t n = (int32_t)(x * 1.44269504f + (x < 0.0f ? -0.5f : 0.5f));
    float r = (x - (float)n * 0.693359375f) + (float)n * 2.12194440e-4f;
    float sum = 1.0f + r / 7.0f;
    for (int32_t i = 6; i > 0; i--)
        sum = 1.0f + r / (float)i * sum;
    uint32_t bits = (uint32_t)(n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

static float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(-x));
}

static float hyperbolic(float x)
{
    if (x > -0.25f && x < 0.25f) {
        float s = x * x;
        return x * (1.0f - s * (0.333333333f - s * (0.133333333f - s * (0.0539682540f - s * 0.0218694885f))));
    }
    return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
}

// Abramowitz and Stegun, 7.1.26: within 1.5e-7.
static float error(float x)
{
    float a = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * a);
    float s = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float e = 1.0f - s * exponential(-a * a);
    return x < 0.0f ? -e : e;
}

// ln x of a normal x > 0: x = 2^n m with m from 0.7 to 1.4, and 2 atanh((m - 1) / (m + 1)).
static float logarithm(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int32_t n = (int32_t)(bits >> 23) - 127;
    bits = (bits & 0x7fffffu) | 0x3f800000u;
    memcpy(&x, &bits, sizeof x);
    if (x > 1.41421356f) {
        x *= 0.5f;
        n++;
    }
    float t = (x - 1.0f) / (x + 1.0f), s = t * t;
    float sum = 1.0f + s * (0.333333333f + s * (0.2f + s * (0.142857143f + s * 0.111111111f)));
    return (float)n * 0.693147181f + 2.0f * t * sum;
}

static float softplus(float x)
{
    return x > 20.0f ? x : x < -15.0f ? exponential(x) : logarithm(1.0f + exponential(x));
}

static float mish(float x)
{
    if (x > 20.0f)
        return x;
    float e = exponential(x), s = e * (e + 2.0f);
    return x * s / (s + 2.0f);
}

// Newton's steps from half of the exponent: within the last bit.
static float root(float x)
{
    if (!(x > 0.0f))
        return 0.0f;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits >> 1) + 0x1fbb4000u;
    float y;
    memcpy(&y, &bits, sizeof y);
    for (int32_t i = 0; i < 3; i++)
        y = 0.5f * (y + x / y);
    return y;
}

// x to the power of halves / 2.
static float raised(float x, int32_t halves)
{
    float base = halves % 2 ? root(x) : x, found = 1.0f;
    int32_t count = (halves < 0 ? -halves : halves) / (halves % 2 ? 1 : 2);
    for (int32_t i = 0; i < count; i++)
        found *= base;
    return halves < 0 ? 1.0f / found : found;
}

static void prelu(const float *x, float *y, int32_t outer, int32_t channels, int32_t inner, const float *slope)
{
    for (; outer > 0; outer--)
        for (int32_t c = 0; c < channels; c++)
            for (int32_t i = 0; i < inner; i++, x++)
                *y++ = *x < 0.0f ? *x * slope[c] : *x;
}

// Each `size` numbers get the mean 0 and the variance 1.
static void normal(const float *x, float *y, int32_t outer, int32_t size, float eps)
{
    for (; outer > 0; outer--, x += size, y += size) {
        float middle = 0.0f, squares = 0.0f;
        for (int32_t i = 0; i < size; i++)
            middle += x[i];
        middle /= (float)size;
        for (int32_t i = 0; i < size; i++)
            squares += (x[i] - middle) * (x[i] - middle);
        float scale = 1.0f / root(squares / (float)size + eps);
        for (int32_t i = 0; i < size; i++)
            y[i] = (x[i] - middle) * scale;
    }
}

static void matmul(const float *x, const float *y, float *to, int32_t rows, int32_t inner, int32_t columns)
{
    for (; rows > 0; rows--, x += inner, to += columns) {
        for (int32_t j = 0; j < columns; j++)
            to[j] = 0.0f;
        for (int32_t i = 0; i < inner; i++)
            for (int32_t j = 0; j < columns; j++)
                to[j] += x[i] * y[i * columns + j];
    }
}

static void softmax(const float *x, float *y, int32_t outer, int32_t size, int32_t inner)
{
    for (; outer > 0; outer--, x += size * inner, y += size * inner)
        for (int32_t i = 0; i < inner; i++) {
            float most = x[i], sum = 0.0f;
            for (int32_t k = 1; k < size; k++)
                most = x[k * inner + i] > most ? x[k * inner + i] : most;
            for (int32_t k = 0; k < size; k++)
                sum += y[k * inner + i] = exponential(x[k * inner + i] - most);
            for (int32_t k = 0; k < size; k++)
                y[k * inner + i] /= sum;
        }
}

// One head: rows of q [rows, depth] against all of k [keys, depth]; mask [rows, keys] is added, none: 0. scores: [keys].
static void attention(const float *q, const float *k, const float *v, const float *mask, float *to, float *scores, int32_t rows,
                      int32_t keys, int32_t depth, int32_t width, float scale)
{
    for (; rows > 0; rows--, q += depth, to += width) {
        for (int32_t j = 0; j < keys; j++) {
            float sum = 0.0f;
            for (int32_t i = 0; i < depth; i++)
                sum += q[i] * k[j * depth + i];
            scores[j] = sum * scale + (mask ? *mask++ : 0.0f);
        }
        softmax(scores, scores, 1, keys, 1);
        matmul(scores, v, to, 1, keys, width);
    }
}

static float add(float a, float b)
{
    return a + b;
}

static float sub(float a, float b)
{
    return a - b;
}

static float mul(float a, float b)
{
    return a * b;
}

static float div_of(float a, float b)
{
    return a / b;
}

// steps: of x and of y along each axis; 0 where a number is repeated.
static void binary(const float *x, const float *y, float *to, const int32_t *shape, const int32_t *steps,
                   float (*f)(float, float))
{
    for (int32_t i = 0; i < shape[0]; i++)
        for (int32_t j = 0; j < shape[1]; j++)
            for (int32_t k = 0; k < shape[2]; k++)
                for (int32_t l = 0; l < shape[3]; l++)
                    *to++ = f(x[i * steps[0] + j * steps[1] + k * steps[2] + l * steps[3]],
                              y[i * steps[4] + j * steps[5] + k * steps[6] + l * steps[7]]);
}

static void gather(const float *x, float *y, const int32_t *shape, const int32_t *steps)
{
    for (int32_t i = 0; i < shape[0]; i++)
        for (int32_t j = 0; j < shape[1]; j++)
            for (int32_t k = 0; k < shape[2]; k++)
                for (int32_t l = 0; l < shape[3]; l++)
                    *y++ = x[i * steps[0] + j * steps[1] + k * steps[2] + l * steps[3]];
}

static void fill(float *y, int32_t n, float value)
{
    for (; n > 0; n--)
        *y++ = value;
}

static void scatter(const float *x, float *y, const int32_t *shape, const int32_t *steps)
{
    for (int32_t i = 0; i < shape[0]; i++)
        for (int32_t j = 0; j < shape[1]; j++)
            for (int32_t k = 0; k < shape[2]; k++)
                for (int32_t l = 0; l < shape[3]; l++)
                    y[i * steps[0] + j * steps[1] + k * steps[2] + l * steps[3]] = *x++;
}

static void place(const float *x, float *y, int32_t rows, int32_t size, int32_t step)
{
    for (; rows > 0; rows--, x += size, y += step)
        memcpy(y, x, (size_t)size * sizeof *x);
}

// reverse: whether it begins at the last step. width: numbers from one step of y to the next. scratch: [2 x 4 x hidden + hidden].
static void lstm(const float *x, float *y, float *scratch, int32_t steps, int32_t size, int32_t hidden, int32_t width,
                 int32_t reverse, const weight *of_x, const weight *of_h, const vector *bias_x, const vector *bias_h)
{
    float *a = scratch, *b = a + 4 * hidden, *cell = b + 4 * hidden;
    const float *h = cell;
    for (int32_t i = 0; i < hidden; i++)
        cell[i] = 0.0f;
    for (int32_t t = 0; t < steps; t++) {
        int32_t step = reverse ? steps - 1 - t : t;
        float *to = y + step * width;
        linear(x + step * size, a, 1, size, 4 * hidden, of_x, bias_x);
        linear(h, b, 1, hidden, 4 * hidden, of_h, bias_h);
        for (int32_t i = 0; i < hidden; i++) {
            float in = sigmoid(a[i] + b[i]), keep = sigmoid(a[hidden + i] + b[hidden + i]);
            float fresh = hyperbolic(a[2 * hidden + i] + b[2 * hidden + i]);
            cell[i] = keep * cell[i] + in * fresh;
            to[i] = sigmoid(a[3 * hidden + i] + b[3 * hidden + i]) * hyperbolic(cell[i]);
        }
        h = to;
    }
}

// reverse: whether it begins at the last step. width: numbers from one step of y to the next. scratch: [2 x 3 x hidden + hidden].
static void gru(const float *x, float *y, float *scratch, int32_t steps, int32_t size, int32_t hidden, int32_t width,
                 int32_t reverse, const weight *of_x, const weight *of_h, const vector *bias_x, const vector *bias_h)
{
    float *a = scratch, *b = a + 3 * hidden, *cell = b + 3 * hidden;
    const float *h = cell;
    for (int32_t i = 0; i < hidden; i++)
        cell[i] = 0.0f;
    for (int32_t t = 0; t < steps; t++) {
        int32_t step = reverse ? steps - 1 - t : t;
        float *to = y + step * width;
        linear(x + step * size, a, 1, size, 3 * hidden, of_x, bias_x);
        linear(h, b, 1, hidden, 3 * hidden, of_h, bias_h);
        for (int32_t i = 0; i < hidden; i++) {
            float reset = sigmoid(a[i] + b[i]), keep = sigmoid(a[hidden + i] + b[hidden + i]);
            float fresh = hyperbolic(a[2 * hidden + i] + reset * b[2 * hidden + i]);
            to[i] = (1.0f - keep) * fresh + keep * h[i];
        }
        h = to;
    }
}
