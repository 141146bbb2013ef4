// What the bindings of all ops share. Tensors cross as address, shape and stride: no torch, no buffer protocol.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/check.h"
#include "core/kernel.h"

namespace halfbyte {

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype(int code) {
  check(code >= 0 && code <= 3, "unknown dtype code ", code);
  return static_cast<DType>(code);
}

inline Activation activation(int code) {
  check(code >= 0 && code <= 4, "unknown activation code ", code);
  return static_cast<Activation>(code);
}

}  // namespace halfbyte
