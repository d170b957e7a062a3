"""What others have asked of the OpenMP runtime that the compiled kernels share with them."""

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #else
    #include <limits.h>
    static int omp_get_max_threads(void) { return INT_MAX; }
    #endif
    """
    int omp_get_max_threads() noexcept nogil


def max_threads():
    """Return the number of threads a parallel region of the calling thread has unless it says."""
    return omp_get_max_threads()
