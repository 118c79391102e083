# kernels.h for Cython: the same functions in the same order. A C++ exception becomes a Python one, OutOfMemory a
# MemoryError with its text.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libcpp.map cimport map
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from "kernels.h" namespace "pyllmc" nogil:
    cdef enum DType:
        FLOAT32
        BFLOAT16
        INT32

    # ---- runtime.cu: device and memory
    string unavailable() except +
    vector[string] gpus() except +
    void set_device(int index) except +
    int device_index() except +
    string device_name() except +
    int compute_capability() except +
    bint is_shim() except +
    void memory_info(size_t* free_bytes, size_t* total_bytes) except +
    size_t cached_bytes() except +
    void release_cache() except +
    void* allocate(size_t bytes) except +
    void release(void* data)
    void to_device(void* device, const void* host, size_t bytes) except +
    void to_host "pyllmc::to_host"(void* host, const void* device, size_t bytes) except +
    void copy(void* to, const void* source, size_t bytes) except +
    void clear(void* data, size_t bytes) except +
    void synchronize "pyllmc::synchronize"() except +
    void settle()
    uintptr_t stream_handle() except +
    void follow(uintptr_t other_stream) except +

    # ---- graph.cu
    void begin_recording() except +
    uint64_t end_recording(bint keep) except +
    bint replay(uint64_t graph) except +
    void drop_graph(uint64_t graph)

    # ---- elementwise.cu
    void cast(DType to_type, void* to, DType from_type, const void* source, size_t n) except +
    void scale(DType type, void* data, float factor, size_t n) except +
    void gelu_forward(DType type, const void* inp, void* out, size_t n) except +
    void gelu_backward(DType type, const void* dout, const void* inp, void* dinp, size_t n) except +
    void residual_forward(DType type, const void* inp1, const void* inp2, void* out, size_t n) except +
    void residual_backward(DType type, const void* dout, void* dinp1, void* dinp2, size_t n) except +

    # ---- encoder.cu
    void encoder_forward(DType type, const int32_t* tokens, const void* wte, const void* wpe, void* out, size_t B,
                         size_t T, size_t C, size_t V) except +
    void encoder_backward(DType type, const void* dout, const int32_t* tokens, void* dwte, void* dwpe, size_t B,
                          size_t T, size_t C, size_t V, size_t maxT, bint add_wte, bint add_wpe) except +

    # ---- layernorm.cu
    void layernorm_forward(DType type, const void* inp, const void* residual, const void* weight, const void* bias,
                           void* residual_out, void* out, float* mean, float* rstd, size_t rows, size_t C,
                           float eps) except +
    void layernorm_backward(DType type, const void* dout, const void* inp, const void* weight, const float* mean,
                            const float* rstd, const void* dresidual, void* dinp, void* dweight, void* dbias,
                            size_t rows, size_t C, bint accumulate) except +

    # ---- cublaslt.cu
    string open_cublaslt(const string& path) except +
    string cublaslt_version() except +
    void set_products(bint tf32, bint autotune) except +
    bint uses_tf32() except +
    bint uses_autotune() except +
    map[string, string] get_algorithms() except +
    void set_algorithms(const map[string, string]& texts) except +

    # ---- matmul.cu
    void matmul_forward(DType type, const void* inp, const void* weight, const void* bias, const void* residual,
                        bint gelu, void* pre_gelu, void* out, size_t rows, size_t C, size_t OC) except +
    void matmul_backward(DType type, const void* dout, const void* inp, const void* weight, const void* pre_gelu,
                         void* dinp, void* dweight, void* dbias, size_t rows, size_t C, size_t OC,
                         bint accumulate) except +

    # ---- attention.cu
    void attention_forward(DType type, const void* qkv, void* out, float* lse, size_t B, size_t T, size_t NH,
                           size_t HS) except +
    void attention_backward(DType type, const void* dout, const void* qkv, const void* out, const float* lse,
                            void* dqkv, size_t B, size_t T, size_t NH, size_t HS) except +
    void attention_decode(DType type, const void* qkv, void* key_cache, void* value_cache, void* out, size_t B,
                          size_t n, size_t position, size_t maxT, size_t NH, size_t HS) except +

    # ---- classifier.cu
    void set_logits_bytes(size_t bytes) except +
    size_t logits_bytes() except +
    void classifier_forward(DType type, const void* inp, const void* weight, const int32_t* targets, float* losses,
                            size_t rows, size_t C, size_t V, size_t Vp) except +
    void classifier_forward_backward(DType type, const void* inp, const void* weight, const int32_t* targets,
                                     float loss_scale, float* losses, void* dinp, void* dweight, size_t rows,
                                     size_t C, size_t V, size_t Vp, bint accumulate) except +

    # ---- softmax.cu
    void softmax_forward(DType type, const void* inp, void* out, size_t rows, size_t V, size_t Vp) except +
    void softmax_backward(DType type, const void* dout, const void* out, void* dinp, size_t rows, size_t V,
                          size_t Vp) except +
    void crossentropy_forward(DType type, const void* logits, const int32_t* targets, float* losses, float* lse,
                              size_t rows, size_t V, size_t Vp) except +
    void crossentropy_backward(DType type, const float* dlosses, const void* logits, const int32_t* targets,
                               const float* lse, void* dlogits, size_t rows, size_t V, size_t Vp) except +
    void mean_loss(const float* losses, const int32_t* targets, float* out, size_t n) except +

    # ---- adamw.cu
    cdef struct AdamW:
        float one_minus_beta1, one_minus_beta2, beta2, eps, grad_scale, step_size, root_scale, decay
        uint64_t seed

    void adamw_update(DType type, void* param, const void* grad, float* m, float* v, float* master,
                      const int64_t* parts, size_t count, const AdamW& settings) except +
    void global_norm(DType type, const void* array, const int64_t* parts, size_t count, float* out) except +

    # ---- nccl.cu
    string open_nccl(const string& path) except +
    string nccl_version() except +
    string nccl_id() except +

    struct Buffer:
        DType type
        void* data
        size_t n

    cdef cppclass Communicator:
        Communicator(const string& id, int rank, int size) except +
        void broadcast(const Buffer& block) except +
        void reduce_scatter(const vector[Buffer]& blocks) except +
        void all_gather(const vector[Buffer]& blocks) except +
        bint launched(double seconds) except +
        bint wait(double seconds) except +
        void abort() except +
        void close(double seconds) except +
