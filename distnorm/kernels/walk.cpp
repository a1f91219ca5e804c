// Where many gradients lie, found in torch's own structures. walking.py builds and calls it, under the GIL.
//
// A gradient is some ten cache lines away from its parameter, each of which names the next. So it goes level
// by level over all parameters, and fetches the lines of the next level on the way.

#include <torch/csrc/Device.h>
#include <torch/csrc/autograd/python_variable.h>

#include <c10/core/impl/COW.h>

#include <cstdint>
#include <memory>
#include <structmember.h>
#include <vector>

namespace {

constexpr Py_ssize_t AHEAD = 8; // tensors
constexpr int LINE = 64, TENSOR = 4, OBJECT = 2; // bytes; lines of a TensorImpl, of a Python object

void fetch(const void *at, int lines) {
    for (int i = 0; i < lines; i++) __builtin_prefetch(static_cast<const char *>(at) + LINE * i);
}

// Where a tensor keeps its gradient; null if it can have none.
const at::Tensor *grad_of(const c10::TensorImpl &tensor) {
    const auto *meta = static_cast<const torch::autograd::AutogradMeta *>(tensor.autograd_meta());
    return meta ? &meta->grad_ : nullptr;
}

using Held = c10::intrusive_ptr<c10::TensorImpl, at::UndefinedTensorImpl>;

// What keeps gradients where they were found: the tensors, or, of DTensors, the memory of the local ones. Many
// of those lie in one storage, so that this is held once.
struct Gradients {
    std::vector<Held> tensors;
    std::vector<c10::Storage> storages;
};

constexpr const char *CAPSULE = "distnorm.gradients";

// The Python object of a tensor, new; or none, if it has none yet, which then would be of just torch's class.
template <class Tensor> PyObject *object_of(const Tensor &tensor) {
    if constexpr (requires { tensor.pyobj_slot()->load_pyobj(); }) {
        return Py_XNewRef(tensor.pyobj_slot()->load_pyobj());
    } else { // torch before 2.10
        return THPVariable_Wrap(at::Tensor(Held::reclaim_copy(const_cast<Tensor *>(&tensor))));
    }
}

bool is_exactly(const c10::TensorImpl &tensor, PyObject *type, bool may_be_none) {
    PyObject *object = object_of(tensor);
    bool is = object ? reinterpret_cast<PyObject *>(Py_TYPE(object)) == type : may_be_none;
    Py_XDECREF(object); // the tensor keeps it
    return is;
}

// Whether this is just the tensor that is expected, and all of it is there. Pointers are const throughout: to
// ask for another would copy what is to be copied on write.
bool is_as_expected(const c10::TensorImpl &tensor, int64_t numel, c10::ScalarType dtype, c10::Device device) {
    if (tensor.numel() != numel || tensor.dtype() != dtype || tensor.layout() != c10::kStrided ||
        tensor.device() != device || tensor.is_python_dispatch() || tensor.is_neg() ||
        tensor.is_conj() || const_cast<c10::TensorImpl &>(tensor).is_inference() || !tensor.is_contiguous())
        return false;
    const c10::Storage &storage = tensor.storage();
    size_t end = (tensor.storage_offset() + numel) * tensor.itemsize();
    return !numel || (storage.nbytes() >= end && storage.data() &&
                      !c10::impl::cow::is_cow_data_ptr(storage.data_ptr()));
}

// What an instance holds in a slot, borrowed.
PyObject *held(PyObject *instance, Py_ssize_t offset) {
    return *reinterpret_cast<PyObject **>(reinterpret_cast<char *>(instance) + offset);
}

// Put in place of DTensors their local tensors.
bool go_to_locals(c10::TensorImpl **tensors, Py_ssize_t count, PyObject *specs, PyObject *dtensor,
                  Py_ssize_t spec, Py_ssize_t local) {
    auto **objects = reinterpret_cast<PyObject **>(tensors);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *gradient = object_of(*tensors[i]);
        bool is_ours = gradient && reinterpret_cast<PyObject *>(Py_TYPE(gradient)) == dtensor;
        Py_XDECREF(gradient); // the tensor, which its parameter holds, keeps it
        if (!is_ours) return false;
        objects[i] = gradient;
        fetch(gradient, OBJECT);
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *expected = PyList_GET_ITEM(specs, i), *found = held(objects[i], spec);
        PyObject *tensor = held(objects[i], local);
        if (!found || !tensor) return false;
        if (found != expected) {
            Py_INCREF(found);
            int is_equal = PyObject_RichCompareBool(found, expected, Py_EQ);
            Py_DECREF(found);
            if (is_equal != 1) return false;
        }
        objects[i] = tensor;
        fetch(tensor, OBJECT);
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (reinterpret_cast<PyObject *>(Py_TYPE(objects[i])) != THPVariableClass) return false;
        tensors[i] = THPVariable_Unpack(objects[i]).unsafeGetTensorImpl();
        fetch(tensors[i], TENSOR);
    }
    return true;
}

void hold(Gradients &gradients, c10::TensorImpl &tensor, bool is_local) {
    if (!is_local) {
        gradients.tensors.push_back(Held::reclaim_copy(&tensor));
    } else if (gradients.storages.empty() || !gradients.storages.back().is_alias_of(tensor.storage())) {
        gradients.storages.push_back(tensor.storage());
    }
}

// What the gradients of some parameters are expected to be, as finding.py lays it out.
struct Expected {
    PyObject *specs; // a list of what DTensors hold at `spec`; None where gradients are plain tensors
    PyObject *device;
    const int64_t *numels;
    const int32_t *codes;
    int64_t *out;
    void **scratch;
    PyObject *dtensor; // their class
    Py_ssize_t spec, local; // where they hold their spec and their local tensor
};

bool find(Gradients &gradients, PyObject *holders, const Expected &expected) {
    static const c10::ScalarType DTYPES[] = {c10::kFloat, c10::kDouble, c10::kBFloat16, c10::kHalf};
    Py_ssize_t count = PySequence_Fast_GET_SIZE(holders);
    PyObject **holder = PySequence_Fast_ITEMS(holders);
    auto **tensors = reinterpret_cast<c10::TensorImpl **>(expected.scratch);
    bool are_local = expected.specs != Py_None;
    c10::Device device = reinterpret_cast<THPDevice *>(expected.device)->device;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + AHEAD < count) fetch(holder[i + AHEAD], OBJECT);
        if (!PyObject_TypeCheck(holder[i], reinterpret_cast<PyTypeObject *>(THPVariableClass))) return false;
        tensors[i] = THPVariable_Unpack(holder[i]).unsafeGetTensorImpl();
        fetch(tensors[i], 1);
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + AHEAD < count) fetch(grad_of(*tensors[i + AHEAD]), 1);
        const at::Tensor *grad = grad_of(*tensors[i]);
        if (!grad || !grad->defined()) return false;
        tensors[i] = grad->unsafeGetTensorImpl();
        fetch(tensors[i], are_local ? 1 : TENSOR);
    }
    if (are_local && !go_to_locals(tensors, count, expected.specs, expected.dtensor, expected.spec, expected.local))
        return false;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + AHEAD < count && tensors[i + AHEAD]->has_storage())
            fetch(tensors[i + AHEAD]->unsafe_storage().unsafeGetStorageImpl(), OBJECT);
        c10::TensorImpl &gradient = *tensors[i];
        if (!are_local && !is_exactly(gradient, THPVariableClass, true)) return false;
        if (!is_as_expected(gradient, expected.numels[i], DTYPES[expected.codes[i]], device))
            return false;
        expected.out[i] = reinterpret_cast<int64_t>(gradient.data());
        hold(gradients, gradient, are_local);
    }
    return true;
}

Gradients *of_capsule(PyObject *capsule) {
    return static_cast<Gradients *>(PyCapsule_GetPointer(capsule, CAPSULE));
}

void let_go(PyObject *capsule) { delete of_capsule(capsule); }

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

// Addresses of the gradients of `holders`, a list or tuple of tensors, into `out`; of DTensors those of their
// local tensors. Returns a capsule that holds the (local) gradients, or None if one is not as expected.
extern "C" PyObject *distnorm_find(PyObject *holders, const Expected *expected) {
    try {
        auto gradients = std::make_unique<Gradients>();
        if (expected->specs == Py_None) gradients->tensors.reserve(PySequence_Fast_GET_SIZE(holders));
        if (find(*gradients, holders, *expected)) {
            PyObject *capsule = PyCapsule_New(gradients.get(), CAPSULE, let_go);
            if (capsule) gradients.release();
            return capsule;
        }
    } catch (...) { // such as that a tensor has no memory: it is read with care
    }
    PyErr_Clear();
    Py_RETURN_NONE;
}

// The tensors that a capsule holds, as a list.
extern "C" PyObject *distnorm_tensors(PyObject *capsule) {
    const std::vector<Held> &tensors = of_capsule(capsule)->tensors;
    PyObject *list = PyList_New(tensors.size());
    for (size_t i = 0; list && i < tensors.size(); i++) {
        PyObject *tensor = THPVariable_Wrap(at::Tensor(tensors[i]));
        if (tensor) PyList_SET_ITEM(list, i, tensor);
        else Py_CLEAR(list);
    }
    return list;
}

// Count a change in place of each tensor that a capsule holds.
extern "C" void distnorm_changed(PyObject *capsule) {
    for (const Held &gradient : of_capsule(capsule)->tensors) gradient->bump_version();
}

// The position of the first of `tensors`, a list of these, that has a gradient; -1 if none has.
extern "C" Py_ssize_t distnorm_first_with_gradient(PyObject *tensors) {
    Py_ssize_t count = PyList_GET_SIZE(tensors);
    auto tensor = [&](Py_ssize_t i) {
        return THPVariable_Unpack(PyList_GET_ITEM(tensors, i)).unsafeGetTensorImpl();
    };
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + 3 * AHEAD < count)
            fetch(&reinterpret_cast<THPVariable *>(PyList_GET_ITEM(tensors, i + 3 * AHEAD))->cdata, 1);
        if (i + 2 * AHEAD < count) fetch(tensor(i + 2 * AHEAD), 1);
        if (i + AHEAD < count) fetch(grad_of(*tensor(i + AHEAD)), 1);
        const at::Tensor *grad = grad_of(*tensor(i));
        if (grad && grad->defined()) return i;
    }
    return -1;
}
