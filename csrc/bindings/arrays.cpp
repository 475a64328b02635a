#include "arrays.hpp"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <limits>

#include "text.hpp"

namespace fused_adam {
namespace {

using py::detail::npy_api;
using py::detail::PyArray_Proxy;
using py::detail::PyArrayDescr_Proxy;

// "(2, 3)"
std::string shape_text(const ArrayFacts& facts) {
  std::string list;
  for (int i = 0; i < facts.nd; ++i) {
    if (i > 0) list += ", ";
    list += std::to_string(facts.shape[i]);
  }
  if (facts.nd == 1) list += ",";
  return "(" + list + ")";
}

// By another package, with a number that it got then. No type has this one; some have -1.
constexpr int kRegistered = std::numeric_limits<int>::min();
// NumPy's type of params and gradients, and of arrays of our own.
struct ElementType {
  DType dtype;
  const char* name;
  int numpy_type;
  const char* own_name;
  int own_type;
};
constexpr int kNone = kRegistered + 1;
constexpr ElementType kElementTypes[] = {
    {kFloat32, "float32", npy_api::NPY_FLOAT_, "float32", npy_api::NPY_FLOAT_},
    {kFloat64, "float64", npy_api::NPY_DOUBLE_, "float64", npy_api::NPY_DOUBLE_},
    {kFloat16, "float16", 23 /* NPY_HALF */, "float16", 23},
    {kBFloat16, "bfloat16", kRegistered, "uint16", npy_api::NPY_USHORT_},
    {kE4M3, "float8_e4m3", kNone, "uint8", npy_api::NPY_UBYTE_},
    {kE5M3, "float8_e5m3", kNone, "uint8", npy_api::NPY_UBYTE_},
    {kExponent, "exponent", kNone, "uint8", npy_api::NPY_UBYTE_}};
constexpr bool element_types_are_in_order() {
  for (int i = 0; i < kDTypes; ++i) {
    if (kElementTypes[i].dtype != i) return false;
  }
  return std::size(kElementTypes) == kDTypes;
}
static_assert(element_types_are_in_order(), "kElementTypes is indexed by DType");

std::string type_name(py::handle object) {
  py::handle type = py::type::handle_of(object);
  const std::string module = text(type.attr("__module__"));
  const std::string name = text(type.attr("__qualname__"));
  return module == "builtins" ? name : module + "." + name;
}

PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<py::object> memmap_type, mmap_type;

// A subclass of ndarray may mean something else by its elements (masks, units): only memmap, which
// adds nothing to them, is taken.
void require_plain_subclass(py::handle object, const Place& place) {
  auto* memmap = reinterpret_cast<PyTypeObject*>(memmap_type.get_stored().ptr());
  if (PyType_IsSubtype(Py_TYPE(object.ptr()), memmap)) return;
  if (py::hasattr(object, "mask")) {
    throw py::value_error(place.str() +
                          " is a masked array, whose mask a step would ignore. Pass " +
                          "its data, or a.filled(0) made once and trained instead.");
  }
  throw py::type_error(place.str() + " is of type " + type_name(object) +
                       ", a subclass of ndarray with rules of its own. Pass np.asarray(a), which " +
                       "shares its memory.");
}

[[noreturn]] void refuse_type(py::handle object, const Place& place) {
  std::string message =
      place.str() + " is of type " + type_name(object) + ", expected numpy.ndarray. ";
  if (py::hasattr(object, "detach")) {
    message += "The array that shares a CPU tensor's memory is tensor.detach().numpy().";
  } else if (py::hasattr(object, "__array_interface__")) {
    message += "A NumPy scalar becomes an array of shape () by np.asarray(x).";
  } else if (py::isinstance<py::list>(object) || py::isinstance<py::tuple>(object) ||
             py::isinstance<py::dict>(object)) {
    message += "One array is needed here: containers must be those of params.";
  } else {
    message += "Lists, tuples and dicts may hold arrays, nothing else.";
  }
  throw py::type_error(message);
}

// What the memory of a view belongs to: the array that owns it, a memory map, or whatever else
// there is. NumPy shortens chains of views only as far as their type is the same.
py::handle owner_of(py::handle base, const npy_api& numpy) {
  while (base) {
    if (numpy.PyArray_Check_(base.ptr())) {
      const PyArray_Proxy* array = py::detail::array_proxy(base.ptr());
      if ((array->flags & npy_api::NPY_ARRAY_OWNDATA_) != 0) break;
      base = array->base;
    } else if (PyMemoryView_Check(base.ptr())) {
      base = PyMemoryView_GET_BUFFER(base.ptr())->obj;
    } else {
      break;
    }
  }
  return base;
}

// np.memmap and SharedMemory are views of one.
bool is_memory_map(py::handle owner) {
  auto* mmap = reinterpret_cast<PyTypeObject*>(mmap_type.get_stored().ptr());
  return PyObject_TypeCheck(owner.ptr(), mmap) != 0;
}

int64_t bytes_of_element(const PyArray_Proxy* array) {
  return npy_api::get().PyArray_RUNTIME_VERSION_ < 0x12
             ? py::detail::array_descriptor1_proxy(array->descr)->elsize
             : py::detail::array_descriptor2_proxy(array->descr)->elsize;
}

// A view whose owner was resized points to memory that is gone, or ends too early: NumPy does not
// know its views. Only an array that owns its memory can be resized.
bool is_within_owner(py::handle owning, const ArrayFacts& facts) {
  const PyArray_Proxy* owner = py::detail::array_proxy(owning.ptr());
  int64_t bytes = bytes_of_element(owner);
  for (int i = 0; i < owner->nd; ++i) bytes *= owner->dimensions[i];
  const auto begin = reinterpret_cast<uintptr_t>(facts.data);
  const auto owner_begin = reinterpret_cast<uintptr_t>(owner->data);
  return owner_begin <= begin && begin + static_cast<uintptr_t>(facts.bytes()) <=
                                     owner_begin + static_cast<uintptr_t>(bytes);
}

// A loop, as most arrays have one or two dimensions: calling memcmp took a tenth of the time that a
// step needs for an array of few elements.
bool same_shape(const ArrayFacts& a, const ArrayFacts& b) {
  if (a.nd != b.nd) return false;
  for (int i = 0; i < a.nd; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
  }
  return true;
}

// The bfloat16 of ml_dtypes, which JAX and TensorFlow use too. Its number stays once it has one.
bool is_bfloat16(const PyArray_Proxy* array) {
  constexpr int kFirstRegistered = 256;
  static std::atomic<int> number{kRegistered};
  const auto* descr = reinterpret_cast<const PyArrayDescr_Proxy*>(array->descr);
  if (descr->type_num < kFirstRegistered) return false;
  if (descr->type_num == number.load(std::memory_order_relaxed)) return true;
  const py::handle type(descr->typeobj);
  if (text(type.attr("__name__")) != "bfloat16" || text(type.attr("__module__")) != "ml_dtypes" ||
      bytes_of_element(array) != size_of(kBFloat16)) {
    return false;
  }
  number.store(descr->type_num, std::memory_order_relaxed);
  return true;
}

// ours: null, or what may stand there as an own type.
DType require_dtype(const PyArray_Proxy* array, const Place& place, const DType* ours) {
  const auto* descr = reinterpret_cast<const PyArrayDescr_Proxy*>(array->descr);
  const auto* type = std::find_if(
      std::begin(kElementTypes), std::end(kElementTypes),
      [&](const ElementType& element) { return element.numpy_type == descr->type_num; });
  if (type == std::end(kElementTypes) && is_bfloat16(array)) type = kElementTypes + kBFloat16;
  if (ours != nullptr && kElementTypes[*ours].own_type == descr->type_num) {
    type = kElementTypes + *ours;
  }
  if (type == std::end(kElementTypes)) {
    throw py::type_error(place.str() + " has dtype " + text(array->descr) +
                         ", expected float32, float64, float16 or bfloat16. Convert it once, " +
                         "with a.astype(np.float32), and use the result.");
  }
  // NumPy writes '=' for native order, unless it was asked for by its own sign; and '|' for bytes.
  const uint16_t one = 1;
  const char native = *reinterpret_cast<const char*>(&one) == 1 ? '<' : '>';
  if (descr->byteorder != '=' && descr->byteorder != native && descr->byteorder != '|') {
    throw py::value_error(place.str() + " has byte-swapped elements (dtype " + text(array->descr) +
                          "). Convert it once, with a.astype(a.dtype.newbyteorder('=')).");
  }
  return type->dtype;
}

}  // namespace

const char* dtype_name(DType dtype) { return kElementTypes[dtype].name; }

const char* own_dtype_name(DType dtype) { return kElementTypes[dtype].own_name; }

py::dtype own_dtype(DType dtype) { return py::dtype(kElementTypes[dtype].own_type); }

void load_array_types() {
  memmap_type.call_once_and_store_result(
      [] { return py::module_::import("numpy").attr("memmap").cast<py::object>(); });
  mmap_type.call_once_and_store_result(
      [] { return py::module_::import("mmap").attr("mmap").cast<py::object>(); });
}

namespace {

ArrayFacts facts_of(py::handle object, const Place& place, const DType* ours) {
  const npy_api& numpy = npy_api::get();
  if (Py_TYPE(object.ptr()) != numpy.PyArray_Type_) {
    if (!numpy.PyArray_Check_(object.ptr())) refuse_type(object, place);
    require_plain_subclass(object, place);
  }
  const PyArray_Proxy* array = py::detail::array_proxy(object.ptr());
  ArrayFacts facts;
  facts.dtype = require_dtype(array, place, ours);
  facts.data = array->data;
  facts.nd = array->nd;
  facts.shape = array->dimensions;
  facts.size = 1;
  for (int i = 0; i < facts.nd; ++i) facts.size *= facts.shape[i];
  facts.c_contiguous = (array->flags & npy_api::NPY_ARRAY_C_CONTIGUOUS_) != 0;
  facts.f_contiguous = (array->flags & npy_api::NPY_ARRAY_F_CONTIGUOUS_) != 0;
  if (!facts.c_contiguous && !facts.f_contiguous) {
    throw py::value_error(
        place.str() + " is a strided view (shape " + shape_text(facts) + ", strides " +
        text(object.attr("strides")) +
        "), expected one block of memory. Use np.ascontiguousarray(a), made once " +
        "and used in its place.");
  }
  if ((array->flags & npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    throw py::value_error(place.str() +
                          " is not aligned: its data starts between two elements. Use a "
                          "copy, a.copy(), in its place.");
  }
  facts.mapped = false;
  if (array->base == nullptr) return facts;
  const py::handle owner = owner_of(array->base, numpy);
  if (!owner) return facts;
  if (!numpy.PyArray_Check_(owner.ptr())) {
    facts.mapped = is_memory_map(owner);
  } else if (!is_within_owner(owner, facts)) {
    throw py::value_error(
        place.str() +
        " is a view of an array that was resized, and of memory that may be gone: "
        "make the view anew, and a new optimizer where it is a parameter.");
  }
  return facts;
}

}  // namespace

ArrayFacts array_facts(py::handle object, const Place& place) {
  return facts_of(object, place, nullptr);
}

ArrayFacts array_facts(py::handle object, const Place& place, DType ours) {
  return facts_of(object, place, &ours);
}

void require_writeable(py::handle array, const Place& place, const char* reason) {
  if ((py::detail::array_proxy(array.ptr())->flags & npy_api::NPY_ARRAY_WRITEABLE_) == 0) {
    throw py::value_error(place.str() + " is read-only, but " + reason);
  }
}

namespace {

// What is wrong with an array that is not like another one, or not as it was.
class Difference {
 public:
  Difference(const Place& place, const Place* model_place) : place_(place), model_(model_place) {}

  // "grad for params has shape (3,), but params has (4,)."
  std::string of(const char* verb, const char* past, const std::string& what,
                 const std::string& found, const std::string& expected) const {
    const std::string text = place_.str() + " " + verb + " " + what + found + ", but ";
    if (model_ != nullptr) return text + model_->str() + " " + verb + " " + expected + ".";
    return text + "it " + past + " " + expected + " when this optimizer was made.";
  }

 private:
  const Place& place_;
  const Place* model_;
};

// Its shape and the order of its elements.
void require_same_form(const ArrayFacts& array, const Place& place, const ArrayFacts& model,
                       const Place* model_place) {
  const Difference differs(place, model_place);
  if (!same_shape(array, model)) {
    throw py::value_error(differs.of("has", "had", "shape ", shape_text(array), shape_text(model)));
  }
  const bool same_layout =
      (array.c_contiguous && model.c_contiguous) || (array.f_contiguous && model.f_contiguous);
  if (!same_layout) {
    const auto order = [](const ArrayFacts& facts) {
      return facts.c_contiguous ? "C order" : "Fortran order";
    };
    const char* function = model.c_contiguous ? "np.ascontiguousarray" : "np.asfortranarray";
    throw py::value_error(
        differs.of("is in", "was in", "", order(array), order(model)) +
        (model_place == nullptr ? "" : std::string(" Use ") + function + " on one of them."));
  }
}

}  // namespace

void require_like(const ArrayFacts& array, const Place& place, const ArrayFacts& model,
                  const Place* model_place) {
  const Difference differs(place, model_place);
  if (array.dtype != model.dtype) {
    throw py::type_error(
        differs.of("has", "had", "dtype ", dtype_name(array.dtype), dtype_name(model.dtype)) +
        (model_place != nullptr ? " Both must be the same." : ""));
  }
  require_same_form(array, place, model, model_place);
}

void require_grad(const ArrayFacts& grad, const Place& place, const ArrayFacts& param,
                  const Place& param_place, bool mixed) {
  const bool narrower = is_coded(grad.dtype) && param.dtype == computed_in(grad.dtype);
  const bool taken =
      grad.dtype == param.dtype || grad.dtype == computed_in(param.dtype) || (narrower && mixed);
  if (!taken) {
    const char* advice = is_coded(param.dtype) ? " It must be that, or float32."
                         : narrower            ? " Adam(..., allow_mixed=True) takes it."
                                               : " Both must be the same.";
    throw py::type_error(
        Difference(place, &param_place)
            .of("has", "had", "dtype ", dtype_name(grad.dtype), dtype_name(param.dtype)) +
        advice);
  }
  require_same_form(grad, place, param, &param_place);
}

py::object fresh_view(const py::object& array) { return array.attr("view")(); }

}  // namespace fused_adam
