// The random tests of core_test.cpp, one file each. They end the process at the first wrong answer.
#pragma once
#include <memory>
#include <optional>

#include "core/linear.h"
#include "operands.h"

namespace halfbyte::truth {

// A stored weight of random format and codes, and its pack.
struct Weight {
  Weight(Rng& rng, int n, int k);

  float group_scale_of(int j, int64_t g) const { return has_scale ? get(type, group_scale.data(), j * groups + g) : 1; }
  float minimum_of(int j, int64_t g) const { return get(type, minimum.data(), j * groups + g); }
  int zero_of(int j, int64_t g) const { return has_zero ? zero[j * groups + g] : 0; }
  bool per_token() const { return op->activation_bits == 8 && !activation_group; }
  bool plain() const { return op->weight_bits == 8 && per_token() && !group && !has_zero; }

  const int n, k;
  const LinearOp* op;
  int64_t group, activation_group, groups;
  int64_t fold;  // k of one integer sum
  bool nf4, has_scale, has_zero, has_minimum;
  DType type;
  std::vector<int16_t> codes;  // what the stored ones stand for, zero points apart
  Guarded<float> scale;
  Guarded<char> group_scale, minimum;
  Guarded<int8_t> zero;
  std::optional<PackedWeight> packed;
};

void test_linear(Rng& rng, const Weight& w, const std::string& isa, int m, int threads);
void test_linear_errors(Rng& rng);
void test_quantize_rows(Rng& rng, const std::string& isa);
void test_embedding(Rng& rng, const std::string& isa);
void test_attention(Rng& rng, const std::string& isa);
void test_stack(Rng& rng, const std::string& isa);
void test_sparse(Rng& rng, const std::string& isa);
void test_sparse_large(Rng& rng, const std::string& isa);
void test_sparse_concurrent(unsigned seed, const std::vector<std::string>& isas, int calls);
void test_sparse_errors(Rng& rng);

constexpr int sparse_formats = 11;
PackedWeight random_sparse(Rng& rng, int format, int64_t n, int64_t k);  // with random zeros, of one of the formats

}  // namespace halfbyte::truth
