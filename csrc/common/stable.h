// What of PyTorch's stable ABI 2.11 spells otherwise, or keeps in a header that nothing else includes there.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // later: the same with the text of the error
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
