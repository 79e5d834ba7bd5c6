# What a pass of a share of a model asks its caller: what all ranks give.
from libc.string cimport memcpy
from cpython.exc cimport PyErr_SetObject


cdef class Ranks:
    """Processes of which each holds a share of the weights. exchange(y (rows, n) float32) gives what all of them give,
    of what this one does, the same bits in each: their sum, or, with columns, which y are of n, those of all ranks."""
    cdef fc_ranks c
    cdef readonly object exchange

    def __init__(self, exchange not None, columns=None, ptrdiff_t n=0):
        self.exchange, self.c.call, self.c.self = exchange, exchange_python, <void *>self
        if columns is not None:
            self.c.first, self.c.count, self.c.n = columns.start, len(columns), n


cdef fc_status exchange_python(void *call, float *y, const float *mine, ptrdiff_t rows, ptrdiff_t n,
                               ptrdiff_t mine_stride) noexcept nogil:
    with gil:
        return exchanged(<Ranks>call, y, mine, rows, n, mine_stride)


cdef fc_status exchanged(Ranks ranks, float *y, const float *mine, ptrdiff_t rows, ptrdiff_t n,
                         ptrdiff_t mine_stride) noexcept:
    cdef cnp.npy_intp dims[2]
    cdef cnp.ndarray given, whole
    cdef ptrdiff_t i
    try:
        dims[0], dims[1] = rows, ranks.c.count or n
        given = new_array(2, dims, FC_F32)  # a copy: who is called may keep it, y is scratch
        for i in range(rows):
            memcpy(<float *>cnp.PyArray_DATA(given) + i * dims[1], mine + i * mine_stride, dims[1] * sizeof(float))
        whole = np.ascontiguousarray(ranks.exchange(given), np.float32)
        if shape_of(whole) != (rows, n):
            raise ValueError(f"Ranks: its result has shape {shape_of(whole)}, expected {(rows, n)}")
        memcpy(y, cnp.PyArray_DATA(whole), cnp.PyArray_NBYTES(whole))
        return FC_OK
    except BaseException as error:  # as in called_with
        PyErr_SetObject(type(error), error)
        return FC_INTERRUPTED


cdef ptrdiff_t channels_here(object over, PackedWeight last):
    """Of those that a part's last matrix takes in."""
    return last.k if over is None or over[0] is None else (<Ranks?>over[0]).c.count


cdef ptrdiff_t hidden_of(object over, PackedWeight last):
    """Channels of a part's result, whole."""
    return last.n if over is None or over[0] is None else (<Ranks?>over[1]).c.n
