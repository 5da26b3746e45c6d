// Main memory for torch's large CPU tensors: blocks that are kept and used again, within what was needed at the most.
//
// A training step takes and frees the same some hundred large blocks again and again. malloc either gives each back to
// the system (every page is then zeroed and mapped anew, a third of a step's time), or keeps a heap whose holes do not
// fit the next step's blocks (half as much memory again as the tensors ever hold). Here a freed block waits for a
// request that it fits, the smallest first, and whole blocks are given back, the longest unused first, as soon as all
// of them together would hold more than the tensors themselves have ever held at once, plus SLACK:
//
//     resident <= max(peak of live bytes, now live) + SLACK
//
// So the peak that a plan counts from shapes is the peak that the process has. Small tensors are malloc's own.
// allocator.py builds this file against the headers of the torch that is installed, and says where it cannot.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

constexpr size_t LARGE = 256 << 10;  // bytes: smaller requests go to malloc
constexpr size_t PAGE = 4096;
constexpr size_t SLACK = 48 << 20;
constexpr size_t WASTE = 2;  // a block may be this many times what was asked for

struct Block {
    char* at;
    size_t capacity;  // bytes that are mapped
    size_t size;      // bytes that its tensor asked for, in whole pages
    size_t touched;   // the first bytes that may be in main memory
    uint64_t freed;   // when it was freed last
};

struct SmallestThatFits {
    bool operator()(const Block* a, const Block* b) const {
        if (a->capacity != b->capacity) return a->capacity < b->capacity;
        return a->freed > b->freed;  // of equal ones the latest, which caches may still hold
    }
};

class Blocks {
public:
    Block* take(size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const size_t size = (bytes + PAGE - 1) / PAGE * PAGE, before = peak_;
        peak_ = std::max(peak_, live_ + size);
        Block wanted{nullptr, size, 0, 0, UINT64_MAX};
        auto found = free_.lower_bound(&wanted);
        Block* block;
        if (found != free_.end() && (*found)->capacity <= WASTE * size) {
            block = *found;
            free_.erase(found);
            make_room(size > block->touched ? size - block->touched : 0);
        } else {
            make_room(size);
            block = mapped(size, before);
        }
        live_ += size;
        block->size = size;
        resident_ += size > block->touched ? size - block->touched : 0;
        block->touched = std::max(block->touched, size);
        used_[block->at] = block;
        return block;
    }

    // Whether `at` was one of its blocks, which is then free again.
    bool give(void* at) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = used_.find(at);
        if (found == used_.end()) return false;
        Block* block = found->second;
        used_.erase(found);
        live_ -= block->size;
        block->freed = ++clock_;
        free_.insert(block);
        return true;
    }

    void release() {
        const std::lock_guard<std::mutex> lock(mutex_);
        while (!free_.empty()) unmap(oldest());
        peak_ = live_;
    }

    void count(int64_t* out) {
        const std::lock_guard<std::mutex> lock(mutex_);
        out[0] = static_cast<int64_t>(live_);
        out[1] = static_cast<int64_t>(peak_);
        out[2] = static_cast<int64_t>(resident_);
        out[3] = static_cast<int64_t>(mapped_);
    }

private:
    // Gives back what is not in use until `more` bytes go under the bound, or nothing is left to give.
    void make_room(size_t more) {
        const size_t bound = peak_ + SLACK;
        while (resident_ + more > bound && !free_.empty()) unmap(oldest());
        if (resident_ + more <= bound) return;
        for (const auto& [at, block] : used_) {  // the ends of blocks that are longer than their tensors
            if (block->touched == block->size) continue;
            madvise(block->at + block->size, block->touched - block->size, MADV_DONTNEED);
            resident_ -= block->touched - block->size;
            block->touched = block->size;
        }
    }

    Block* mapped(size_t size, size_t peak_before) {
        void* at = map(size);
        if (at == MAP_FAILED) {
            while (!free_.empty()) unmap(oldest());
            at = map(size);
        }
        if (at == MAP_FAILED) {
            peak_ = peak_before;
            TORCH_CHECK(false, "can't allocate memory: ", size, " bytes were asked for, ", live_, " are in use");
        }
        mapped_ += size;
        return new Block{static_cast<char*>(at), size, 0, 0, 0};
    }

    static void* map(size_t size) {
        return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }

    Block* oldest() const {
        const auto earlier = [](const Block* a, const Block* b) { return a->freed < b->freed; };
        return *std::min_element(free_.begin(), free_.end(), earlier);
    }

    void unmap(Block* block) {
        free_.erase(block);
        resident_ -= block->touched;
        munmap(block->at, block->capacity);
        delete block;
    }

    std::mutex mutex_;
    std::set<Block*, SmallestThatFits> free_;
    std::unordered_map<void*, Block*> used_;  // by where they begin
    size_t live_ = 0, peak_ = 0, resident_ = 0, mapped_ = 0;
    uint64_t clock_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Blocks& blocks() {
    static Blocks* all = new Blocks;
    return *all;
}

void free_large(void* at) { blocks().give(at); }

// For callers that have the address alone, such as oneDNN's convolutions.
void free_any(void* at) {
    if (!blocks().give(at)) std::free(at);
}

class KeepingAllocator final : public c10::Allocator {
public:
    c10::DataPtr allocate(size_t n) override {
        const c10::Device cpu(c10::DeviceType::CPU);
        if (n == 0) return {nullptr, cpu};
        if (n >= LARGE) {
            Block* block = blocks().take(n);
            return {block->at, block->at, &free_large, cpu};
        }
        void* at = nullptr;
        TORCH_CHECK(posix_memalign(&at, 64, n) == 0, "can't allocate memory: ", n, " bytes were asked for");
        return {at, at, &std::free, cpu};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &free_any; }

    void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};

}  // namespace

extern "C" {

// From now on torch's CPU tensors come from here. What was there before is freed where it came from.
void use_blocks() {
    static KeepingAllocator* allocator = new KeepingAllocator;
    c10::SetCPUAllocator(allocator, 255);
}

// Gives back all that is not in use.
void release_blocks() { blocks().release(); }

// out: bytes live, at the most so far, held from the system, and mapped anew so far.
void count_blocks(int64_t* out) { blocks().count(out); }
}
