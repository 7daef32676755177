// The student on an Arduino board with 32 bits. At the start it checks itself, on an image that every machine can make, and tells how
// long one takes. Then it answers images that come by the serial port, one byte a pixel, [channels][height][width]: a line with
// the class and the logits for each.
#include <student.h>

#define PLANE ((int32_t)STUDENT_HEIGHT * STUDENT_WIDTH)
#define PIXELS (STUDENT_CHANNELS * PLANE)

$statics
static const student_logit expected[] = {$expected};
static const student_logit tolerance = $tolerance;

static student_pixel image[PIXELS];
static student_logit logits[STUDENT_CLASSES];
static int32_t received = 0;

static void put(int32_t i, uint8_t value)
{
    image[i] = $normal;
}

static bool passes()
{
    for (int32_t i = 0; i < PIXELS; i++)
        put(i, (uint8_t)(i * 37 + i / 101 * 11));
    student_run(image, logits);
    for (int32_t i = 0; i < STUDENT_CLASSES; i++) {
        student_logit difference = logits[i] - expected[i];
        if (!(difference <= tolerance && -difference <= tolerance))
            return false;
    }
    return true;
}

void setup()
{
    Serial.begin(115200);
    while (!Serial && millis() < 3000) {
    }
    bool good = passes();
    unsigned long before = micros();
    student_run(image, logits);
    unsigned long took = micros() - before;
    Serial.print(good ? "the self-check passes, microseconds for an image: " : "the self-check fails, microseconds for an image: ");
    Serial.println(took);
}

void loop()
{
    while (received < PIXELS && Serial.available() > 0)
        put(received++, (uint8_t)Serial.read());
    if (received < PIXELS)
        return;
    received = 0;
    student_run(image, logits);
    int32_t best = 0;
    for (int32_t i = 1; i < STUDENT_CLASSES; i++)
        best = logits[i] > logits[best] ? i : best;
    Serial.print((long)best);
    for (int32_t i = 0; i < STUDENT_CLASSES; i++) {
        Serial.print(" ");
        Serial.print($shown);
    }
    Serial.println();
}
