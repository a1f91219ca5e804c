// Where many gradients lie, found in torch's own structures. walking.py builds and calls it, under the GIL.
//
// A gradient is some ten cache lines away from its parameter, each of which names the next. So it goes level
// by level over all parameters, and fetches the lines of the next level on the way.

#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <structmember.h>

namespace {

constexpr Py_ssize_t AHEAD = 8; // tensors
constexpr int LINE = 64, TENSOR = 4, OBJECT = 2; // bytes; lines of a TensorImpl, of a Python object

void fetch(const void *at, int lines) {
    for (int i = 0; i < lines; i++) __builtin_prefetch(static_cast<const char *>(at) + LINE * i);
}

c10::TensorImpl *unpacked(PyObject *tensor) {
    auto *impl = THPVariable_Unpack(tensor).unsafeGetTensorImpl();
    fetch(impl, TENSOR);
    return impl;
}

// Whether this is just the tensor in the CPU's memory that is expected; no subclass that computes otherwise.
bool is_as_expected(const c10::TensorImpl &tensor, int64_t numel, c10::ScalarType dtype) {
    return tensor.numel() == numel && tensor.dtype() == dtype && tensor.layout() == c10::kStrided &&
           tensor.device_type() == c10::kCPU && tensor.is_contiguous() && !tensor.is_python_dispatch() &&
           !tensor.is_neg();
}

// What an instance holds in a slot, borrowed.
PyObject *held(PyObject *instance, Py_ssize_t offset) {
    return *reinterpret_cast<PyObject **>(reinterpret_cast<char *>(instance) + offset);
}

} // namespace

// Whether dicts, a list, hold just these values, a list, one dict's behind the other's; -1 if one is no dict.
extern "C" int32_t distnorm_holds(PyObject *dicts, PyObject *values) {
    Py_ssize_t count = PyList_GET_SIZE(dicts), at = 0, expected = PyList_GET_SIZE(values);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + 2 * AHEAD < count) fetch(PyList_GET_ITEM(dicts, i + 2 * AHEAD), OBJECT);
        if (i + AHEAD < count) {
            PyObject *next = PyList_GET_ITEM(dicts, i + AHEAD);
            if (PyDict_Check(next)) fetch(reinterpret_cast<PyDictObject *>(next)->ma_keys, OBJECT);
        }
        if (!PyDict_Check(PyList_GET_ITEM(dicts, i))) return -1; // a mapping of torch.jit's
        Py_ssize_t position = 0;
        for (PyObject *key, *value; PyDict_Next(PyList_GET_ITEM(dicts, i), &position, &key, &value); at++)
            if (at == expected || PyList_GET_ITEM(values, at) != value) return 0;
    }
    return at == expected;
}

// Where a class keeps one of its __slots__ in an instance; -1 if it isn't kept so.
extern "C" Py_ssize_t distnorm_slot(PyObject *type, const char *name) {
    PyObject *found = PyObject_GetAttrString(type, name);
    if (!found) PyErr_Clear();
    Py_ssize_t offset = -1;
    if (found && Py_TYPE(found) == &PyMemberDescr_Type) {
        const PyMemberDef *member = reinterpret_cast<PyMemberDescrObject *>(found)->d_member;
        if (member->type == T_OBJECT_EX) offset = member->offset;
    }
    Py_XDECREF(found);
    return offset;
}

// Addresses of the gradients of `holders`, a list or tuple of tensors, into `out`. With `specs`, a list, the
// gradients are of the class `dtensor`, hold these very objects at `spec`, and their local tensors at `local`,
// which are meant then. Returns how many were found to be as expected, up to the first that is not.
extern "C" int64_t distnorm_walk(PyObject *holders, PyObject *specs, const int64_t *numels,
                                 const int32_t *codes, int64_t *out, void **scratch, PyObject *dtensor,
                                 Py_ssize_t spec, Py_ssize_t local) {
    static const c10::ScalarType DTYPES[] = {c10::kFloat, c10::kDouble, c10::kBFloat16, c10::kHalf};
    Py_ssize_t count = PySequence_Fast_GET_SIZE(holders);
    PyObject **holder = PySequence_Fast_ITEMS(holders);
    auto **tensors = reinterpret_cast<c10::TensorImpl **>(scratch);
    auto **objects = reinterpret_cast<PyObject **>(scratch);
    try {
        for (Py_ssize_t i = 0; i < count; i++) {
            if (i + AHEAD < count) fetch(holder[i + AHEAD], OBJECT);
            tensors[i] = unpacked(holder[i]);
        }
        for (Py_ssize_t i = 0; i < count; i++) {
            if (i + AHEAD < count) fetch(tensors[i + AHEAD]->autograd_meta(), OBJECT);
            const auto *meta = tensors[i]->autograd_meta();
            tensors[i] = meta ? meta->grad().unsafeGetTensorImpl() : nullptr;
            if (!meta || !meta->grad().defined()) return i;
            fetch(tensors[i], TENSOR);
        }
        if (specs != Py_None) {
            PyObject **expected = PySequence_Fast_ITEMS(specs);
            for (Py_ssize_t i = 0; i < count; i++) {
                PyObject *gradient = THPVariable_Wrap(at::Tensor(
                    c10::intrusive_ptr<c10::TensorImpl, at::UndefinedTensorImpl>::reclaim_copy(tensors[i])));
                bool is_ours = gradient && reinterpret_cast<PyObject *>(Py_TYPE(gradient)) == dtensor;
                Py_XDECREF(gradient); // its parameter keeps it; what was made just now is of another class
                if (!is_ours) return i;
                objects[i] = gradient;
                fetch(gradient, OBJECT);
            }
            for (Py_ssize_t i = 0; i < count; i++) {
                if (held(objects[i], spec) != expected[i] || !held(objects[i], local)) return i;
                objects[i] = held(objects[i], local);
                fetch(objects[i], OBJECT);
            }
            for (Py_ssize_t i = 0; i < count; i++) {
                if (!THPVariable_Check(objects[i])) return i;
                tensors[i] = unpacked(objects[i]);
            }
        }
        for (Py_ssize_t i = 0; i < count; i++) {
            if (!is_as_expected(*tensors[i], numels[i], DTYPES[codes[i]])) return i;
            out[i] = reinterpret_cast<int64_t>(tensors[i]->mutable_data());
        }
        return count;
    } catch (...) { // such as that a tensor has no memory: it is looked at with care
        PyErr_Clear();
        return -1;
    }
}
