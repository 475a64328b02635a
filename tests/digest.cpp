// Compares a digest of many updates by each ISA that this CPU runs, for each form of the rule, with
// the expected one; fails where they differ. It has no Python in it, so that it also runs under an
// emulator of another CPU: .ci/isas does that.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../csrc/dispatch.hpp"
#include "../csrc/step.hpp"
#include "../csrc/stream_table.hpp"

using namespace fused_adam;

namespace {

// A form of the rule and its digest in two dtypes, of the numerics id "adam-1". A new form adds a
// row, and the others show that nothing moved. Whoever changes a rounding changes the id and all
// rows.
struct Row {
  const char* form;
  void (*set)(HyperParameters&);  // what it changes of the options in digest()
  uint64_t expected[2];
  bool zero_grad = false, begins = false;  // those streams that begin as copies
  double grad_scale = 1.0;
  DType param = kFloat32;  // of rows for moments
};

// Of the types that are computed in. "From grad": the average is nearer to the gradient. "Beta2
// almost 1": the smallest corrections.
const Row kRows[] = {
    {"plain", [](HyperParameters&) {}, {0x018635EAD48D0B10, 0x1A454F0878B78441}},
    {"l2",
     [](HyperParameters& h) { h.weight_decay = 0.01; },
     {0x8D5828EC03AE9F75, 0xA4221FC3C4FF3A67}},
    {"amsgrad",
     [](HyperParameters& h) { h.amsgrad = true; },
     {0xA31621BBAAA7FD9A, 0xF6649CF1E349D1BF}},
    {"l2, amsgrad",
     [](HyperParameters& h) { h.weight_decay = 0.01, h.amsgrad = true; },
     {0x395E7E225FC42973, 0x21EC2C67239E1EA8}},
    {"from grad",
     [](HyperParameters& h) { h.beta1 = 0.3; },
     {0xFE8F4AA821A37B4D, 0xEB03B965A26204AC}},
    {"from grad, l2",
     [](HyperParameters& h) { h.beta1 = 0.3, h.weight_decay = 0.01; },
     {0xE02DDB0340E062BE, 0x9D75BF4D49D1336A}},
    {"from grad, amsgrad",
     [](HyperParameters& h) { h.beta1 = 0.3, h.amsgrad = true; },
     {0xB2505250C945A3C4, 0x1D886AAE1E5D56F2}},
    {"from grad, l2, amsgrad",
     [](HyperParameters& h) { h.beta1 = 0.3, h.weight_decay = 0.01, h.amsgrad = true; },
     {0xEE9F5959DCC12E9B, 0x37A70D9FF459E5A5}},
    {"maximize",
     [](HyperParameters& h) { h.maximize = true; },
     {0xEFF25D965811EDE1, 0x1C6B639A01CA9A06}},
    {"maximize, l2",
     [](HyperParameters& h) { h.maximize = true, h.weight_decay = 0.01; },
     {0x85A65001084B4DCC, 0x15A0DE7FC02C98F1}},
    {"maximize, from grad",
     [](HyperParameters& h) { h.maximize = true, h.beta1 = 0.3; },
     {0x483A6EF1AA23AB08, 0xCB7996C28CC3A3AA}},
    {"decoupled",
     [](HyperParameters& h) { h.weight_decay = 0.01, h.decoupled_weight_decay = true; },
     {0x34DDA13D751C4932, 0x2C3B160932C47061}},
    {"betas 0",
     [](HyperParameters& h) { h.beta1 = h.beta2 = 0; },
     {0x46E63DB92CCF24E1, 0xEB8283AC3CF78F2B}},
    {"beta2 almost 1",
     [](HyperParameters& h) { h.beta2 = 1 - 0x1p-53; },
     {0xC38893506FCDA413, 0x052345B5E75A3C46}},
    {"eps 0", [](HyperParameters& h) { h.eps = 0; }, {0xE7900DC709FAFCC9, 0x72268AA03D66562F}},
    {"zero_grad", [](HyperParameters&) {}, {0xD851096571094740, 0x666F2CE0D4EE9052}, true},
    {"ema",
     [](HyperParameters& h) { h.ema_decay = 0.999; },
     {0x6C49D4EDE46A5EA3, 0xBA631023CCEFDA4A}},
    {"ema from param",
     [](HyperParameters& h) { h.ema_decay = 0.3; },
     {0x2C566B7C5EA4EAD5, 0x622612E2C3FE3D82}},
    {"ema begins, l2, amsgrad, zero_grad",
     [](HyperParameters& h) { h.ema_decay = 0.9, h.weight_decay = 0.01, h.amsgrad = true; },
     {0xA78AE05D71EAC10F, 0x50AB61883ED0194B},
     true,
     true},
    {"clip_value, grad_scale 3",
     [](HyperParameters& h) { h.clip_value = 0.2; },
     {0x856D72DC164DBECE, 0xD3FA3540ACAC87B0},
     false,
     false,
     3.0},
    {"max_norm",
     [](HyperParameters& h) { h.max_norm = 0.5; },
     {0xD67EE0E7F39D6B90, 0x0F6B85959D47FE66}},
    {"max_norm, grad_scale 1024, ema, zero_grad",
     [](HyperParameters& h) { h.max_norm = 3.0, h.ema_decay = 0.9; },
     {0xE81F15DE856A1514, 0x960A42777AB6DFAC},
     true,
     false,
     1024.0},
    {"eps hat",
     [](HyperParameters& h) { h.eps_mode = h.kHat; },
     {0x8AFEF1A9040CB49E, 0x42FA9AC758B40E10}},
    {"eps in the root, amsgrad",
     [](HyperParameters& h) { h.eps_mode = h.kRoot, h.amsgrad = true; },
     {0xAF9116FB0C17650A, 0x63C6B6D6ADBA7CAC}},
    {"uncorrected, from grad, l2, eps in the root",
     [](HyperParameters& h) {
       h.bias_correction = false, h.beta1 = 0.3, h.weight_decay = 0.01, h.eps_mode = h.kRoot;
     },
     {0xB1812B8A0311BE81, 0xF1918A3EA3EDEAB0}},
    {"skip_nonfinite, zero_grad",
     [](HyperParameters& h) { h.skip_nonfinite = true; },
     {0x59C3EEC373B9A8A9, 0x25C0CE67B5D76874},
     true},
};

// Of those that are decoded, param and gradient: what is around the rule, which is that of float32.
const Row kCodedRows[] = {
    {"plain", [](HyperParameters&) {}, {0xFA6A90310A913D41, 0x14DF6034B332EE39}},
    {"l2, amsgrad, zero_grad",
     [](HyperParameters& h) { h.weight_decay = 0.01, h.amsgrad = true; },
     {0xF578DBF6EC4CA95B, 0x2F5353D2E67C9BD0},
     true},
    {"ema begins, max_norm, grad_scale 1024",
     [](HyperParameters& h) { h.max_norm = 3.0, h.ema_decay = 0.9; },
     {0x565056E1894685A3, 0xCF18B05EF0E11B9B},
     false,
     true,
     1024.0},
    {"master weights, l2",
     [](HyperParameters& h) { h.weight_decay = 0.01, h.master_weights = true; },
     {0x23D49F331DB169CE, 0xDC49D3731B11969D}},
    {"master weights and ema begin",
     [](HyperParameters& h) { h.ema_decay = 0.9, h.master_weights = true; },
     {0x0CDE70BD845EAB09, 0xC7F2E4AC612D64E2},
     false,
     true},
    {"stochastic rounding",
     [](HyperParameters& h) { h.stochastic_rounding = true, h.seed = 0x123456789AB; },
     {0x2ECFFDAAC9C75AB6, 0xB318309438C49450}},
    {"stochastic rounding, ema begins, zero_grad",
     [](HyperParameters& h) { h.stochastic_rounding = true, h.ema_decay = 0.9; },
     {0xB421211B4D2907F8, 0x8EDD3C27992F157C},
     true,
     true},
};

// Of moments in bfloat16 and in 8 bits.
const Row kStateRows[] = {
    {"moments", [](HyperParameters&) {}, {0x7739E4C344484D2D, 0x24750EBFC7F28858}},
    {"moments, l2, amsgrad",
     [](HyperParameters& h) { h.weight_decay = 0.01, h.amsgrad = true; },
     {0x020E33950C4D4D97, 0xCDF32EB95720F346}},
    {"moments, from grad, eps in the root, decoupled",
     [](HyperParameters& h) {
       h.beta1 = 0.3, h.eps_mode = h.kRoot, h.weight_decay = 0.01, h.decoupled_weight_decay = true;
     },
     {0x78137778EF90B9E0, 0x3F34F42AC71CA9C9}},
    {"moments, ema begins, max_norm, grad_scale 1024, zero_grad",
     [](HyperParameters& h) { h.max_norm = 3.0, h.ema_decay = 0.9; },
     {0xCC3C284A833F9C91, 0x77B790C899D9123F},
     true,
     true,
     1024.0},
    {"moments of bfloat16",
     [](HyperParameters&) {},
     {0xD7DDDAC05B0D1974, 0xD82C920CC7026C65},
     false,
     false,
     1.0,
     kBFloat16},
    {"moments of float16, amsgrad, stochastic rounding",
     [](HyperParameters& h) { h.amsgrad = h.stochastic_rounding = true; },
     {0x4A0D347CF554692E, 0x92C461CE534D1B8F},
     false,
     false,
     1.0,
     kFloat16},
    {"moments of bfloat16, master weights begin, l2",
     [](HyperParameters& h) { h.master_weights = true, h.weight_decay = 0.01; },
     {0xA2BE694E271D2E45, 0x6EC6C3875EF7FF69},
     false,
     true,
     1.0,
     kBFloat16},
};

// xorshift64*, by G. Marsaglia and S. Vigna: the same numbers everywhere.
class Random {
 public:
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1D;
  }

  // Mostly from [-0.5, 0.5); every fifth is a zero, a subnormal, huge, infinite, or NaN.
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
        switch (next() % 16) {
          case 0:
            return std::numeric_limits<T>::infinity();
          case 1:
            return std::numeric_limits<T>::quiet_NaN();
          default:
            return x;
        }
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

// Of arrays of all lengths below many vectors, and of one that is large enough for threads.
template <class T>
uint64_t digest(const StageTable& stages, DType dtype, const Row& row, int threads,
                HyperParameters::StateDType state = HyperParameters::kFull) {
  HyperParameters hyper;
  row.set(hyper);
  hyper.state_dtype = state;
  if (state == HyperParameters::kStateFloat8) hyper.amsgrad = false;  // which has no such moment
  Random random;
  Digest result;
  for (int64_t round = 0; round <= 200; ++round) {
    const int64_t length = round < 200 ? round : 70'003;
    std::vector<T> values[kStreams];
    std::vector<unsigned char> codes[kStreams];
    std::vector<unsigned char> exponents[kStreams];  // of their blocks
    const Storage storage = {dtype, hyper.state_dtype};
    Streams streams = {};
    for (const StreamInfo& info : kStreamTable) {
      // Streams that only some forms have do not change what the others are given.
      if (info.stream > kMaxExpAvgSq && !info.wanted(hyper)) continue;
      if (info.elements_per_entry != 1) continue;
      auto& stream = values[info.stream];
      for (int64_t i = 0; i < length; ++i) stream.push_back(random.value<T>());
      streams.at[info.stream] = stream.data();
    }
    const auto count = static_cast<size_t>(length);
    if (hyper.clips_norm()) {  // which would make NaN of everything
      const T most = is_coded(dtype) ? T(60000) : std::numeric_limits<T>::max();
      for (T& value : values[kGrad]) value = std::abs(value) <= most ? value : T(1);
    }
    for (T& value : values[kExpAvgSq]) value = std::abs(value);
    for (T& value : values[kMaxExpAvgSq]) value = std::abs(value);
    const auto stored_as = [&](Stream stream) {
      return stream == kGrad ? dtype : dtype_of(stream, storage);
    };
    for (int i = 0; i < kStreams; ++i) {
      const auto stream = static_cast<Stream>(i);
      const DType stored = stored_as(stream);
      if (values[i].size() != count || !is_coded(stored) || sizeof(T) != sizeof(float)) continue;
      codes[i].resize(count * static_cast<size_t>(size_of(stored)));
      exponents[i].resize(count / kBlock + 1);
      const auto* const numbers = reinterpret_cast<const float*>(values[i].data());
      if (stored - kComputed < kRounded) {
        stages_scalar.encode[stored - kComputed](numbers, codes[i].data(), length);
      } else {
        stages_scalar.encode_dithered[stored - kComputed](numbers, codes[i].data(),
                                                          exponents[i].data(), 0, length, 12345);
        streams.at[scale_of(stream)] = exponents[i].data();
      }
      streams.at[i] = codes[i].data();
    }
    StepPlan plan;
    StepWishes wishes;
    wishes.zero_grad = row.zero_grad;
    wishes.grad_scale = row.grad_scale;
    wishes.add(hyper);
    plan.begin(wishes);
    plan.set_rule(hyper, 1 + 7 * round);
    const unsigned begins = row.begins ? copies_of_param() : 0;
    plan.add_array(streams, length, storage, dtype, begins, 5);
    plan.end();
    const Threads some = {Threads::kTeam, threads};
    const StepReport report = plan.measure(stages, some);
    plan.run(stages, some, report);
    if (report.measured) result.add(report.grad_norm);
    for (int i = 0; i < kStreams; ++i) {
      if (codes[i].empty()) continue;
      const DType stored = stored_as(static_cast<Stream>(i));
      stages_scalar.decode[stored - kComputed](codes[i].data(), exponents[i].data(),
                                               reinterpret_cast<float*>(values[i].data()), length);
    }
    for (const auto& stream : values) {
      for (const T value : stream) result.add(value);
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
      int as_expected = 0;
      const auto compare = [&](const Row& row, const uint64_t (&found)[2]) {
        if (memcmp(found, row.expected, sizeof found) == 0) {
          ++as_expected;
          return;
        }
        ++wrong;
        printf("%-7s %s: {0x%016llX, 0x%016llX} WRONG\n", isa.name, row.form,
               static_cast<unsigned long long>(found[0]),
               static_cast<unsigned long long>(found[1]));
      };
      static_assert(kParamTypes == 4 && HyperParameters::kStateDTypes == 3,
                    "a type that is not digested here would count as expected");
      const StageTable& stages = *isa.stages;
      for (const Row& row : kRows) {
        compare(row, {digest<float>(stages, kFloat32, row, threads),
                      digest<double>(stages, kFloat64, row, threads)});
      }
      for (const Row& row : kCodedRows) {
        compare(row, {digest<float>(stages, kFloat16, row, threads),
                      digest<float>(stages, kBFloat16, row, threads)});
      }
      for (const Row& row : kStateRows) {
        const auto with = [&](HyperParameters::StateDType state) {
          return digest<float>(stages, row.param, row, threads, state);
        };
        compare(row, {with(HyperParameters::kStateBFloat16), with(HyperParameters::kStateFloat8)});
      }
      printf("%-7s %d thread%s %d forms as expected\n", isa.name, threads, threads > 1 ? "s" : " ",
             as_expected);
    }
  }
  return wrong == 0 ? 0 : 1;
}
