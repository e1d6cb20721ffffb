# SPDX-License-Identifier: Apache-2.0
# Cross-compiling for Jetson (Orin sm_87, Thor sm_110) and other 64-bit ARM machines on x86.
#
#   cmake -B build -S trt_plugins -DCMAKE_TOOLCHAIN_FILE=cmake/toolchain-aarch64-linux.cmake \
#         -DCUDA_AARCH64_ROOT=/path/to/nvidia/cu13 -DTENSORRT_INCLUDE_DIR=/path/to/include
#
# CUDA_AARCH64_ROOT has lib/libcudart_static.a: the unpacked aarch64 wheel of nvidia-cuda-runtime, or
# targets/sbsa-linux of a toolkit. Its version must be the compiler's, whose own headers serve.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

set(AARCH64_SUFFIX "-12" CACHE STRING "Suffix of the cross compiler's name, e.g. -12, or empty")
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++${AARCH64_SUFFIX})
set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})

set(CUDA_AARCH64_ROOT "" CACHE PATH "Folder with lib/libcudart_static.a for aarch64")
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES CUDA_AARCH64_ROOT AARCH64_SUFFIX)
if(CMAKE_CUDA_COMPILER)
  set(nvcc_program ${CMAKE_CUDA_COMPILER})
else()
  find_program(nvcc_program nvcc HINTS /usr/local/cuda/bin REQUIRED NO_CMAKE_FIND_ROOT_PATH)
endif()
# nvcc may be a wrapper; it says itself where it belongs.
execute_process(COMMAND ${nvcc_program} --dryrun -x cu -c /dev/null -o /dev/null ERROR_VARIABLE nvcc_says)
if(NOT nvcc_says MATCHES "TOP=([^\r\n]+)")
  message(FATAL_ERROR "${nvcc_program} --dryrun does not name its folder:\n${nvcc_says}")
endif()
get_filename_component(nvcc_root ${CMAKE_MATCH_1} ABSOLUTE)
# With a foreign host compiler nvcc looks for headers under targets/, which the x86 packages do not have.
set(CMAKE_CUDA_FLAGS_INIT "-I${nvcc_root}/include -L${CUDA_AARCH64_ROOT}/lib")
set(CMAKE_CXX_FLAGS_INIT "-isystem ${nvcc_root}/include")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-L${CUDA_AARCH64_ROOT}/lib")
set(CMAKE_EXE_LINKER_FLAGS_INIT "-L${CUDA_AARCH64_ROOT}/lib")
# Xavier (CUDA 11 and 12), Orin, and Thor under its two numbers; architectures.cmake keeps those the toolkit knows.
set(PLUGIN_ARCHITECTURES 72 87 101 110)
