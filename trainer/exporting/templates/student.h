// A student of tiny-student in C99: no dependency, no allocation. Compile with -ffp-contract=off for the same bits on all machines.
#ifndef STUDENT_H
#define STUDENT_H

#define STUDENT_CHANNELS $channels
#define STUDENT_HEIGHT $height
#define STUDENT_WIDTH $width
#define STUDENT_CLASSES $classes

#ifdef __cplusplus
extern "C" {
#endif

// image: [channels][height][width], normalised: (pixel / 255 - mean) * scale, see example.c. logits: [classes]. Returns 0.
// Not to be called by two threads at once: its maps lie in $memory static bytes.
int student_run(const float *image, float *logits);

#ifdef __cplusplus
}
#endif
#endif
