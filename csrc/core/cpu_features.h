// Which instruction sets this machine can run (CPU, operating system and permissions together), and which one the
// caller forces. Everything is expressed in Isa bits (core/kernel.h).
#pragma once
#include <span>
#include <string>

#include "core/kernel.h"

namespace halfbyte {

struct IsaInfo {
  const char* name;
  uint32_t bit;
  uint32_t closure;  // the bit itself and every instruction set that a machine with it also has
};

std::span<const IsaInfo> isas();               // of this architecture, weakest first
const IsaInfo& isa_info(const std::string&);   // throws std::invalid_argument, naming the known ones
uint32_t supported_isas();                     // detected once
uint32_t built_isas();                         // those that some kernel of this build is compiled for
uint32_t active_isas();                        // supported, cut down by force_isa() or HALFBYTE_ISA

// Forces an instruction set for the calling thread; an empty name ends that. Returns the previous name.
// Throws std::runtime_error when this machine lacks it.
std::string force_isa(const std::string& name);

}  // namespace halfbyte
