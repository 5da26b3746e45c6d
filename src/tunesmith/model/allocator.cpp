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
// So the peak that a plan counts from shapes is the peak that the process has. Where a new block comes at that bound, the
// pages of what is given back are moved into it rather than zeroed anew. Small tensors are malloc's own.
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
#include <vector>

namespace {

constexpr size_t LARGE = 256 << 10;  // bytes: smaller requests go to malloc
constexpr size_t PAGE = 4096;
constexpr size_t SLACK = 48 << 20;
constexpr size_t WASTE = 2;        // a block may be this many times what was asked for
constexpr size_t MOVED = 1 << 20;  // the least that is moved at once: a process may have some 65,000 mappings

struct Block {
    char* at;
    size_t capacity;  // bytes that are mapped
    size_t size;      // bytes that its tensor asked for, in whole pages
    size_t touched;   // the first bytes that may be in main memory
    uint64_t freed;   // when it was freed last
    std::vector<size_t> pieces;  // the bytes of its mappings, in their order: pages of two cannot be moved at once
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
        Block wanted{nullptr, size, 0, 0, UINT64_MAX, {}};
        auto found = free_.lower_bound(&wanted);
        Block* block;
        if (found != free_.end() && (*found)->capacity <= WASTE * size) {
            block = *found;
            free_.erase(found);
        } else {
            block = mapped(size, before);
        }
        make_room(*block, size);
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
        while (!free_.empty()) give_back(oldest(), 0);
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
    // Gives back what is not in use until `wanted`, free no more, may have `size` bytes within the bound, or nothing is left
    // to give; what was given back becomes the pages that it lacks.
    void make_room(Block& wanted, size_t size) {
        const size_t more = size > wanted.touched ? size - wanted.touched : 0, bound = peak_ + SLACK;
        Goal goal{wanted.at, wanted.touched, std::max(size, wanted.touched), {}};
        while (resident_ + more > bound && !free_.empty()) {
            Block* block = oldest();
            const size_t least = std::max(resident_ + more - bound, MOVED);
            give_back(block, block->touched > least + MOVED ? block->touched - least : 0, &goal);
        }
        for (const auto& [at, block] : used_) {  // the ends of blocks that are longer than their tensors
            if (resident_ + more <= bound) break;
            if (block->touched > block->size) shrink(*block, block->size, &goal);
        }
        if (goal.pieces.empty()) return;
        std::vector<size_t> pieces = part(wanted.pieces, 0, wanted.touched);
        pieces.insert(pieces.end(), goal.pieces.begin(), goal.pieces.end());
        const std::vector<size_t> rest = part(wanted.pieces, goal.next, wanted.capacity);
        pieces.insert(pieces.end(), rest.begin(), rest.end());
        wanted.pieces = std::move(pieces);
    }

    // Where pages go: to `at` + `next`, up to `at` + `end`, in these pieces so far.
    struct Goal {
        char* at;
        size_t next, end;
        std::vector<size_t> pieces;
    };

    // Gives back a free block beyond `keep` bytes.
    void give_back(Block* block, size_t keep, Goal* goal = nullptr) {
        free_.erase(block);
        shrink(*block, keep, goal);
        if (keep)
            free_.insert(block);
        else
            delete block;
    }

    // Gives back what a block has beyond `keep` bytes, which it has touched; its pages are moved to `goal` if there is one.
    void shrink(Block& block, size_t keep, Goal* goal) {
        size_t at = keep;
        for (const size_t piece : part(block.pieces, keep, block.capacity)) {
            const size_t touched = block.touched - std::min(at, block.touched);
            const size_t size = goal ? std::min({piece, touched, goal->end - goal->next}) : 0;
            const size_t moved = size >= MOVED && move(block.at + at, goal->at + goal->next, size) ? size : 0;
            if (moved) {
                goal->pieces.push_back(moved);
                goal->next += moved;
            }
            if (moved < piece) munmap(block.at + at + moved, piece - moved);  // never what was moved: others may be there
            at += piece;
        }
        block.pieces = part(block.pieces, 0, keep);
        resident_ -= block.touched - keep;
        block.touched = block.capacity = keep;
    }

    static bool move(char* from, char* to, size_t size) {
        if (mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED) return true;
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;  // the system may have unmapped the goal before it failed
        const bool there = mmap(to, size, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;
        TORCH_CHECK(there, "can't allocate memory: ", size, " bytes");
        return false;
    }

    // The pieces, or parts of them, from byte `first` to byte `last`.
    static std::vector<size_t> part(const std::vector<size_t>& pieces, size_t first, size_t last) {
        std::vector<size_t> found;
        size_t at = 0;
        for (const size_t piece : pieces) {
            const size_t low = std::max(at, first), high = std::min(at + piece, last);
            if (low < high) found.push_back(high - low);
            at += piece;
        }
        return found;
    }

    Block* mapped(size_t size, size_t peak_before) {
        void* at = map(size);
        if (at == MAP_FAILED) {
            while (!free_.empty()) give_back(oldest(), 0);
            at = map(size);
        }
        if (at == MAP_FAILED) {
            peak_ = peak_before;
            TORCH_CHECK(false, "can't allocate memory: ", size, " bytes were asked for, ", live_, " are in use");
        }
        mapped_ += size;
        return new Block{static_cast<char*>(at), size, 0, 0, 0, {size}};
    }

    static void* map(size_t size) {
        return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }

    Block* oldest() const {
        const auto earlier = [](const Block* a, const Block* b) { return a->freed < b->freed; };
        return *std::min_element(free_.begin(), free_.end(), earlier);
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
