// Memory of a call that the next call on the same thread uses again. It grows to the largest call and stays.
#pragma once
#include "core/packed_weight.h"

namespace halfbyte {

class Workspace {
 public:
  uint8_t* reserve(int64_t bytes) {
    if (buffer_.size() < bytes) {
      buffer_ = Buffer();  // first give back, then take
      buffer_ = Buffer(bytes);
    }
    return buffer_.data();
  }

 private:
  Buffer buffer_;
};

}  // namespace halfbyte
