# The target onnxruntime::onnxruntime: of ONNX Runtime's own package where it is installed with one, else from its headers and
# library, which Debian's libonnxruntime-dev or scripts/cpp_deps put under a prefix (CMAKE_PREFIX_PATH). headpool-config.cmake
# says in headpool_ONNXRUNTIME_… where both were when headpool was built, for where no such prefix has them. There the
# library is enough.
find_package(onnxruntime CONFIG QUIET HINTS ${headpool_ONNXRUNTIME_LIBRARY_DIR})
if(TARGET onnxruntime::onnxruntime)
  set(ONNXRuntime_FOUND TRUE)
  return()
endif()
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h HINTS ENV ONNXRUNTIME_INCLUDE_DIR ${headpool_ONNXRUNTIME_INCLUDE_DIR}
          PATH_SUFFIXES onnxruntime onnxruntime/core/session)
find_library(ONNXRUNTIME_LIBRARY NAMES onnxruntime libonnxruntime.so.1 HINTS ${headpool_ONNXRUNTIME_LIBRARY_DIR})
set(needed ONNXRUNTIME_LIBRARY ONNXRUNTIME_INCLUDE_DIR)
if(headpool_ONNXRUNTIME_LIBRARY_DIR)  # to link what is installed: headpool's own headers include none of these
  set(needed ONNXRUNTIME_LIBRARY)
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ${needed}
  REASON_FAILURE_MESSAGE "add the folder whose include and lib have ONNX Runtime's headers and library to CMAKE_PREFIX_PATH")
if(ONNXRuntime_FOUND)
  add_library(onnxruntime::onnxruntime SHARED IMPORTED)
  set_target_properties(onnxruntime::onnxruntime PROPERTIES IMPORTED_LOCATION "${ONNXRUNTIME_LIBRARY}")
  if(ONNXRUNTIME_INCLUDE_DIR)
    set_target_properties(onnxruntime::onnxruntime PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${ONNXRUNTIME_INCLUDE_DIR}")
  endif()
endif()
