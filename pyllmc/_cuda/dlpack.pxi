# DLPack (https://dmlc.github.io/dlpack): arrays in and out of other libraries without a copy.

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New, PyCapsule_SetName
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.stdlib cimport free, malloc

cdef enum:
    KDL_CPU = 1
    KDL_CUDA = 2

cdef struct DLTensor:
    void* data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t code            # 0 int, 2 float, 4 bfloat
    uint8_t bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides        # NULL: C order
    uint64_t byte_offset

cdef struct DLManagedTensor:
    DLTensor tensor
    void* context
    void (*deleter)(DLManagedTensor*) noexcept

cdef uint8_t DL_CODES[3]
DL_CODES[:] = [2, 4, 0]


cdef void delete_export(DLManagedTensor* managed) noexcept with gil:
    Py_DECREF(<object> managed.context)
    free(managed)


cdef void delete_capsule(object capsule) noexcept:
    cdef DLManagedTensor* managed
    if PyCapsule_IsValid(capsule, "dltensor"):      # nobody took it
        managed = <DLManagedTensor*> PyCapsule_GetPointer(capsule, "dltensor")
        managed.deleter(managed)


cdef object export_dlpack(DeviceArray array):
    cdef Py_ssize_t ndim = len(array.shape), i
    cdef DLManagedTensor* managed = <DLManagedTensor*> malloc(sizeof(DLManagedTensor) + 8 * ndim)
    if managed == NULL:
        raise MemoryError("no memory for a DLPack capsule")
    cdef DLTensor* tensor = &managed.tensor
    tensor.data = array.data
    tensor.device_type, tensor.device_id = array.__dlpack_device__()
    tensor.ndim, tensor.byte_offset = ndim, 0
    tensor.strides = NULL
    tensor.code, tensor.bits, tensor.lanes = DL_CODES[array.type], 8 * ITEM_BYTES[array.type], 1
    tensor.shape = <int64_t*> (managed + 1)
    for i in range(ndim):
        tensor.shape[i] = array.shape[i]
    managed.context = <void*> array
    managed.deleter = delete_export
    Py_INCREF(array)
    return PyCapsule_New(managed, "dltensor", delete_capsule)


@cython.final
cdef class Imported:
    """Keeps what another library exported until nobody refers to it."""
    cdef DLManagedTensor* managed

    def __dealloc__(self):
        if self.managed != NULL and self.managed.deleter != NULL:
            kernels.settle()        # that library's stream may get the memory for something else at once
            self.managed.deleter(self.managed)


def from_dlpack(array):
    """An array of another library as a DeviceArray, without a copy: float32, bfloat16 or int32, C order, on the GPU.

    What that library enqueued before comes before the next op. ValueError for any other kind of array.
    """
    own, its = empty(0).__dlpack_device__(), tuple(array.__dlpack_device__())
    if its[0] != own[0]:
        raise ValueError("from_dlpack: the array is not on the GPU; from_host copies it there")
    if its != own:
        raise ValueError(f"from_dlpack: the array is on GPU {its[1]}, the ops compute on GPU {own[1]}; copy it there")
    capsule = array.__dlpack__() if kernels.is_shim() else array.__dlpack__(stream=kernels.stream_handle())
    cdef Imported owner = Imported.__new__(Imported)
    cdef DLManagedTensor* managed = <DLManagedTensor*> PyCapsule_GetPointer(capsule, "dltensor")
    PyCapsule_SetName(capsule, "used_dltensor")
    owner.managed = managed
    cdef DLTensor* tensor = &managed.tensor
    cdef int code = -1, i
    for i in range(3):
        if tensor.code == DL_CODES[i] and tensor.bits == 8 * ITEM_BYTES[i] and tensor.lanes == 1:
            code = i
    if code < 0:
        raise ValueError("from_dlpack: arrays on the GPU are float32, bfloat16 or int32")
    cdef tuple shape = tuple([tensor.shape[i] for i in range(tensor.ndim)])
    cdef Py_ssize_t step = 1
    for i in range(tensor.ndim - 1, -1, -1):
        if tensor.strides != NULL and tensor.shape[i] > 1 and tensor.strides[i] != step:
            raise ValueError("from_dlpack: the array must be in C order without gaps")
        step *= tensor.shape[i]
    cdef DeviceArray result = DeviceArray.__new__(DeviceArray)
    result.data = <char*> tensor.data + tensor.byte_offset
    result.shape, result.size, result.type, result.owner = shape, product(shape), code, owner
    return result
