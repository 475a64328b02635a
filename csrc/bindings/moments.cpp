#include "moments.hpp"

#include "../dispatch.hpp"
#include "../float_mode.hpp"
#include "../tiles.hpp"
#include "arrays.hpp"
#include "without_gil.hpp"

namespace fused_adam {
namespace {

Stream moment_named(const std::string& name) {
  for (const Stream moment : {kExpAvg, kExpAvgSq, kMaxExpAvgSq}) {
    if (name == kStreamTable[moment].name) return moment;
  }
  throw py::value_error(name + " is no moment.");
}

py::array flat(DType dtype, int64_t size) { return {own_dtype(dtype), py::ssize_t{size}}; }

void* data_of(const py::array& array) { return py::detail::array_proxy(array.ptr())->data; }

}  // namespace

py::array decode_moment(const std::string& isa, const std::string& name, const py::array& codes,
                        const py::object& exponents) {
  const Stream moment = moment_named(name);
  const auto state =
      exponents.is_none() ? HyperParameters::kStateBFloat16 : HyperParameters::kStateFloat8;
  const DType stored = dtype_of(moment, {kFloat32, state});
  const ArrayFacts from = array_facts(codes, {"", name, ""}, stored);
  if (from.dtype != stored) throw py::type_error(name + " has another dtype.");
  const void* scale = nullptr;
  if (!exponents.is_none()) {
    const ArrayFacts facts = array_facts(exponents, {"the scale of ", name, ""}, kExponent);
    if (facts.dtype != kExponent || facts.size != entries_of(scale_of(moment), from.size)) {
      throw py::value_error("the scale of " + name + " is another array.");
    }
    scale = facts.data;
  }
  const py::array numbers = flat(kFloat32, from.size);
  const StageTable& stages = *isa_by_name(isa).stages;
  void* const to = data_of(numbers);
  const WithoutGil no_gil;
  const DefaultFloatMode mode;
  decode(stages, stored, from.data, scale, to, from.size);
  return numbers;
}

py::tuple encode_moment(const std::string& isa, const std::string& name,
                        const std::string& state_dtype, const py::array& numbers, int64_t step) {
  const Stream moment = moment_named(name);
  const bool in_blocks = state_dtype == "float8";
  const auto state = in_blocks ? HyperParameters::kStateFloat8 : HyperParameters::kStateBFloat16;
  const DType stored = dtype_of(moment, {kFloat32, state});
  const ArrayFacts from = array_facts(numbers, {"", name, ""});
  if (from.dtype != kFloat32) throw py::type_error(name + " must be float32.");
  const py::array codes = flat(stored, from.size);
  py::object exponents = py::none();
  void* scale = nullptr;
  if (in_blocks) {
    const py::array made = flat(kExponent, entries_of(scale_of(moment), from.size));
    scale = data_of(made);
    exponents = made;
  }
  const StageTable& stages = *isa_by_name(isa).stages;
  {
    void* const to = data_of(codes);
    const WithoutGil no_gil;
    const DefaultFloatMode mode;
    encode(stages, stored, from.data, to, scale, 0, from.size,
           moment_dither(static_cast<uint32_t>(moment - kExpAvg), step));
  }
  return py::make_tuple(codes, exponents);
}

}  // namespace fused_adam
