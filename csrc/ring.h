// The algorithms behind collectives.h, as continuations over the messages of one exchange.
#pragma once

#include "ring_exchange.h"

namespace dora {

struct Reduction {
  DataType type;
  ReduceOp op;
};

// Each one starts its messages and returns. See collectives.h for the arguments.
//
// The order of operands is fixed: that of the team up to 64 KiB; beyond, segment s of every slice
// is ((x[s+1] op x[s+2]) op ...) op x[s], member numbers modulo the team size.
void allReduce(Exchange& exchange, void* data, std::size_t count, Reduction reduction,
               double share);
void reduceScatter(Exchange& exchange, const void* input, void* output, std::size_t count,
                   Reduction reduction);
void allGather(Exchange& exchange, const void* input, void* output, std::uint64_t num_bytes);
void broadcast(Exchange& exchange, void* data, std::uint64_t num_bytes, std::size_t root);
void barrier(Exchange& exchange);

}  // namespace dora
