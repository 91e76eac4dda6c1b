// y = x W^T + b, straight from packed weights. This is the place to start reading.
//
// The packed form of W [rows, cols] keeps its nonzeros and one bit for each weight:
//
//     W                      bitmask              values           row_ptr
//
//     a . . b . . c .        1 0 0 1 0 0 1 0      a b c d e f      0 3 4 6
//     . . . . d . . .        0 0 0 0 1 0 0 0
//     . e . . . . . f        0 1 0 0 0 0 0 1
//
// Row r has the values from row_ptr[r] up to row_ptr[r + 1], in the order of their columns. Column j
// is bit j % 8 of byte j / 8 of the row's bitmask. Rows are not padded and not of one length. Half of
// the weights being zero, that is 9 bits a weight for 16-bit values, and 5 for int8.
//
// Multiplying by one token takes about as long as reading the weight takes, so fewer bytes are less
// time. Multiplying by many is limited by arithmetic, and zeros save no arithmetic, because no CPU
// skips single lanes. Hence two algorithms, and both begin by expanding kStep weights at a time, from their
// values and bits to a register with zeros in their places:
//
//     few tokens (decode):    direct.h   each row is expanded in registers and multiplied at once
//     many tokens (prefill):  tiles.h    a part of some rows is expanded into the first-level
//                                        cache, and multiplied from there with all tokens
//                             amx_tiles.h    the same on AMX, whose registers are matrices
//
// An instruction set says from how many tokens on it takes tiles (17; int8 with AVX-512's VNNI: 8;
// AVX2: 5, as its registers hold the sums of no more than 4; AMX: 7, int8 9).
//
// A third way was tried and dropped: AVX-512 with tiles for any number of tokens above four. Decoding
// a few sequences then was 1.2 to 1.8 times slower at 6 and 8 tokens, because the tile is written and
// read once more and its reads from memory come in bursts. Reading one row at a time instead of four
// was dropped as well (57 to 65% of the memory's speed, against 71 to 83%), and so were tiles that are
// higher and narrower. LOG.md has the figures.
//
// The files, from the bottom up:
//
//     abi.h            what callers and library agree on: Job, and numbers for types and the like
//     isa.h            which instruction sets this CPU has
//     traits.h         what an instruction set brings
//     activations.h    x, converted or quantized to int8
//     packed_rows.h    reads rows of W, step by step and within bounds
//     direct.h, tiles.h, outputs.h    the algorithms, and what they end with
//     amx.h, amx_blocks.h, amx_tiles.h    AMX: its registers, activations for them, and the algorithm
//     run.h            picks one and shares out the rows between threads
//     experts.h, grouped.h, gate.h    a layer of a mixture's experts, each with its own tokens
//     sparse_linear_<isa>.cpp         the traits of one instruction set; compiled with its flags
//     sparse_linear.cpp               calls the one that a job names
//     linear.cpp, ort_operator.cpp    what Python and ONNX Runtime call
//     threads.h        the threads of what Python calls
//
// Another instruction set is another such file, its flags in CMakeLists.txt, its name in abi.h and
// abi.py, and how to tell that a CPU has it in isa.cpp.
//
// All that is compiled with an instruction set's flags lies in unnamed namespaces. Otherwise the
// linker could keep the AVX-512 copy of a function for a CPU that has no AVX-512.

#pragma once

#include "abi.h"

namespace besa {

// The product by the instruction set that the job names; returns a Status.
int sparse_linear(const Job& job);

int sparse_linear_portable(const Job& job);
#ifdef __x86_64__
int sparse_linear_avx2(const Job& job);
int sparse_linear_avx2_vnni(const Job& job);
int sparse_linear_avx512(const Job& job);
int sparse_linear_avx512_bf16(const Job& job);
int sparse_linear_avx512_dpbf16(const Job& job);
int sparse_linear_avx512_amx(const Job& job);
#elif defined(__aarch64__)
int sparse_linear_neon(const Job& job);
int sparse_linear_neon_dot(const Job& job);
int sparse_linear_neon_bf16(const Job& job);
#endif

}  // namespace besa
