/* OpenMP where the compiler has it, one thread where it has not. */
#ifndef PYLLMC_THREADS_H
#define PYLLMC_THREADS_H

#ifdef _OPENMP
#include <omp.h>
enum { PYLLMC_OPENMP = 1 };
static inline int omp_threads(void) { return omp_get_max_threads(); }
static inline void set_omp_threads(int n) { omp_set_num_threads(n); }
static inline void wait_for_team(void) { _Pragma("omp barrier") }
#else
enum { PYLLMC_OPENMP = 0 };
static inline int omp_threads(void) { return 1; }
static inline void set_omp_threads(int n) { (void)n; }
static inline void wait_for_team(void) {}
#endif

#endif
