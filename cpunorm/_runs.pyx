"""The places of a mask that count, as runs of them: copied together, and put back between zeros.

An array is seen as (planes, channels, places, width), the last two without gaps; what counts of it
is (channels, count, width), the planes one after the other. Planes are cut into blocks, which
threads share.
"""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cnp.import_array()

cdef enum:
    BLOCK_BYTES = 1 << 15

cdef struct Run:
    Py_ssize_t start, stop          # places of a plane

cdef struct Block:
    Py_ssize_t plane, start, stop   # places of it
    Py_ssize_t first, last          # runs
    Py_ssize_t offset               # how many places count before it


cdef class Runs:
    """The runs of a mask (planes, places), each place of which has so many bytes."""

    cdef:
        Run* runs
        Block* blocks
        Py_ssize_t n_blocks

    def __cinit__(self, cnp.ndarray mask, Py_ssize_t place_bytes):
        cdef:
            const char* counts = cnp.PyArray_BYTES(mask)
            Py_ssize_t planes = mask.shape[0], places = mask.shape[1]
            Py_ssize_t size = min(max(BLOCK_BYTES // place_bytes, 1), places)
            Py_ssize_t in_plane = (places + size - 1) // size
            Py_ssize_t plane, start, place, stop, n_runs = 0, offset = 0
            Block* block
        self.n_blocks = planes * in_plane
        self.blocks = <Block*> malloc(self.n_blocks * sizeof(Block))
        self.runs = <Run*> malloc(self.n_blocks * ((size + 1) // 2) * sizeof(Run))
        if self.blocks is NULL or self.runs is NULL:
            raise MemoryError
        block = self.blocks
        for plane in range(planes):
            for start in range(0, places, size):
                stop = min(start + size, places)
                block[0] = Block(plane, start, stop, n_runs, n_runs, offset)
                place = start
                while True:
                    while place < stop and not counts[place]:
                        place += 1
                    if place == stop:
                        break
                    self.runs[n_runs].start = place
                    while place < stop and counts[place]:
                        place += 1
                    self.runs[n_runs].stop = place
                    offset += place - self.runs[n_runs].start
                    n_runs += 1
                block.last = n_runs
                block += 1
            counts += places

    def __dealloc__(self):
        free(self.runs)
        free(self.blocks)

    def gather(self, cnp.ndarray a, cnp.ndarray counted, int threads):
        """Copy what counts of `a` to `counted`."""
        self.move(a, counted, True, threads)

    def scatter(self, counted, cnp.ndarray a, int threads):
        """Copy `counted` to where it belongs in `a`, or leave that as it is; zeros elsewhere."""
        self.move(a, counted, False, threads)

    cdef move(self, cnp.ndarray a, counted, bint gathers, int threads):
        cdef:
            char* base = cnp.PyArray_BYTES(a)
            char* other = NULL if counted is None else cnp.PyArray_BYTES(counted)
            Py_ssize_t plane = a.strides[0], channel = a.strides[1]
            Py_ssize_t width = a.shape[3] * cnp.PyArray_ITEMSIZE(a)
            Py_ssize_t row = 0 if counted is None else counted.shape[1] * width
            Py_ssize_t lines = a.shape[1] * self.n_blocks, line
            const Block* block
            char* here
            char* there
        for line in prange(lines, nogil=True, schedule="static", num_threads=threads,
                           use_threads_if=threads > 1):
            block = self.blocks + line % self.n_blocks
            here = base + block.plane * plane + line // self.n_blocks * channel
            there = NULL if other is NULL else (
                other + line // self.n_blocks * row + block.offset * width)
            if gathers:
                take(block, self.runs, here, there, width)
            else:
                put(block, self.runs, there, here, width)


cdef void take(const Block* block, const Run* runs, const char* a, char* counted,
               Py_ssize_t width) noexcept nogil:
    cdef Py_ssize_t i, nbytes
    for i in range(block.first, block.last):
        nbytes = (runs[i].stop - runs[i].start) * width
        memcpy(counted, a + runs[i].start * width, nbytes)
        counted += nbytes


cdef void put(const Block* block, const Run* runs, const char* counted, char* a,
              Py_ssize_t width) noexcept nogil:
    cdef Py_ssize_t i, nbytes, place = block.start
    for i in range(block.first, block.last):
        memset(a + place * width, 0, (runs[i].start - place) * width)
        place = runs[i].stop
        if counted is not NULL:
            nbytes = (place - runs[i].start) * width
            memcpy(a + runs[i].start * width, counted, nbytes)
            counted += nbytes
    memset(a + place * width, 0, (block.stop - place) * width)
