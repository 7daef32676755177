// A student of tiny-student in C99: no dependency, no allocation. $compile
#ifndef STUDENT_H
#define STUDENT_H

#include <stdint.h>

#define STUDENT_CHANNELS $channels
#define STUDENT_HEIGHT $height
#define STUDENT_WIDTH $width
#define STUDENT_CLASSES $classes

#ifdef __cplusplus
extern "C" {
#endif

typedef $pixel student_pixel;
typedef $logit student_logit;

// $about Returns 0.
// Not to be called by two threads at once: its maps lie in $memory static bytes.
int student_run(const student_pixel *image, student_logit *logits);

#ifdef __cplusplus
}
#endif
#endif
