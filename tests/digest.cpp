// Prints a digest of many updates for each ISA that this CPU runs; fails where one is not the
// expected one. It has no Python in it, so that it also runs under an emulator of another CPU:
// .ci/isas does that.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <limits>
#include <vector>

#include "../csrc/dispatch.hpp"
#include "../csrc/step.hpp"

using namespace fused_adam;

namespace {

// Of the numerics id "adam-1". Whoever changes a rounding changes the id, and these.
constexpr uint64_t kExpected[kDTypes] = {0x241EB9CA0DBF0653, 0x0D2FD8B5FBCEC385};

// xorshift64*, by G. Marsaglia and S. Vigna: the same numbers everywhere.
class Random {
 public:
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1D;
  }

  // Mostly from [-0.5, 0.5); every fifth is a zero, a subnormal, huge, or infinite.
  template <class T>
  T value() {
    const T x = static_cast<T>(static_cast<double>(next() >> 11) * 0x1p-53 - 0.5);
    switch (next() % 20) {
      case 0:
        return T(0);
      case 1:
        return -T(0);
      case 2:
        return x * std::numeric_limits<T>::min();
      case 3:
        return x * (std::numeric_limits<T>::max() / 4);
      case 4:
        return next() % 8 == 0 ? std::numeric_limits<T>::infinity() : x;
      default:
        return x;
    }
  }

 private:
  uint64_t state_ = 0x9E3779B97F4A7C15;
};

// FNV-1a over the bytes of values. All NaN count alike: their sign and payload are not promised.
class Digest {
 public:
  template <class T>
  void add(T value) {
    if (value != value) value = T(12345);
    unsigned char bytes[sizeof(T)];
    memcpy(bytes, &value, sizeof value);
    for (const unsigned char byte : bytes) hash_ = (hash_ ^ byte) * 0x100000001B3;
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xCBF29CE484222325;
};

HyperParameters hyper_of(int variant) {
  HyperParameters hyper = {};
  hyper.lr = 1e-3 * (1 + variant);
  hyper.beta1 = variant % 3 == 0 ? 0.3 : 0.9;
  hyper.beta2 = 0.999;
  hyper.eps = 1e-8;
  hyper.weight_decay = variant & 1 ? 0.01 : 0.0;
  hyper.decoupled_weight_decay = (variant & 2) != 0;
  hyper.amsgrad = (variant & 4) != 0;
  hyper.maximize = (variant & 8) != 0;
  return hyper;
}

// Arrays of all lengths below a few vectors, and one that is large enough for threads.
template <class T>
uint64_t digest(const Isa& isa, DType dtype, int threads) {
  Random random;
  Digest result;
  for (int64_t size = 0; size < 300; ++size) {
    for (int variant = 0; variant < 16; ++variant) {
      const bool large = size == 299 && variant % 5 == 0;
      const auto length = static_cast<size_t>(large ? 100'003 : size);
      std::vector<T> streams[5];
      for (auto& stream : streams) {
        for (size_t i = 0; i < length; ++i) stream.push_back(random.value<T>());
      }
      for (size_t i = 0; i < length; ++i) {
        streams[3][i] *= streams[3][i];
        streams[4][i] *= streams[4][i];
      }
      StepPlan plan;
      plan.set_rule(hyper_of(variant), 1 + 7 * size);
      plan.add_array({streams[0].data(), streams[1].data(), streams[2].data(), streams[3].data(),
                      streams[4].data()},
                     static_cast<int64_t>(length), dtype);
      plan.run(*isa.kernels, {Threads::kTeam, threads});
      for (const auto& stream : streams) {
        for (const T value : stream) result.add(value);
      }
    }
  }
  return result.value();
}

}  // namespace

int main() {
  int wrong = 0;
  for (const Isa& isa : compiled_isas()) {
    if (!isa.supported) {
      printf("%-7s not on this CPU\n", isa.name);
      continue;
    }
    for (const int threads : {1, 3}) {
      const uint64_t found[kDTypes] = {digest<float>(isa, kFloat32, threads),
                                       digest<double>(isa, kFloat64, threads)};
      const bool right = memcmp(found, kExpected, sizeof found) == 0;
      printf("%-7s %d thread%s %016llx %016llx %s\n", isa.name, threads, threads > 1 ? "s" : " ",
             static_cast<unsigned long long>(found[0]), static_cast<unsigned long long>(found[1]),
             right ? "as expected" : "WRONG");
      wrong += !right;
    }
  }
  return wrong == 0 ? 0 : 1;
}
