# SPDX-License-Identifier: Apache-2.0
# The GPUs the library is made for, Xavier and Turing to Blackwell, as far as the toolkit knows them. Thor is 101 up to
# CUDA 12.9 and 110 from 13.0; CUDA 13 dropped 72. The newest is added as PTX too, for GPUs that come later.
if(NOT DEFINED PLUGIN_ARCHITECTURES)
  set(PLUGIN_ARCHITECTURES 72 75 80 86 87 89 90 100 101 103 110 120 121)
endif()

function(plugin_architectures nvcc result)
  execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE known RESULT_VARIABLE status)
  if(status)
    message(FATAL_ERROR "${nvcc} --list-gpu-code failed (${status}): set CMAKE_CUDA_ARCHITECTURES")
  endif()
  set(chosen)
  foreach(number IN LISTS PLUGIN_ARCHITECTURES)
    if(known MATCHES "sm_${number}[^0-9]")
      list(APPEND chosen ${number}-real)
    endif()
  endforeach()
  list(POP_BACK chosen newest)
  string(REPLACE "-real" "" newest ${newest})
  set(${result} ${chosen} ${newest} PARENT_SCOPE)
endfunction()
