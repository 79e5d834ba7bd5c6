# Arguments to arrays: type, dtype, shape, strides, overlap. Every message names function, argument, what came
# and what was expected.

cdef object BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
cdef int BF16_NUM = BFLOAT16.num
cdef tuple DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


cdef int dtype_index(cnp.ndarray a) noexcept:
    """fc_dtype of an array in native byte order, or -1."""
    cdef int num = cnp.PyArray_TYPE(a)
    if num == cnp.NPY_FLOAT32:
        return FC_F32 if cnp.PyArray_ISNOTSWAPPED(a) else -1
    if num == cnp.NPY_FLOAT16:
        return FC_F16 if cnp.PyArray_ISNOTSWAPPED(a) else -1
    return FC_BF16 if num == BF16_NUM and cnp.PyArray_ISNOTSWAPPED(a) else -1


cdef int not_masked(str fn, str arg, object x) except -1:
    """No kernel knows of a mask: it would be lost without a word."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{fn}: {arg} is a {type(x).__name__}, expected a NumPy array without a mask")
    return 0


cdef cnp.ndarray viewed(str fn, str arg, object x):
    """x as an ndarray over the same memory."""
    if cnp.PyArray_CheckExact(x):
        return x
    not_masked(fn, arg, x)
    if cnp.PyArray_Check(x):
        return x
    offered = hasattr(x, "__array__") or hasattr(x, "__array_interface__") or hasattr(x, "__array_struct__")
    try:
        if offered:
            return np.asarray(x)
        if hasattr(x, "__dlpack__"):
            return np.from_dlpack(x)
        return np.asarray(memoryview(x))
    except MemoryError:
        raise
    except Exception as error:
        why = f" that NumPy cannot view ({error})" if offered or hasattr(x, "__dlpack__") else ""
        raise TypeError(f"{fn}: {arg} is a {type(x).__name__}{why}, expected a NumPy array") from None


cdef cnp.ndarray listed(str fn, str arg, object x):
    """x as an ndarray, lists and numbers too."""
    not_masked(fn, arg, x)
    try:
        return np.asarray(x)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{fn}: {arg} is a {type(x).__name__} that NumPy cannot view ({error}), expected a NumPy array "
                        "or a list") from None


cdef object integer(str fn, str arg, object value):
    """The Python int that value is; True and False are none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise TypeError(f"{fn}: {arg} is {value!r}, expected an integer") from None


cdef double number(str fn, str arg, object value) except? -1:
    """The C double that value is."""
    cdef double x
    try:
        x = value
    except OverflowError:
        raise ValueError(f"{fn}: {arg} is {value!r}, expected a number that a double holds") from None
    except MemoryError:
        raise
    except Exception:
        raise TypeError(f"{fn}: {arg} is {value!r}, expected a number") from None
    return x


cdef bint flag(str fn, str arg, object value) except -1:
    """Whether value is true; an array of several has no answer."""
    try:
        return True if value else False
    except MemoryError:
        raise
    except Exception:
        raise TypeError(f"{fn}: {arg} is {value!r}, expected True or False") from None


cdef int float_type(str fn, str arg, cnp.ndarray a) except -1:
    cdef int t = dtype_index(a)
    if t < 0:
        raise TypeError(f"{fn}: {arg} has dtype {a.dtype}, expected float32, float16 or bfloat16; "
                        f"pass {arg}.astype(np.float32)")
    return t


cdef int same_type(str fn, str arg, cnp.ndarray a, int t) except -1:
    if dtype_index(a) != t:
        raise TypeError(f"{fn}: {arg} has dtype {a.dtype}, expected {DTYPES[t]}")
    return 0


cdef int contiguous_last(str fn, str arg, cnp.ndarray a) except -1:
    cdef int nd = cnp.PyArray_NDIM(a)
    cdef ptrdiff_t size = cnp.PyArray_ITEMSIZE(a)
    if nd and cnp.PyArray_DIM(a, nd - 1) > 1 and cnp.PyArray_STRIDE(a, nd - 1) != size and cnp.PyArray_SIZE(a):
        raise ValueError(f"{fn}: {arg} has stride {cnp.PyArray_STRIDE(a, nd - 1)} bytes on its last axis, "
                         f"expected {size} (contiguous); pass np.ascontiguousarray({arg})")
    return 0


cdef tuple shape_of(cnp.ndarray a):
    return tuple([a.shape[i] for i in range(cnp.PyArray_NDIM(a))])


cdef bint equal_shapes(cnp.ndarray a, cnp.ndarray b) noexcept:
    return cnp.PyArray_NDIM(a) == cnp.PyArray_NDIM(b) and cnp.PyArray_CompareLists(
        cnp.PyArray_DIMS(a), cnp.PyArray_DIMS(b), cnp.PyArray_NDIM(a))


cdef int same_shape(str fn, str arg, cnp.ndarray a, cnp.ndarray like) except -1:
    if not equal_shapes(a, like):
        raise ValueError(f"{fn}: {arg} has shape {shape_of(a)}, expected {shape_of(like)}")
    return 0


cdef cnp.ndarray new_array(int nd, cnp.npy_intp *dims, int t):
    return cnp.PyArray_EMPTY(nd, dims, cnp.NPY_FLOAT32 if t == FC_F32 else cnp.NPY_FLOAT16 if t == FC_F16 else BF16_NUM,
                             0)


cdef cnp.ndarray result(str fn, object out, int nd, cnp.npy_intp *dims, int t, str arg="out"):
    """`out` checked, or a new array."""
    cdef cnp.ndarray a
    if out is None:
        return new_array(nd, dims, t)
    not_masked(fn, arg, out)
    if not cnp.PyArray_Check(out):
        raise TypeError(f"{fn}: {arg} is a {type(out).__name__}, expected a NumPy array")
    a = out
    same_type(fn, arg, a, t)
    if cnp.PyArray_NDIM(a) != nd or not cnp.PyArray_CompareLists(cnp.PyArray_DIMS(a), dims, nd):
        raise ValueError(f"{fn}: {arg} has shape {shape_of(a)}, expected {tuple([dims[i] for i in range(nd)])}")
    if not cnp.PyArray_ISWRITEABLE(a):
        raise ValueError(f"{fn}: {arg} is read-only")
    contiguous_last(fn, arg, a)
    return a


cdef void extent(cnp.ndarray a, char **lo, char **hi) noexcept:
    cdef int i
    cdef ptrdiff_t reach
    lo[0] = cnp.PyArray_BYTES(a)
    hi[0] = lo[0] + cnp.PyArray_ITEMSIZE(a)
    for i in range(cnp.PyArray_NDIM(a)):
        reach = (cnp.PyArray_DIM(a, i) - 1) * cnp.PyArray_STRIDE(a, i)
        if reach < 0:
            lo[0] += reach
        else:
            hi[0] += reach


cdef bint same_view(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int i
    if cnp.PyArray_BYTES(a) != cnp.PyArray_BYTES(b) or not equal_shapes(a, b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i) and cnp.PyArray_DIM(a, i) > 1:
            return False
    return cnp.PyArray_ITEMSIZE(a) == cnp.PyArray_ITEMSIZE(b)


# Steps in which two views are told apart, some milliseconds; arrays that are rows of one another take a few.
cdef long OVERLAP_WORK = 100_000


cdef int no_overlap(str fn, str name, cnp.ndarray out, str arg, cnp.ndarray a, bint alias_allowed) except -1:
    """`out` may be `a` itself where the op allows it, and shares no other memory with it."""
    cdef char *out_lo
    cdef char *out_hi
    cdef char *lo
    cdef char *hi
    if cnp.PyArray_SIZE(out) == 0 or cnp.PyArray_SIZE(a) == 0:
        return 0
    extent(out, &out_lo, &out_hi)
    extent(a, &lo, &hi)
    if out_hi <= lo or hi <= out_lo or (alias_allowed and same_view(out, a)):
        return 0
    try:
        shared, word = np.shares_memory(out, a, max_work=OVERLAP_WORK), "overlaps"
    except (np.exceptions.TooHardError, OverflowError):
        shared, word = True, "may overlap"
    if shared:
        raise ValueError(f"{fn}: {name} {word} {arg}; pass an array of its own"
                         + (f", or {arg} itself" if alias_allowed else ""))
    return 0


cdef cnp.ndarray private_ints(cnp.ndarray a):
    """A contiguous int64 copy: no other thread can write to it between its check and its use."""
    return np.array(a, dtype=np.int64, order="C")


cdef object given_number(int64_t value, cnp.ndarray given):
    """A number of private_ints(given) as the caller wrote it: beyond 2^63 - 1 a uint64 has become negative."""
    return value + 2**64 if value < 0 and given.dtype.kind == "u" else value


cdef cnp.ndarray parameter(str fn, str arg, object value, ptrdiff_t n):
    """A small parameter (n,) as contiguous float32; None stays None."""
    cdef cnp.ndarray a
    cdef cnp.ndarray wide
    cdef cnp.npy_intp dims[1]
    cdef int t
    if value is None:
        return None
    a = viewed(fn, arg, value)
    t = float_type(fn, arg, a)
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != n:
        raise ValueError(f"{fn}: {arg} has shape {shape_of(a)}, expected ({n},)")
    contiguous_last(fn, arg, a)
    if t == FC_F32:
        return a
    dims[0] = n
    wide = new_array(1, dims, FC_F32)
    fc_convert(<fc_dtype>t, <float *>cnp.PyArray_DATA(wide), cnp.PyArray_DATA(a), n)
    return wide


cdef inline const float *floats(cnp.ndarray a) noexcept:
    if a is None:
        return NULL
    return <const float *>cnp.PyArray_DATA(a)


cdef int collapse(str fn, fc_rows *rows, int axes, int count, cnp.ndarray a0, cnp.ndarray a1, cnp.ndarray a2=None,
                  cnp.ndarray a3=None) except -1:
    """The first `axes` axes, shared by `count` arrays (None: strides 0), neighbours merged where all strides allow."""
    cdef int d, a
    cdef ptrdiff_t size
    cdef ptrdiff_t stride[4]
    cdef bint merge
    rows.size, rows.ndim = sizeof(fc_rows), 0
    for a in range(4):
        rows.index[a] = NULL
    for d in range(axes):
        size = cnp.PyArray_DIM(a0, d)
        if size == 1:
            continue
        stride[0] = cnp.PyArray_STRIDE(a0, d)
        stride[1] = cnp.PyArray_STRIDE(a1, d) if a1 is not None else 0
        stride[2] = cnp.PyArray_STRIDE(a2, d) if a2 is not None else 0
        stride[3] = cnp.PyArray_STRIDE(a3, d) if a3 is not None else 0
        merge = rows.ndim > 0
        for a in range(4):
            if merge and rows.stride[a][rows.ndim - 1] != stride[a] * size:
                merge = False
        if not merge:
            if rows.ndim == FC_MAX_AXES:
                raise ValueError(f"{fn}: more than {FC_MAX_AXES} axes")
            rows.ndim += 1
            rows.shape[rows.ndim - 1] = 1
        rows.shape[rows.ndim - 1] *= size
        for a in range(4):
            rows.stride[a][rows.ndim - 1] = stride[a]
    return 0


cdef int check(str fn, fc_status status) except -1:
    if status == FC_OK:
        return 0
    if status == FC_NO_MEMORY:
        raise MemoryError(f"{fn}: no memory for scratch")
    if status == FC_BAD_SIZE:
        raise RuntimeError(f"{fn}: libforge_c.so is version {fc_version()}, expected {FC_VERSION}, which this was "
                           "built for")
    return -1  # interrupted: the poll left its exception set
