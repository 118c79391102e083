// The CUDA backend as C++ sees it: what ops.pyx calls, one function per op, in the order of a training step.
//
// Pointers are device memory, checked by the caller: shapes, types, overlap. `void*` arrays hold what `type` says;
// statistics, losses and the optimizer's state are float, tokens and targets int32. A null pointer is an option not
// taken. Every function only enqueues on the one stream, and throws std::runtime_error (OutOfMemory: std::bad_alloc).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <new>
#include <string>
#include <vector>

namespace pyllmc {

enum DType : int { FLOAT32 = 0, BFLOAT16 = 1, INT32 = 2 };

class OutOfMemory : public std::bad_alloc {
public:
    explicit OutOfMemory(std::string text) : text(std::move(text)) {}
    const char* what() const noexcept override { return text.c_str(); }

private:
    std::string text;
};

// ---- runtime.cu: device and memory ----------------------------------------------------------------------------------

std::string unavailable();          // why no op can run here, in one line; empty where they can
std::vector<std::string> gpus();    // the bus addresses of those that this process sees: "0000:1A:00.0"
void set_device(int index);         // which of them computes: before anything else is asked of it; else the first
int device_index();                 // which it is
std::string device_name();          // "NVIDIA H200"
int compute_capability();           // 90
bool is_shim();                     // whether this is the build for machines without a GPU
void memory_info(size_t* free_bytes, size_t* total_bytes);
size_t cached_bytes();              // freed by Python, kept for the next allocation
void release_cache();               // gives these back to the device
enum class Use : int { ARRAY = 0, SCRATCH = 1 };  // for Python; for the length of an op (runtime.h)
void* allocate(size_t bytes, Use use = Use::ARRAY);  // 256-byte aligned, contents undefined; or OutOfMemory
void release(void* data) noexcept;  // back to the cache; what the stream still does with it comes first
void give_back(void* array) noexcept;  // to the device, not to the cache: of what is needed once. Waits for the stream
void to_device(void* device, const void* host, size_t bytes);  // the host memory may change when this returns
void to_host(void* host, const void* device, size_t bytes);    // waits for the stream
void copy(void* to, const void* from, size_t bytes);
void clear(void* data, size_t bytes);
void synchronize();
void settle() noexcept;                     // waits for the ops so far, before memory is given back that is another's
uintptr_t stream_handle();                  // the cudaStream_t, for libraries beside this one
void follow(uintptr_t other_stream);        // what is enqueued there from now on comes after what is enqueued here

// ---- graph.cu --------------------------------------------------------------------------------------------------------

void begin_recording();             // what is enqueued from now on does not run; it becomes a graph
uint64_t end_recording(bool keep);  // the number of the graph; 0 where it is not kept, or could not be made
bool replay(uint64_t graph);        // enqueues all of it; false where it is gone
void drop_graph(uint64_t graph) noexcept;

// ---- elementwise.cu --------------------------------------------------------------------------------------------------

void cast(DType to_type, void* to, DType from_type, const void* from, size_t n);
void scale(DType type, void* data, float factor, size_t n);
void gelu_forward(DType type, const void* inp, void* out, size_t n);
void gelu_backward(DType type, const void* dout, const void* inp, void* dinp, size_t n);
void residual_forward(DType type, const void* inp1, const void* inp2, void* out, size_t n);
void residual_backward(DType type, const void* dout, void* dinp1, void* dinp2, size_t n);

// ---- encoder.cu ------------------------------------------------------------------------------------------------------

void encoder_forward(DType type, const int32_t* tokens, const void* wte, const void* wpe, void* out, size_t B, size_t T,
                     size_t C, size_t V);
void encoder_backward(DType type, const void* dout, const int32_t* tokens, void* dwte, void* dwpe, size_t B, size_t T,
                      size_t C, size_t V, size_t maxT, bool add_wte, bool add_wpe);

// ---- layernorm.cu ----------------------------------------------------------------------------------------------------

void layernorm_forward(DType type, const void* inp, const void* residual, const void* weight, const void* bias,
                       void* residual_out, void* out, float* mean, float* rstd, size_t rows, size_t C, float eps);
void layernorm_backward(DType type, const void* dout, const void* inp, const void* weight, const float* mean,
                        const float* rstd, const void* dresidual, void* dinp, void* dweight, void* dbias, size_t rows,
                        size_t C, bool accumulate);

// ---- cublaslt.cu -----------------------------------------------------------------------------------------------------

std::string open_cublaslt(const std::string& path);  // why this file cannot serve; empty where it does from now on
std::string cublaslt_version();                      // "13.1.1"; empty where none was opened
std::string version_text(size_t version);            // 130101 -> "13.1.1"
void set_products(bool tf32, bool autotune);
bool uses_tf32();
bool uses_autotune();
std::map<std::string, std::string> get_algorithms();  // kind of product -> algorithm, as hexadecimal digits
void set_algorithms(const std::map<std::string, std::string>& texts);

// ---- matmul.cu -------------------------------------------------------------------------------------------------------

void matmul_forward(DType type, const void* inp, const void* weight, const void* bias, const void* residual, bool gelu,
                    void* pre_gelu, void* out, size_t rows, size_t C, size_t OC);
void matmul_backward(DType type, const void* dout, const void* inp, const void* weight, const void* pre_gelu,
                     void* dinp, void* dweight, void* dbias, size_t rows, size_t C, size_t OC, bool accumulate);

// ---- attention.cu ----------------------------------------------------------------------------------------------------

void attention_forward(DType type, const void* qkv, void* out, float* lse, size_t B, size_t T, size_t NH, size_t HS);
void attention_backward(DType type, const void* dout, const void* qkv, const void* out, const float* lse, void* dqkv,
                        size_t B, size_t T, size_t NH, size_t HS);
void attention_decode(DType type, const void* qkv, void* key_cache, void* value_cache, void* out, size_t B, size_t n,
                      size_t position, size_t maxT, size_t NH, size_t HS);

// ---- classifier.cu ---------------------------------------------------------------------------------------------------

void set_logits_bytes(size_t bytes);
size_t logits_bytes();
void classifier_forward(DType type, const void* inp, const void* weight, const int32_t* targets, float* losses,
                        size_t rows, size_t C, size_t V, size_t Vp);
void classifier_forward_backward(DType type, const void* inp, const void* weight, const int32_t* targets,
                                 float loss_scale, float* losses, void* dinp, void* dweight, size_t rows, size_t C,
                                 size_t V, size_t Vp, bool accumulate);

// ---- softmax.cu ------------------------------------------------------------------------------------------------------

void softmax_forward(DType type, const void* inp, void* out, size_t rows, size_t V, size_t Vp);
void softmax_backward(DType type, const void* dout, const void* out, void* dinp, size_t rows, size_t V, size_t Vp);
void crossentropy_forward(DType type, const void* logits, const int32_t* targets, float* losses, float* lse, size_t rows,
                          size_t V, size_t Vp);
void crossentropy_backward(DType type, const float* dlosses, const void* logits, const int32_t* targets,
                           const float* lse, void* dlogits, size_t rows, size_t V, size_t Vp);
void mean_loss(const float* losses, const int32_t* targets, float* out, size_t n);

// ---- adamw.cu --------------------------------------------------------------------------------------------------------

struct AdamW {
    float one_minus_beta1;  // taken in double: near 1 a float beta has lost what matters
    float one_minus_beta2;
    float beta2;
    float eps;
    float grad_scale;
    float step_size;   // learning_rate / (1 - beta1^step)
    float root_scale;  // 1 / sqrt(1 - beta2^step)
    float decay;       // learning_rate * weight_decay
    uint64_t seed;
};

// parts: `count` rows of start, stop (in param and grad), start (in m, v and master), decayed.
void adamw_update(DType type, void* param, const void* grad, float* m, float* v, float* master, const int64_t* parts,
                  size_t count, const AdamW& settings);
void global_norm(DType type, const void* array, const int64_t* parts, size_t count, float* out);

// ---- nccl.cu: several processes --------------------------------------------------------------------------------------

std::string open_nccl(const std::string& path);  // why this file cannot serve; empty where it does from now on
std::string nccl_version();                      // "2.28.3"; empty where none was opened
std::string nccl_id();                           // 128 bytes: those who have the same meet in a communicator

struct Buffer {
    DType type;
    void* data;
    size_t n;
};

// This process among `size`. A call starts what it is named for; launched() and wait() tell, within so many seconds,
// how far it is. Where one of the others never comes they stay false: then abort() ends what waits for it.
class Communicator {
public:
    Communicator(const std::string& id, int rank, int size);
    void broadcast(const Buffer& block);                     // from rank 0
    void reduce_scatter(const std::vector<Buffer>& blocks);  // of each block, rank r's part becomes the sum over ranks
    void all_gather(const std::vector<Buffer>& blocks);      // of each block, rank r's part goes to all
    bool launched(double seconds);  // whether all that was started is on the stream, where the next may follow
    bool wait(double seconds);      // whether all of it is done; what is enqueued from now on comes after it
    void abort();
    void close(double seconds);     // when all that was started is done; after so many seconds it is aborted

private:
    struct Hidden;
    Hidden* hidden;  // never freed: at the end of the process the driver may be gone
};

}  // namespace pyllmc
