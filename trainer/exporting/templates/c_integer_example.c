// Reads images from stdin, one byte a pixel, [channels][height][width]; prints for each its class and its logits, which are whole:
// times 2^$exponent they are the student's. With the argument "check" it runs the self-check: an image that every machine can make,
// against the logits it must give.
#include "student.h"

#include <stdio.h>
#include <string.h>

#define PIXELS (STUDENT_CHANNELS * STUDENT_HEIGHT * STUDENT_WIDTH)

static const int32_t expected[] = {$expected};

static uint8_t image[PIXELS];
static int32_t logits[STUDENT_CLASSES];

static int check(void)
{
    for (int32_t i = 0; i < PIXELS; i++)
        image[i] = (uint8_t)(i * 37 + i / 101 * 11);
    student_run(image, logits);
    for (int32_t i = 0; i < STUDENT_CLASSES; i++)
        if (logits[i] != expected[i]) {
            printf("the self-check fails: logit %d is %ld, not %ld\n", (int)i, (long)logits[i], (long)expected[i]);
            return 1;
        }
    printf("the self-check passes\n");
    return 0;
}

int main(int count, char **arguments)
{
    if (count > 1 && strcmp(arguments[1], "check") == 0)
        return check();
    while (fread(image, 1, PIXELS, stdin) == PIXELS) {
        int32_t best = 0;
        student_run(image, logits);
        for (int32_t i = 1; i < STUDENT_CLASSES; i++)
            best = logits[i] > logits[best] ? i : best;
        printf("%d", (int)best);
        for (int32_t i = 0; i < STUDENT_CLASSES; i++)
            printf(" %ld", (long)logits[i]);
        printf("\n");
    }
    return 0;
}
