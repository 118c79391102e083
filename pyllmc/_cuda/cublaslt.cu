// Matrix products through cuBLASLt, which is opened at run time: the table of its functions, and for each kind of
// product (shape, types, what is done after) a plan with the algorithm that was chosen for it. The choice is the
// library's own first one, or the fastest of several that were timed, or one that was recorded by an earlier process:
// with the same library and GPU, the same algorithm gives the same bits.
#include "cublaslt.h"

#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "common.cuh"
#include "product.h"

namespace pyllmc {
namespace {

constexpr size_t WORKSPACE_BYTES = 32 << 20;  // what NVIDIA advises for Hopper
constexpr size_t OLDEST = 120400;             // 12.4.0
constexpr int CANDIDATES = 16, ROUNDS = 3, RUNS = 4;
constexpr size_t MAX_ALIGNMENT = 16;          // what vectors and the copy engine need; more is not told apart

// Everything that an algorithm depends on. Fields are numbers of one size, so that keys compare as arrays.
struct Key {
    uint64_t type, out_type, tf32, rows, columns, k, lda, ldb, ldo, a_transposed, b_transposed, add, after, vector,
        align_a, align_b, align_add, align_out;

    bool operator<(const Key& other) const { return std::memcmp(this, &other, sizeof *this) < 0; }
};

struct Plan {
    lt::Desc desc = nullptr;
    lt::Layout a = nullptr, b = nullptr, out = nullptr;
    lt::Algorithm algorithm{};
    size_t workspace = 0;
    bool there = false;  // whether the library has such a product
};

struct Library {
    lt::Functions call{};
    lt::Handle handle = nullptr;
    size_t version = 0;
    void* workspace = nullptr;
    std::mutex mutex;
    std::map<Key, Plan> plans;
    std::map<std::string, lt::Algorithm> recorded;
    bool tf32 = false, autotune = false;
};

Library& library() {
    static Library& the_one = *new Library;
    return the_one;
}

void check_status(lt::Status status, const char* call, int line) {
    if (status == lt::SUCCESS) return;
    throw std::runtime_error("cublaslt.cu:" + std::to_string(line) + ": cublasLt" + call + ": " +
                             library().call.GetStatusName(status));
}

#define LT(name, ...) check_status(library().call.name(__VA_ARGS__), #name, __LINE__)

size_t alignment(const void* data) {
    size_t align = MAX_ALIGNMENT;
    while (reinterpret_cast<uintptr_t>(data) % align != 0) align /= 2;
    return align;
}

Key key_of(const Product& p) {
    Key key{};
    key.type = p.type, key.out_type = p.out_type, key.tf32 = p.type == FLOAT32 && library().tf32;
    key.rows = p.rows, key.columns = p.columns, key.k = p.k, key.lda = p.lda, key.ldb = p.ldb, key.ldo = p.ldo;
    key.a_transposed = p.a_transposed, key.b_transposed = p.b_transposed, key.add = p.add != nullptr;
    key.after = static_cast<uint64_t>(p.after), key.vector = p.vector != nullptr;
    key.align_a = alignment(p.a), key.align_b = alignment(p.b), key.align_out = alignment(p.out);
    key.align_add = p.add ? alignment(p.add) : key.align_out;
    return key;
}

// "bf16 65536x2304x768 nt ld 768,768,2304 bias align 16,16,16,16": how a kind of product is recorded.
std::string name_of(const Key& key) {
    static const char* const AFTER[] = {"", " bias", " dgelu", " sum"};
    char text[256];
    const auto number = [](uint64_t n) { return static_cast<unsigned long long>(n); };
    std::snprintf(text, sizeof text, "%s%s %llux%llux%llu %c%c ld %llu,%llu,%llu%s%s align %llu,%llu,%llu,%llu",
                  key.type == BFLOAT16 ? "bf16" : key.tf32 ? "tf32" : "fp32",
                  key.type == key.out_type ? "" : "->fp32", number(key.rows), number(key.columns), number(key.k),
                  key.a_transposed ? 't' : 'n', key.b_transposed ? 't' : 'n', number(key.lda), number(key.ldb),
                  number(key.ldo), key.add ? " add" : "", AFTER[key.after],
                  number(key.align_a), number(key.align_b), number(key.align_add), number(key.align_out));
    return text;
}

lt::DataType data_type(uint64_t type) { return type == BFLOAT16 ? lt::R_16BF : lt::R_32F; }

lt::Epilogue epilogue(const Product& p) {
    switch (p.after) {
        case After::ADD_BIAS: return lt::BIAS;
        case After::DGELU: return lt::DGELU;
        case After::SUM_A: return lt::BGRADB;
        default: return lt::DEFAULT;
    }
}

// The addresses that stand in the description of a product, not in the call.
void point(const Plan& plan, const Product& p) {
    if (p.vector) LT(MatmulDescSetAttribute, plan.desc, lt::DESC_BIAS_POINTER, &p.vector, sizeof p.vector);
    if (p.aux) LT(MatmulDescSetAttribute, plan.desc, lt::DESC_AUX_POINTER, &p.aux, sizeof p.aux);
}

// The library counts column by column, so it sees every matrix transposed: out^T = b^T a^T. Its A is our b.
void describe(Plan& plan, const Key& key, const Product& p) {
    const lt::Operation of_b = p.b_transposed ? lt::T : lt::N, of_a = p.a_transposed ? lt::T : lt::N;
    const lt::Epilogue after = epilogue(p);
    LT(MatmulDescCreate, &plan.desc, key.tf32 ? lt::COMPUTE_32F_FAST_TF32 : lt::COMPUTE_32F, lt::R_32F);
    LT(MatmulDescSetAttribute, plan.desc, lt::DESC_TRANSA, &of_b, sizeof of_b);
    LT(MatmulDescSetAttribute, plan.desc, lt::DESC_TRANSB, &of_a, sizeof of_a);
    LT(MatmulDescSetAttribute, plan.desc, lt::DESC_EPILOGUE, &after, sizeof after);
    const int64_t ldo = static_cast<int64_t>(p.ldo);
    if (p.aux) LT(MatmulDescSetAttribute, plan.desc, lt::DESC_AUX_LD, &ldo, sizeof ldo);
    point(plan, p);
    const auto layout = [&](lt::Layout* which, DType type, size_t rows, size_t columns, bool transposed, size_t ld) {
        LT(MatrixLayoutCreate, which, data_type(type), transposed ? rows : columns, transposed ? columns : rows,
           static_cast<int64_t>(ld));
    };
    layout(&plan.a, p.type, p.rows, p.k, p.a_transposed, p.lda);
    layout(&plan.b, p.type, p.k, p.columns, p.b_transposed, p.ldb);
    layout(&plan.out, p.out_type, p.rows, p.columns, false, p.ldo);
}

lt::Status multiply(const Plan& plan, const lt::Algorithm& algorithm, size_t workspace, const Product& p, void* out) {
    const Library& of = library();
    const float alpha = 1.0f, beta = p.add ? 1.0f : 0.0f;
    return of.call.Matmul(of.handle, plan.desc, &alpha, p.b, plan.b, p.a, plan.a, &beta, p.add ? p.add : out, plan.out,
                          out, plan.out, &algorithm, workspace ? of.workspace : nullptr, workspace, stream());
}

std::vector<lt::Candidate> candidates(const Plan& plan, const Key& key, int most) {
    const Library& of = library();
    lt::Preference preference = nullptr;
    LT(MatmulPreferenceCreate, &preference);
    const uint64_t workspace = WORKSPACE_BYTES;
    const auto prefer = [&](lt::PreferenceAttribute attribute, auto value) {
        LT(MatmulPreferenceSetAttribute, preference, attribute, &value, sizeof value);
    };
    prefer(lt::PREFERENCE_MAX_WORKSPACE_BYTES, workspace);
    // Behind a product that is split, the library does what comes after it to the sums as they were stored.
    const auto after = static_cast<After>(key.after);
    const bool twice = key.out_type == BFLOAT16 && (after == After::ADD_BIAS || after == After::DGELU);
    prefer(lt::PREFERENCE_REDUCTION_SCHEME_MASK,
           twice ? lt::REDUCTION_SCHEME_NONE : lt::REDUCTION_SCHEME_COMPUTE_TYPE);
    prefer(lt::PREFERENCE_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(key.align_b));
    prefer(lt::PREFERENCE_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(key.align_a));
    prefer(lt::PREFERENCE_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(key.align_add));
    prefer(lt::PREFERENCE_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(key.align_out));
    std::vector<lt::Candidate> all(static_cast<size_t>(most)), good;
    int found = 0;
    const lt::Status status = of.call.MatmulAlgoGetHeuristic(of.handle, plan.desc, plan.b, plan.a, plan.out, plan.out,
                                                             preference, most, all.data(), &found);
    LT(MatmulPreferenceDestroy, preference);
    // What it cannot do after a product it may call an invalid value, too: there is a kernel for that.
    const bool lacks = status == lt::NOT_SUPPORTED || (status == lt::INVALID_VALUE && key.after != 0);
    if (!lacks) check_status(status, "MatmulAlgoGetHeuristic", __LINE__);
    all.resize(status == lt::SUCCESS ? static_cast<size_t>(found) : 0);
    for (const lt::Candidate& each : all)
        if (each.state == lt::SUCCESS && each.workspace <= WORKSPACE_BYTES) good.push_back(each);
    return good;
}

// Memory for trials. It is not kept: what they write is as large as what training keeps of a product, and needed once.
struct Trial {
    void* const data;
    explicit Trial(size_t bytes) : data(allocate(bytes)) {}
    ~Trial() { give_back(data); }
    Trial(const Trial&) = delete;
    Trial& operator=(const Trial&) = delete;
};

// The fastest candidate on these operands, the best of ROUNDS for each. It waits for the GPU, once for each kind of
// product. Results go to memory of their own: what is added to must not be added to again and again.
const lt::Candidate& fastest(const Plan& plan, const Product& p, const std::vector<lt::Candidate>& of) {
    Product trial = p;
    const size_t item = p.out_type == BFLOAT16 ? 2 : 4;
    const Trial out(p.rows * p.ldo * item), vector(p.rows * item);
    if (p.after == After::SUM_A) trial.vector = vector.data;
    point(plan, trial);
    cudaEvent_t start = nullptr, stop = nullptr;
    CHECK(cudaEventCreateWithFlags(&start, cudaEventDefault));
    CHECK(cudaEventCreateWithFlags(&stop, cudaEventDefault));
    std::vector<float> best(of.size(), FLT_MAX);
    for (int round = 0; round <= ROUNDS; ++round) {  // the first one warms up
        for (size_t i = 0; i < of.size(); ++i) {
            bool ran = true;
            CHECK(cudaEventRecord(start, stream()));
            for (int run = 0; run < RUNS; ++run)
                ran = ran && multiply(plan, of[i].algorithm, of[i].workspace, trial, out.data) == lt::SUCCESS;
            CHECK(cudaEventRecord(stop, stream()));
            CHECK(cudaEventSynchronize(stop));
            float milliseconds = 0.0f;
            CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
            if (ran && round > 0) best[i] = std::min(best[i], milliseconds);
        }
    }
    CHECK(cudaEventDestroy(start));
    CHECK(cudaEventDestroy(stop));
    point(plan, p);
    return of[static_cast<size_t>(std::min_element(best.begin(), best.end()) - best.begin())];
}

Plan make_plan(const Key& key, const Product& p) {
    Library& of = library();
    Plan plan;
    describe(plan, key, p);
    const auto recorded = of.recorded.find(name_of(key));
    if (recorded != of.recorded.end()) {
        lt::Candidate checked{};
        const lt::Status status = of.call.MatmulAlgoCheck(of.handle, plan.desc, plan.b, plan.a, plan.out, plan.out,
                                                          &recorded->second, &checked);
        if (status != lt::SUCCESS || checked.workspace > WORKSPACE_BYTES)
            throw std::invalid_argument("the recorded algorithm of the product " + recorded->first +
                                        " is damaged or of another library");
        plan.algorithm = recorded->second;
        plan.workspace = checked.workspace;
        plan.there = true;
        return plan;
    }
    const std::vector<lt::Candidate> found = candidates(plan, key, of.autotune ? CANDIDATES : 1);
    plan.there = !found.empty();
    if (!plan.there) return plan;
    lt::Candidate chosen = found[0];
    try {
        if (found.size() > 1) chosen = fastest(plan, p, found);
    } catch (const OutOfMemory&) {  // no place for the trials' results: what fits without timing has to fit with it
    }
    plan.algorithm = chosen.algorithm;
    plan.workspace = chosen.workspace;
    return plan;
}

void forget_plans() {
    for (const auto& [key, plan] : library().plans) {
        library().call.MatmulDescDestroy(plan.desc);
        for (lt::Layout layout : {plan.a, plan.b, plan.out}) library().call.MatrixLayoutDestroy(layout);
    }
    library().plans.clear();
}

}  // namespace

std::string open_cublaslt(const std::string& path) {
    void* opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) return dlerror();
    lt::Functions call{};
    for (const auto& [name, function] : {
#define X(result, name, parameters) std::pair{"cublasLt" #name, reinterpret_cast<void**>(&call.name)},
             CUBLASLT_FUNCTIONS(X)
#undef X
         }) {
        *function = dlsym(opened, name);
        if (*function == nullptr) return path + " has no " + name;
    }
    const size_t version = call.GetVersion();
    if (version < OLDEST) return path + " is version " + version_text(version) + ", too old";
    Library& of = library();
    const std::lock_guard<std::mutex> lock(of.mutex);
    stream();  // the device is made ready before the library looks for it
    lt::Handle handle = nullptr;
    const lt::Status status = call.Create(&handle);
    if (status != lt::SUCCESS) return path + " cannot start: " + call.GetStatusName(status);
    of.call = call;
    of.handle = handle;
    of.version = version;
    // Kept for good: a CUDA graph that was recorded with it may run at any time.
    of.workspace = allocate(WORKSPACE_BYTES);
    return "";
}

std::string version_text(size_t version) {
    return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
           std::to_string(version % 100);
}

std::string cublaslt_version() { return library().handle ? version_text(library().version) : ""; }

bool product(const Product& p) {
    Library& of = library();
    const std::lock_guard<std::mutex> lock(of.mutex);
    if (of.handle == nullptr) throw std::runtime_error("cublaslt.cu: the library was not opened");
    stream();  // this thread is bound to the device before the library looks for it
    const Key key = key_of(p);
    auto at = of.plans.find(key);
    if (at == of.plans.end())
        at = of.plans.emplace(key, make_plan(key, p)).first;
    else if (at->second.there)
        point(at->second, p);
    Plan& plan = at->second;
    if (plan.there) {
        const lt::Status status = multiply(plan, plan.algorithm, plan.workspace, p, p.out);
        if (status == lt::SUCCESS) return true;
        // It may name an algorithm and refuse it all the same; the bits of what is recorded stay as they were before.
        if (p.after == After::NOTHING || is_recording()) check_status(status, "Matmul", __LINE__);
        plan.there = false;
    }
    if (p.after == After::NOTHING) throw std::runtime_error("cuBLASLt has no product " + name_of(key));
    return false;
}

bool has_fast_epilogues(DType type) {
    return (type == BFLOAT16 || library().tf32) && compute_capability() >= 90;
}

void set_products(bool tf32, bool autotune) {
    library().tf32 = tf32;
    library().autotune = autotune;
}

bool uses_tf32() { return library().tf32; }

bool uses_autotune() { return library().autotune; }

std::map<std::string, std::string> get_algorithms() {
    Library& of = library();
    const std::lock_guard<std::mutex> lock(of.mutex);
    std::map<std::string, std::string> texts;
    const auto add = [&](const std::string& name, const lt::Algorithm& algorithm) {
        std::string text;
        for (uint64_t word : algorithm.data) {
            char part[17];
            std::snprintf(part, sizeof part, "%016llx", static_cast<unsigned long long>(word));
            text += part;
        }
        texts[name] = text;
    };
    for (const auto& [name, algorithm] : of.recorded) add(name, algorithm);
    for (const auto& [key, plan] : of.plans)
        if (plan.there) add(name_of(key), plan.algorithm);
    return texts;
}

void set_algorithms(const std::map<std::string, std::string>& texts) {
    std::map<std::string, lt::Algorithm> recorded;
    for (const auto& [name, text] : texts) {
        if (text.size() != 128 || text.find_first_not_of("0123456789abcdef") != std::string::npos)
            throw std::invalid_argument("the algorithm of \"" + name + "\" must be 128 hexadecimal digits");
        for (size_t i = 0; i < 8; ++i) recorded[name].data[i] = std::stoull(text.substr(16 * i, 16), nullptr, 16);
    }
    Library& of = library();
    const std::lock_guard<std::mutex> lock(of.mutex);
    forget_plans();
    of.recorded = std::move(recorded);
}

}  // namespace pyllmc
