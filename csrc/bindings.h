// What the two binding files share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "frame.h"
#include "reduce.h"

namespace dora {

// What Python's words mean; they throw std::invalid_argument for others.
Protection protectionOf(const std::string& word);
DataType dataTypeOf(const std::string& word);
ReduceOp reduceOpOf(const std::string& word);
std::string checkedKey(std::string key);

// The parts that need no network.
void bindParts(pybind11::module_& m);

// Media of an emulated network.
void bindBuckets(pybind11::module_& m);

// The simulation, and the planner's search.
void bindSimulation(pybind11::module_& m);
void bindChains(pybind11::module_& m);

// The compression kernels.
void bindQuantize(pybind11::module_& m);

}  // namespace dora
