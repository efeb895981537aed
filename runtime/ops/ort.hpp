// What the operators share of ONNX Runtime's C++ interface.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

namespace headpool {

inline size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

inline const float* floats(const Ort::ConstValue& value) { return value ? value.GetTensorData<float>() : nullptr; }

// What a tensor is. The operators' have at most four dimensions, so that none is read into memory that must be found first.
class Shape {
 public:
  Shape() = default;
  explicit Shape(const Ort::ConstValue& value) {
    expect(value != nullptr, "headpool: an input is missing");
    const auto info = value.GetTensorTypeAndShapeInfo();
    rank_ = info.GetDimensionsCount();
    expect(rank_ <= std::size(sizes_), "headpool: an input has more than four dimensions");
    Ort::ThrowOnError(Ort::GetApi().GetDimensions(info, sizes_, rank_));
    type_ = info.GetElementType();
  }

  size_t rank() const { return rank_; }
  int64_t operator[](size_t i) const { return sizes_[i]; }
  int64_t back() const { return sizes_[rank_ - 1]; }
  const int64_t* data() const { return sizes_; }
  ONNXTensorElementDataType type() const { return type_; }

  bool is(std::initializer_list<int64_t> sizes) const { return std::equal(sizes_, sizes_ + rank_, sizes.begin(), sizes.end()); }

  size_t elements() const {
    size_t count = 1;
    for (size_t i = 0; i < rank_; ++i) count *= sizes_[i];
    return count;
  }

 private:
  size_t rank_ = 0;
  int64_t sizes_[4];
  ONNXTensorElementDataType type_ = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
};

// At least `count` values that a thread keeps from step to step.
template <class T>
T* buffer(std::vector<T>& memory, size_t count) {
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

// work(i) for all i < total on the session's threads. What one of them throws is thrown when all have ended.
template <class F>
void parallel(const Ort::KernelContext& context, size_t total, const F& work) {
  if (total == 1) return work(0);
  struct Shared {
    const F& work;
    std::mutex mutex;
    std::exception_ptr error;
  } shared{work, {}, {}};
  context.ParallelFor(
      [](void* raw, size_t i) {
        Shared& all = *static_cast<Shared*>(raw);
        try {
          all.work(i);
        } catch (...) {  // ONNX Runtime's threads would end the process
          const std::lock_guard lock(all.mutex);
          all.error = std::current_exception();
        }
      },
      total, 0, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

// An operator of ONNX Runtime's own, in a kernel of ours. The list that it keeps of these goes when the process exits, maybe
// before a model that the program holds in a global variable: from then on none is released.
class StandardOp : public Ort::Op {
 public:
  StandardOp() : Ort::Op(nullptr) {}
  StandardOp& operator=(Ort::Op&& made) {
    static const AtExit before_the_list;  // which is there since the first was made
    Ort::Op::operator=(std::move(made));
    return *this;
  }
  ~StandardOp() {
    if (exiting) keep(release());
  }

 private:
  static void keep(OrtOp* op) {  // where checkers of leaks find it
    static std::mutex mutex;
    static auto* const kept = new std::vector<OrtOp*>;
    const std::lock_guard lock(mutex);
    kept->push_back(op);
  }

  static inline std::atomic<bool> exiting{false};
  struct AtExit {
    ~AtExit() { exiting = true; }
  };
};

// Derived has compute(OrtKernelContext*); what it throws becomes ONNX Runtime's error.
template <class Derived>
struct Kernel {
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    try {
      static_cast<Derived*>(this)->compute(context);
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
  }
};

template <class Op, class K>
struct Operator : Ort::CustomOpBase<Op, K, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    try {
      *kernel = std::make_unique<K>(info).release();
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
  }
};

const OrtCustomOp* chain_operator();                      // chain.cpp
std::array<const OrtCustomOp*, 3> attention_operators();  // attention.cpp

}  // namespace headpool
