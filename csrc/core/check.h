// Argument checks of the C++ core: a failed one throws std::invalid_argument (ValueError in Python) that says what
// was wrong, in which op, and what was expected.
#pragma once
#include <sstream>
#include <stdexcept>

namespace halfbyte {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace halfbyte
