// Reads images from stdin, one byte a pixel, [channels][height][width]; prints for each its class and its logits.
// With the argument "check" it runs the self-check: an image that every machine can make, against the logits it must give.
#include "student.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define PIXELS (STUDENT_CHANNELS * STUDENT_HEIGHT * STUDENT_WIDTH)

$statics
static const float expected[] = {$expected};
static const float tolerance = $tolerance;

static uint8_t pixels[PIXELS];
static float image[PIXELS];
static float logits[STUDENT_CLASSES];

static void run(void)
{
    for (int32_t i = 0; i < PIXELS; i++) {
        int32_t c = i / (STUDENT_HEIGHT * STUDENT_WIDTH);
        image[i] = ((float)pixels[i] / 255.0f - mean[c]) * scale[c];
    }
    student_run(image, logits);
}

static int check(void)
{
    for (int32_t i = 0; i < PIXELS; i++)
        pixels[i] = (uint8_t)(i * 37 + i / 101 * 11);
    run();
    for (int32_t i = 0; i < STUDENT_CLASSES; i++) {
        float difference = logits[i] - expected[i];
        if (!(difference <= tolerance && -difference <= tolerance)) {
            printf("the self-check fails: logit %d is %.9g, not %.9g\n", (int)i, (double)logits[i], (double)expected[i]);
            return 1;
        }
    }
    printf("the self-check passes\n");
    return 0;
}

int main(int count, char **arguments)
{
    if (count > 1 && strcmp(arguments[1], "check") == 0)
        return check();
    while (fread(pixels, 1, PIXELS, stdin) == PIXELS) {
        int32_t best = 0;
        run();
        for (int32_t i = 1; i < STUDENT_CLASSES; i++)
            best = logits[i] > logits[best] ? i : best;
        printf("%d", (int)best);
        for (int32_t i = 0; i < STUDENT_CLASSES; i++)
            printf(" %.9g", (double)logits[i]);
        printf("\n");
    }
    return 0;
}
