// A stand-in for NCCL: collectives between processes of one machine, over Unix sockets, for as much of NCCL as
// pyllmc/_cuda uses. It is opened as the library is, from the file that it is part of. Rank 0 adds up, in rank order,
// and rounds after each addition as it goes; every call runs on the thread of its stream, in the order of the calls.
//
// Stricter than the library: collectives outside a group, before the communicator is ready or the last group is on its
// stream, that are not in place, or that differ between the ranks are errors; what a collective leaves undefined is NaN
// afterwards. As with GPUs that write to one another's memory nobody notices that a rank is gone: its partners wait.
#include "nccl.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <cuda_bf16.h>

#include "shim.h"

using namespace pyllmc::nccl;

namespace {

// For the tests: whether groups wait before they begin, the version.
std::atomic<bool> held{false};
int version = 22803;
std::string reason;

Result refuse(Result result, const char* why) {
    reason = why;
    return result;
}

enum Kind : int { BROADCAST, REDUCE, REDUCE_SCATTER, ALL_GATHER };

// What all ranks have to agree on.
struct Header {
    int kind, type, root;
    uint64_t count;

    bool operator==(const Header& other) const {
        return kind == other.kind && type == other.type && root == other.root && count == other.count;
    }
};

struct Call {
    Header header;
    const char* from;
    char* to;
};

}  // namespace

namespace pyllmc::nccl {

// Never freed, so that a call after the end can be refused.
struct CommOpaque {
    UniqueId id{};
    int rank = 0, size = 1;
    std::vector<int> sockets;        // rank 0: of all others; the others: of rank 0, at 0
    std::atomic<bool> ended{false};  // by abort or destroy
    std::atomic<int> state{IN_PROGRESS}, pending{0}, to_launch{0};
    bool finalized = false;

    // Everything, or false where the communicator ends first. A partner that is gone is waited for.
    bool transfer(int socket, char* data, size_t bytes, bool write) {
        while (bytes > 0 && !ended) {
            pollfd one{socket, static_cast<short>(write ? POLLOUT : POLLIN), 0};
            if (poll(&one, 1, 10) <= 0) continue;
            const ssize_t n = write ? send(socket, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) : recv(socket, data, bytes, MSG_DONTWAIT);
            if (n > 0) {
                data += n;
                bytes -= static_cast<size_t>(n);
            } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
                std::this_thread::sleep_for(std::chrono::milliseconds(5));
            }
        }
        return !ended;
    }

    bool put(int socket, const void* data, size_t bytes) {
        return transfer(socket, const_cast<char*>(static_cast<const char*>(data)), bytes, true);
    }
    bool get(int socket, void* data, size_t bytes) { return transfer(socket, static_cast<char*>(data), bytes, false); }

    void fail(Result result, const char* why) {
        refuse(result, why);
        state = result;
    }

    void meet() {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        char* name = address.sun_path + 1;  // the first byte is 0: a name that is no file
        for (int i = 0; i < 16; ++i) name += std::snprintf(name, 3, "%02x", static_cast<unsigned char>(id.bytes[i]));
        const socklen_t length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 33);
        const sockaddr* const to = reinterpret_cast<const sockaddr*>(&address);
        if (rank == 0) {
            const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (bind(listener, to, length) != 0 || listen(listener, size) != 0)
                return fail(INVALID_USAGE, "there is a rank 0 already");
            std::vector<int> found(static_cast<size_t>(size), -1);
            for (int here = 1; here < size && !ended;) {
                pollfd one{listener, POLLIN, 0};
                if (poll(&one, 1, 10) <= 0) continue;
                const int next = accept(listener, nullptr, nullptr);
                int who[2] = {0, 0};
                if (!get(next, who, sizeof who)) break;
                if (who[1] != size || who[0] < 1 || who[0] >= size || found[static_cast<size_t>(who[0])] >= 0)
                    return fail(INVALID_USAGE, "two ranks are the same, or not of one size");
                found[static_cast<size_t>(who[0])] = next;
                ++here;
            }
            close(listener);
            sockets = found;
            const char go = 1;
            for (size_t i = 1; i < sockets.size() && !ended; ++i) put(sockets[i], &go, 1);
        } else {
            int mine = -1;
            while (!ended) {
                mine = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
                if (connect(mine, to, length) == 0) break;
                close(mine);
                std::this_thread::sleep_for(std::chrono::milliseconds(5));
            }
            const int who[2] = {rank, size};
            char go = 0;
            sockets = {mine};
            if (ended || !put(mine, who, sizeof who) || !get(mine, &go, 1)) return;
        }
        state = SUCCESS;
    }

    // One collective; false where it does not come to its end.
    bool run(const Call& call) {
        const Header& h = call.header;
        const size_t item = h.type == BF16 ? 2 : 4, ranks = static_cast<size_t>(size), own = static_cast<size_t>(rank);
        const size_t bytes = h.count * item, whole = bytes * (h.kind == REDUCE_SCATTER ? ranks : 1);
        if (rank != 0) {
            int agreed = 0;
            if (!put(sockets[0], &h, sizeof h) || !put(sockets[0], call.from, whole)) return false;
            if (!get(sockets[0], &agreed, sizeof agreed)) return false;
            if (!agreed) return fail(INVALID_ARGUMENT, "the ranks do not ask for the same"), false;
            if (h.kind == REDUCE_SCATTER) std::memset(const_cast<char*>(call.from), 0xff, whole);
            if (h.kind == REDUCE && h.root != rank) std::memset(call.to, 0xff, bytes);
            if (h.kind == REDUCE && h.root != rank) return true;
            return get(sockets[0], call.to, h.kind == ALL_GATHER ? bytes * ranks : bytes);
        }
        std::vector<std::vector<char>> all(ranks);
        all[0].assign(call.from, call.from + whole);
        int agreed = 1;
        for (size_t r = 1; r < ranks; ++r) {
            Header other{};
            if (!get(sockets[r], &other, sizeof other)) return false;
            agreed = agreed && other == h;
            all[r].resize(other.count * (other.type == BF16 ? 2 : 4) * (other.kind == REDUCE_SCATTER ? ranks : 1));
            if (!get(sockets[r], all[r].data(), all[r].size())) return false;
        }
        for (size_t r = 1; r < ranks; ++r)
            if (!put(sockets[r], &agreed, sizeof agreed)) return false;
        if (!agreed) return fail(INVALID_ARGUMENT, "the ranks do not ask for the same"), false;
        std::vector<char> result = all[h.kind == BROADCAST ? static_cast<size_t>(h.root) : 0];
        if (h.kind == REDUCE || h.kind == REDUCE_SCATTER)
            for (size_t r = 1; r < ranks; ++r) add(result.data(), all[r].data(), whole / item, h.type);
        if (h.kind == ALL_GATHER)
            for (size_t r = 1; r < ranks; ++r) result.insert(result.end(), all[r].begin(), all[r].end());
        if (h.kind == REDUCE_SCATTER) std::memset(const_cast<char*>(call.from), 0xff, whole);
        if (h.kind == REDUCE) std::memset(call.to, 0xff, bytes);
        for (size_t r = 0; r < ranks; ++r) {
            if (h.kind == REDUCE && r != static_cast<size_t>(h.root)) continue;
            const char* data = result.data() + (h.kind == REDUCE_SCATTER ? r * bytes : 0);
            const size_t n = h.kind == ALL_GATHER ? bytes * ranks : bytes;
            if (r == own)
                std::memcpy(call.to, data, n);
            else if (!put(sockets[r], data, n))
                return false;
        }
        return true;
    }

    static void add(char* sums, const char* more, size_t n, int type) {
        for (size_t i = 0; i < n; ++i) {
            if (type == BF16) {
                __nv_bfloat16 a, b;
                std::memcpy(&a, sums + 2 * i, 2);
                std::memcpy(&b, more + 2 * i, 2);
                a = __float2bfloat16_rn(__bfloat162float(a) + __bfloat162float(b));
                std::memcpy(sums + 2 * i, &a, 2);
            } else {
                float a, b;
                std::memcpy(&a, sums + 4 * i, 4);
                std::memcpy(&b, more + 4 * i, 4);
                a += b;
                std::memcpy(sums + 4 * i, &a, 4);
            }
        }
    }

    void end() {
        ended = true;
        for (int each : sockets)
            if (each >= 0) shutdown(each, SHUT_RDWR);
    }
};

}  // namespace pyllmc::nccl

namespace {

thread_local bool in_group = false;
thread_local std::vector<Call> group;
thread_local Comm group_comm = nullptr;
thread_local cudaStream_t group_stream = nullptr;

Result call(Kind kind, const void* from, void* to, size_t count, DataType type, int root, Comm comm, cudaStream_t on) {
    if (comm == nullptr || comm->ended || comm->finalized) return refuse(INVALID_ARGUMENT, "the communicator has ended");
    if (!in_group) return refuse(INVALID_USAGE, "a collective outside a group");
    if (comm->state != SUCCESS || comm->to_launch > 0) return refuse(INVALID_USAGE, "the communicator is not ready");
    if (type != FLOAT && type != BF16) return refuse(INVALID_ARGUMENT, "a type that is not used");
    if (count == 0 || from == nullptr || to == nullptr || root < 0 || root >= comm->size)
        return refuse(INVALID_ARGUMENT, "nothing, or a root that there is not");
    const char* const a = static_cast<const char*>(from);
    char* const b = static_cast<char*>(to);
    const size_t offset = static_cast<size_t>(comm->rank) * count * (type == BF16 ? 2 : 4);
    if (b != (kind == REDUCE_SCATTER ? a + offset : kind == ALL_GATHER ? a - offset : a))
        return refuse(INVALID_ARGUMENT, "a collective that is not in place");
    if (group_comm != nullptr && (group_comm != comm || group_stream != on))
        return refuse(INVALID_USAGE, "two communicators or streams in a group");
    group_comm = comm;
    group_stream = on;
    group.push_back({{kind, type, root, count}, a, b});
    return SUCCESS;
}

}  // namespace

EXPORTED Result ncclGetVersion(int* number) {
    *number = version;
    return SUCCESS;
}

EXPORTED const char* ncclGetErrorString(Result result) {
    return result == SUCCESS ? "no error" : result == INVALID_USAGE ? "invalid usage" : "invalid argument";
}

EXPORTED const char* ncclGetLastError(Comm) { return reason.c_str(); }

EXPORTED Result ncclGetUniqueId(UniqueId* id) {
    return getrandom(id->bytes, sizeof id->bytes, 0) == sizeof id->bytes ? SUCCESS : refuse(INVALID_USAGE, "no id");
}

EXPORTED Result ncclCommInitRankConfig(Comm* comm, int size, UniqueId id, int rank, Config* config) {
    if (config->size != sizeof(Config) || config->magic != 0xcafebeef || config->version != 21400 || config->blocking != 0)
        return refuse(INVALID_ARGUMENT, "a configuration that is not used");
    *comm = new CommOpaque;
    (*comm)->id = id;
    (*comm)->rank = rank;
    (*comm)->size = size;
    std::thread(&CommOpaque::meet, *comm).detach();
    return IN_PROGRESS;
}

EXPORTED Result ncclCommGetAsyncError(Comm comm, Result* state) {
    if (comm == nullptr || comm->ended) return refuse(INVALID_ARGUMENT, "the communicator has ended");
    *state = static_cast<Result>(comm->state.load());
    if (*state == SUCCESS && comm->to_launch > 0) {
        --comm->to_launch;
        *state = IN_PROGRESS;
    }
    if (*state == SUCCESS && comm->finalized && comm->pending > 0) *state = IN_PROGRESS;
    return SUCCESS;
}

EXPORTED Result ncclCommFinalize(Comm comm) {
    if (comm == nullptr || comm->ended || comm->finalized) return refuse(INVALID_ARGUMENT, "the communicator has ended");
    comm->finalized = true;
    return IN_PROGRESS;
}

EXPORTED Result ncclCommDestroy(Comm comm) {
    if (comm == nullptr || comm->ended) return refuse(INVALID_ARGUMENT, "the communicator has ended");
    if (!comm->finalized || comm->pending > 0) return refuse(INVALID_USAGE, "the communicator is at work");
    comm->end();
    return SUCCESS;
}

EXPORTED Result ncclCommAbort(Comm comm) {
    if (comm == nullptr || comm->ended) return refuse(INVALID_ARGUMENT, "the communicator has ended");
    comm->end();
    return SUCCESS;
}

EXPORTED Result ncclGroupStart() {
    if (in_group) return refuse(INVALID_USAGE, "a group in a group");
    in_group = true;
    group.clear();
    group_comm = nullptr;
    return SUCCESS;
}

EXPORTED Result ncclGroupEnd() {
    if (!in_group) return refuse(INVALID_USAGE, "the end of no group");
    in_group = false;
    if (group_comm == nullptr) return SUCCESS;
    Comm const comm = group_comm;
    ++comm->pending;
    comm->to_launch = 2;
    shim::enqueue(group_stream, [comm, calls = group] {
        while (held && !comm->ended) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        for (const Call& each : calls)
            if (!comm->run(each)) break;
        --comm->pending;
    });
    return IN_PROGRESS;
}

EXPORTED Result ncclBroadcast(const void* from, void* to, size_t n, DataType type, int root, Comm comm, cudaStream_t on) {
    return call(BROADCAST, from, to, n, type, root, comm, on);
}

EXPORTED Result ncclReduce(const void* from, void* to, size_t n, DataType type, Operation operation, int root, Comm comm,
                           cudaStream_t on) {
    if (operation != SUM) return refuse(INVALID_ARGUMENT, "an operation that is not used");
    return call(REDUCE, from, to, n, type, root, comm, on);
}

EXPORTED Result ncclReduceScatter(const void* from, void* to, size_t part, DataType type, Operation operation, Comm comm,
                                  cudaStream_t on) {
    if (operation != SUM) return refuse(INVALID_ARGUMENT, "an operation that is not used");
    return call(REDUCE_SCATTER, from, to, part, type, 0, comm, on);
}

EXPORTED Result ncclAllGather(const void* from, void* to, size_t part, DataType type, Comm comm, cudaStream_t on) {
    return call(ALL_GATHER, from, to, part, type, 0, comm, on);
}

// ---- for the tests, through ctypes -----------------------------------------------------------------------------------

// No group begins while this is on; the version.
EXPORTED void shim_nccl_hold(int on) { held = on != 0; }
EXPORTED void shim_nccl_version(int number) { version = number; }
