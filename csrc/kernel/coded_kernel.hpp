// The stage that is Adam where something is stored in fewer bytes than float32 has: decoded,
// updated and encoded in registers, by the rule of all others.
//
// As stages of their own, over tiles in scratch, the conversions of bfloat16 moments took 0.27 ns
// an element (AVX-512, Zen 4; the rule 0.40): the rule waits for the divider, and a CPU does not
// see from one loop into the next.
//
// There are two kernels for each coding of moments and not some hundred. One is for the usual step,
// param and gradient alike, without L2 decay and amsgrad; in the other all of that is flags, whose
// branches always go one way: 92 instructions for 8 elements (AVX2, bfloat16 moments), of the usual
// one 46.
#pragma once

#include "adam_kernel.hpp"
#include "convert_kernel.hpp"

namespace fused_adam {
namespace {

template <class F>
inline F load_as(DType dtype, const void* array, int64_t i) {
  switch (dtype) {
    case kFloat16:
      return F::load_float16(static_cast<const uint16_t*>(array) + i);
    case kBFloat16:
      return F::load_bfloat16(static_cast<const uint16_t*>(array) + i);
    default:
      return F::load(static_cast<const float*>(array) + i);
  }
}

template <class F>
inline void store_as(DType dtype, void* array, int64_t i, F x) {
  switch (dtype) {
    case kFloat16:
      return store_float16(static_cast<uint16_t*>(array) + i, x);
    case kBFloat16:
      return store_bfloat16(static_cast<uint16_t*>(array) + i, x);
    default:
      return store(static_cast<float*>(array) + i, x);
  }
}

// What is stored as what, and which terms the rule has.
struct AnyForm {
  DType param, grad;
  bool l2, amsgrad;
  bool lerp_from_grad, eps_in_root;
};
template <DType dtype>
struct UsualForm {
  static constexpr DType param = dtype, grad = dtype;
  static constexpr bool l2 = false, amsgrad = false;
  static constexpr bool lerp_from_grad = false, eps_in_root = false;
};

template <class F>
struct Moments {
  F exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// Moments that are float32.
template <class F, class Form>
class PlainMoments {
 public:
  static constexpr bool exact = true;     // see update_param
  static constexpr int kUnit = F::width;  // elements that are updated together, at least
  struct Scratch {};
  PlainMoments(const Streams& streams, const CodedStep&, Form form, Scratch&)
      : m_(stream<float>(streams, kExpAvg)),
        v_(stream<float>(streams, kExpAvgSq)),
        v_max_(stream<float>(streams, kMaxExpAvgSq)),
        form_(form) {}

  FUSED_ADAM_INLINE Moments<F> load(int64_t i) const {
    const F v = F::load(v_ + i);
    return {F::load(m_ + i), v, form_.amsgrad ? F::load(v_max_ + i) : v};
  }
  FUSED_ADAM_INLINE void store(int64_t i, const Moments<F>& x) {
    fused_adam::store(m_ + i, x.exp_avg);
    fused_adam::store(v_ + i, x.exp_avg_sq);
    if (form_.amsgrad) fused_adam::store(v_max_ + i, x.max_exp_avg_sq);
  }
  FUSED_ADAM_INLINE void end(int64_t) {}

 private:
  float *const m_, *const v_, *const v_max_;
  const Form form_;
};

template <class F, class Form>
class BFloat16Moments {
 public:
  using Word = typename F::Word;
  static constexpr bool exact = false;
  static constexpr int kUnit = F::width;
  struct Scratch {};
  BFloat16Moments(const Streams& streams, const CodedStep& step, Form form, Scratch&)
      : m_(stream<uint16_t>(streams, kExpAvg)),
        v_(stream<uint16_t>(streams, kExpAvgSq)),
        v_max_(stream<uint16_t>(streams, kMaxExpAvgSq)),
        form_(form),
        first_(step.first),
        of_m_(step.dithers[0]),
        of_v_(step.dithers[1]),
        of_v_max_(step.dithers[2]) {
    set_words(first_);
  }

  FUSED_ADAM_INLINE Moments<F> load(int64_t i) const {
    const F v = F::load_bfloat16(v_ + i);
    return {F::load_bfloat16(m_ + i), v, form_.amsgrad ? F::load_bfloat16(v_max_ + i) : v};
  }
  FUSED_ADAM_INLINE void store(int64_t i, const Moments<F>& x) {
    const int64_t within = (first_ + i) & (kBlock - 1);
    if (within == 0) set_words(first_ + i);
    const uint32_t* const net = kNet16.at + within;
    if (any_nan(x.exp_avg, x.exp_avg_sq)) {
      store_bfloat16(m_ + i, x.exp_avg, net, word_m_);
      store_bfloat16(v_ + i, x.exp_avg_sq, net, word_v_);
    } else {
      store_bfloat16_number(m_ + i, x.exp_avg, net, word_m_);
      store_bfloat16_number(v_ + i, x.exp_avg_sq, net, word_v_);
    }
    if (form_.amsgrad) store_bfloat16(v_max_ + i, x.max_exp_avg_sq, net, word_v_max_);
  }
  FUSED_ADAM_INLINE void end(int64_t) {}

 private:
  FUSED_ADAM_INLINE void set_words(int64_t element) {
    word_m_ = Word(word_of(of_m_, element) >> 16);
    word_v_ = Word(word_of(of_v_, element) >> 16);
    word_v_max_ = Word(word_of(of_v_max_, element) >> 16);
  }

  uint16_t *const m_, *const v_, *const v_max_;
  const Form form_;
  const int64_t first_;
  const uint32_t of_m_, of_v_, of_v_max_;
  Word word_m_, word_v_, word_v_max_;
};

// A block is encoded while the next one is updated: not before all of it is there is its largest
// number known. Meanwhile its numbers are in scratch, which has room for two.
template <class F, class Type>
class BlockCoder {
 public:
  using Word = typename F::Word;
  BlockCoder(uint8_t* codes, uint8_t* exponents, uint32_t dither, float* scratch)
      : codes_(codes), exponents_(exponents), dither_(dither), scratch_(scratch) {}

  // i: the first element of a block.
  FUSED_ADAM_INLINE void begin(int64_t i) {
    base_ = Word(base_of<Type>(exponents_[i / kBlock]));
    largest_ = F::broadcast(0.0f);
  }
  FUSED_ADAM_INLINE F load(int64_t i) const { return Type::load(codes_ + i, base_); }
  FUSED_ADAM_INLINE void keep(int64_t i, F x) {
    largest_ = max_bits(largest_, Type::size(x));
    store(scratch_ + (i & (2 * kBlock - 1)), x);
  }
  // The block that begins with i is there. element: its number in the array.
  FUSED_ADAM_INLINE void finish(int64_t i, int64_t element) {
    const uint32_t exponent = exponent_for(largest_bits(largest_));
    exponents_[i / kBlock] = static_cast<uint8_t>(exponent);
    const uint32_t base = base_of<Type>(exponent), word = word_of(dither_, element) >> 12;
    new_base_ = Word(base);
    word_ = Word(word);
    is_finite_ = exponent < 255;
    if (!is_finite_) {
      const float* const numbers = scratch_ + (i & (2 * kBlock - 1));
      store_with_nonfinite<Type>(codes_ + i, numbers, base, kNet20.at, word);
    }
  }
  // The same, and all of it encoded at once.
  FUSED_ADAM_INLINE void end(int64_t i, int64_t element) {
    encode_block<F, Type>(scratch_ + (i & (2 * kBlock - 1)), codes_ + i, exponents_ + i / kBlock,
                          element, dither_);
  }
  // Some elements of the block that was finished last.
  FUSED_ADAM_INLINE void encode(int64_t i) {
    if (!is_finite_) return;
    Type::store(codes_ + i, scratch_ + (i & (2 * kBlock - 1)), new_base_,
                kNet20.at + (i & (kBlock - 1)), word_);
  }

 private:
  uint8_t *const codes_, *const exponents_;
  const uint32_t dither_;
  float* const scratch_;
  Word base_{}, new_base_{}, word_{};
  bool is_finite_ = true;
  F largest_ = F::broadcast(0.0f);
};

// Without a largest second moment: options.cpp refuses amsgrad, and says why.
template <class F, class Form>
class Float8Moments {
 public:
  static constexpr bool exact = false;
  static constexpr int kUnit = kBlock;
  struct Scratch {
    alignas(64) float m[2 * kBlock], v[2 * kBlock];
  };
  Float8Moments(const Streams& streams, const CodedStep& step, Form, Scratch& scratch)
      : m_(stream<uint8_t>(streams, kExpAvg), stream<uint8_t>(streams, kExpAvgScale),
           step.dithers[0], scratch.m),
        v_(stream<uint8_t>(streams, kExpAvgSq), stream<uint8_t>(streams, kExpAvgSqScale),
           step.dithers[1], scratch.v),
        first_(step.first) {}

  FUSED_ADAM_INLINE Moments<F> load(int64_t i) {
    if ((i & (kBlock - 1)) == 0) {
      if (i > 0) finish(i - kBlock);
      m_.begin(i);
      v_.begin(i);
    }
    const F v = v_.load(i);
    return {m_.load(i), v, v};
  }
  FUSED_ADAM_INLINE void store(int64_t i, const Moments<F>& x) {
    m_.keep(i, x.exp_avg);
    v_.keep(i, x.exp_avg_sq);
    const bool group_ends = ((i + F::width) & (F::codes_at_once - 1)) == 0;
    if (group_ends && i >= kBlock) encode(i + F::width - F::codes_at_once - kBlock);
  }
  FUSED_ADAM_INLINE void end(int64_t count) {
    const int64_t i = count - kBlock;
    m_.end(i, first_ + i);
    v_.end(i, first_ + i);
  }

 private:
  FUSED_ADAM_INLINE void finish(int64_t i) {
    m_.finish(i, first_ + i);
    v_.finish(i, first_ + i);
  }
  FUSED_ADAM_INLINE void encode(int64_t i) {
    m_.encode(i);
    v_.encode(i);
  }

  BlockCoder<F, E4M3<F>> m_;
  BlockCoder<F, E5M3<F>> v_;
  const int64_t first_;
};

// Of whole units, at least one.
template <class F, class Stored, class Form>
void update_units(const Streams& streams, int64_t count, const Coefficients<float>& narrowed,
                  const CodedStep& step, Form form) {
  const Coefficients<F> k = broadcast<F>(narrowed);
  void* const param = streams.at[kParam];
  const void* const grad = streams.at[kGrad];
  typename Stored::Scratch scratch;
  Stored moments(streams, step, form, scratch);
  const auto second_half = [&](int64_t i, Fraction<F> fraction) {
    const F p = load_as<F>(form.param, param, i);
    store_as(form.param, param, i, update_param<Stored::exact>(p, fraction, k));
  };
  // As in adam_kernel.hpp, the first half runs a vector ahead.
  Fraction<F> fraction = {};
  for (int64_t i = 0; i < count; i += F::width) {
    const F g = load_as<F>(form.grad, grad, i);
    const F p = form.l2 ? load_as<F>(form.param, param, i) : g;
    Moments<F> x = moments.load(i);
    const Fraction<F> next =
        update_moments(p, g, x.exp_avg, x.exp_avg_sq, x.max_exp_avg_sq, k, form);
    moments.store(i, x);
    if (i > 0) second_half(i - F::width, fraction);
    fraction = next;
  }
  second_half(count - F::width, fraction);
  moments.end(count);
}

template <class F, template <class, class> class Stored, class Form>
void update_units(const Streams& streams, int64_t count, const Coefficients<float>& k,
                  const CodedStep& step, Form form) {
  update_units<F, Stored<F, Form>>(streams, count, k, step, form);
}

// Copies of less than a unit: the numbers behind them may be any.
template <int unit>
class Rest {
 public:
  Rest(const Streams& streams, int64_t first, int64_t count, const CodedStep& step) {
    static_assert(kStreams == kExpAvgSqScale + 1, "a stream that is not copied here");
    for (int i = 0; i < kStreams; ++i) {
      const auto which = static_cast<Stream>(i);
      const int size = size_in(step, which);
      if (size == 0 || streams.at[i] == nullptr) continue;
      const bool is_scale = which >= kExpAvgScale;
      bytes_[i] = static_cast<size_t>(is_scale ? 1 : count * size);
      from_.at[i] = static_cast<char*>(streams.at[i]) + (is_scale ? first / kBlock : first * size);
      copies_.at[i] = copy_[i];
      memcpy(copy_[i], from_.at[i], bytes_[i]);
    }
  }
  const Streams& copies() const { return copies_; }
  void write_back() const {
    for (int i = 0; i < kStreams; ++i) {
      if (i != kGrad && copies_.at[i] != nullptr) memcpy(from_.at[i], copies_.at[i], bytes_[i]);
    }
  }

 private:
  static int size_in(const CodedStep& step, Stream which) {
    const int moment_size = step.exp_avg == kFloat32 ? 4 : step.exp_avg == kBFloat16 ? 2 : 1;
    switch (which) {
      case kParam:
        return step.param == kFloat32 ? 4 : 2;
      case kGrad:
        return step.grad == kFloat32 ? 4 : 2;
      case kExpAvg:
      case kExpAvgSq:
        return moment_size;
      case kMaxExpAvgSq:
        return step.amsgrad ? moment_size : 0;
      case kExpAvgScale:
      case kExpAvgSqScale:
        return moment_size == 1 ? 1 : 0;
      default:
        return 0;
    }
  }

  alignas(64) char copy_[kStreams][unit * sizeof(float)] = {};
  Streams from_ = {}, copies_ = {};
  size_t bytes_[kStreams] = {};
};

template <class F, template <class, class> class Stored>
void coded_adam_stage(const Streams& streams, int64_t count, const CoefficientSet& all,
                      const CodedStep& step) {
  const Coefficients<float>& k = all.f32.k;
  const AnyForm form = {
      step.param, step.grad, step.l2, step.amsgrad, all.f32.lerp_from_grad, all.f32.eps_in_root};
  const bool usual = !form.l2 && !form.amsgrad && !form.lerp_from_grad && !form.eps_in_root &&
                     form.param == form.grad;
  const auto update = [&](const Streams& piece, int64_t whole, const CodedStep& of_piece) {
    if (usual && step.param == kFloat32) {
      update_units<F, Stored>(piece, whole, k, of_piece, UsualForm<kFloat32>{});
    } else if (usual && step.param == kBFloat16) {
      update_units<F, Stored>(piece, whole, k, of_piece, UsualForm<kBFloat16>{});
    } else {
      update_units<F, Stored>(piece, whole, k, of_piece, form);
    }
  };
  constexpr int kUnit = Stored<F, AnyForm>::kUnit;
  const int64_t whole = count / kUnit * kUnit;
  if (whole > 0) update(streams, whole, step);
  if (whole < count) {
    Rest<kUnit> rest(streams, whole, count - whole, step);
    CodedStep of_rest = step;
    of_rest.first += whole;
    update(rest.copies(), kUnit, of_rest);
    rest.write_back();
  }
}

}  // namespace
}  // namespace fused_adam
