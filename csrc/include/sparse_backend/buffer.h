// Memory that kernels need and torch does not own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace sparse_backend {

// Zeroed scratch of one task, aligned for every vector width.
template <typename T>
class Scratch {
  public:
    explicit Scratch(int64_t size) {
        const size_t bytes = (static_cast<size_t>(size > 0 ? size : 1) * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr) throw std::bad_alloc();
        std::memset(static_cast<void*>(data_), 0, bytes);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }
    T* get() const { return data_; }

  private:
    T* data_;
};

// A list that grows by doubling; room for a whole row is asked for once, entries are then written unchecked.
template <typename T>
class Growable {
  public:
    Growable() = default;
    Growable(const Growable&) = delete;
    Growable& operator=(const Growable&) = delete;
    ~Growable() { std::free(data_); }

    // The place to write next, with room for `more` entries.
    T* room(int64_t more) {
        if (size_ + more > capacity_) grow(more);
        return data_ + size_;
    }
    void advance(int64_t n) { size_ += n; }
    const T* data() const { return data_; }
    int64_t size() const { return size_; }

  private:
    __attribute__((noinline)) void grow(int64_t more) {
        int64_t capacity = capacity_ * 2 > size_ + more ? capacity_ * 2 : size_ + more;
        capacity = capacity > 1024 ? capacity : 1024;
        T* data = static_cast<T*>(std::realloc(data_, static_cast<size_t>(capacity) * sizeof(T)));
        if (data == nullptr) throw std::bad_alloc();
        data_ = data;
        capacity_ = capacity;
    }

    T* data_ = nullptr;
    int64_t size_ = 0;
    int64_t capacity_ = 0;
};

// What the forward of one task finds, rows in its own order.
template <typename T>
struct Found {
    Growable<int32_t> spikes, active, resets;
    Growable<T> x, p;
};

}  // namespace sparse_backend
