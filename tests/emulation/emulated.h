// Included before every source of the emulated library: the runtime below, and where its ops are registered.
#pragma once

#include "cuda_runtime.h"

#define SPARSE_BACKEND_ANNOUNCE(data, bytes) emulation::announce(data, bytes)
#define SPARSE_BACKEND_FORGET() emulation::forget_buffers()
#define SPARSE_BACKEND_LIBRARY sparse_backend_emulated
#define SPARSE_BACKEND_KEY CPU
#define SPARSE_BACKEND_IS_OURS(tensor) (tensor).is_cpu()
