# The one table of instruction sets: file stem -> compiler flags. Every csrc/ops/*/<stem>.cpp and csrc/ceiling/<stem>.cpp
# is compiled with the flags of its row and with HALFBYTE_ISA=<stem>, and everything else for the plain baseline. A row
# whose flags the compiler does not know is left out of the build. A new instruction set is one row here (and one bit in
# core/kernel.h).
set(HALFBYTE_AVX2_FLAGS -mavx2 -mfma -mf16c -mbmi -mbmi2)
set(HALFBYTE_AVX512_FLAGS ${HALFBYTE_AVX2_FLAGS} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd)

set(HALFBYTE_ISAS scalar)
set(HALFBYTE_FLAGS_scalar "")  # HALFBYTE_PROBE_<isa>: an instruction that compiler and assembler must both know
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND HALFBYTE_ISAS avx2 avx_vnni avx512 avx512_vnni avx512_vbmi amx_int8)
  set(HALFBYTE_FLAGS_avx2 ${HALFBYTE_AVX2_FLAGS})
  set(HALFBYTE_FLAGS_avx_vnni ${HALFBYTE_AVX2_FLAGS} -mavxvnni)
  set(HALFBYTE_FLAGS_avx512 ${HALFBYTE_AVX512_FLAGS})
  set(HALFBYTE_FLAGS_avx512_vnni ${HALFBYTE_AVX512_FLAGS} -mavx512vnni)
  set(HALFBYTE_FLAGS_avx512_vbmi ${HALFBYTE_AVX512_FLAGS} -mavx512vnni -mavx512vbmi)
  set(HALFBYTE_FLAGS_amx_int8 ${HALFBYTE_AVX512_FLAGS} -mavx512vnni -mamx-tile -mamx-int8)
  set(HALFBYTE_PROBE_avx2 "vpaddd %ymm0, %ymm0, %ymm0")
  set(HALFBYTE_PROBE_avx_vnni "{vex} vpdpbusd %ymm0, %ymm0, %ymm0")
  set(HALFBYTE_PROBE_avx512 "vpaddd %zmm0, %zmm0, %zmm0")
  set(HALFBYTE_PROBE_avx512_vnni "vpdpbusd %zmm0, %zmm0, %zmm0")
  set(HALFBYTE_PROBE_avx512_vbmi "vpermb %zmm0, %zmm0, %zmm0")
  set(HALFBYTE_PROBE_amx_int8 "tdpbsud %tmm6, %tmm4, %tmm0")
endif()

include(CheckCXXSourceCompiles)

# halfbyte_add_isa_sources(target): adds the ISA files and defines HALFBYTE_<ISA>=1 for every row that can be built.
function(halfbyte_add_isa_sources target)
  foreach(isa IN LISTS HALFBYTE_ISAS)
    set(flags ${HALFBYTE_FLAGS_${isa}})
    if(flags)
      string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${flags}")
      check_cxx_source_compiles("int main() { asm(\"${HALFBYTE_PROBE_${isa}}\"); }" HALFBYTE_COMPILER_HAS_${isa})
      unset(CMAKE_REQUIRED_FLAGS)
      if(NOT HALFBYTE_COMPILER_HAS_${isa})
        message(WARNING "halfbyte: this compiler has no ${isa} (${flags}); its kernels are left out")
        continue()
      endif()
    endif()
    file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/ops/*/${isa}.cpp
         ${CMAKE_CURRENT_SOURCE_DIR}/csrc/ceiling/${isa}.cpp)
    set_source_files_properties(${sources} PROPERTIES COMPILE_OPTIONS "${flags}" COMPILE_DEFINITIONS HALFBYTE_ISA=${isa})
    target_sources(${target} PRIVATE ${sources})
    string(TOUPPER ${isa} upper)
    target_compile_definitions(${target} PUBLIC HALFBYTE_${upper}=1)
  endforeach()
endfunction()
