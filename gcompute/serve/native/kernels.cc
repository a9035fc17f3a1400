// All kernels as one translation unit: reading XLA's header takes the compiler longer than most of them.

#include "attention.cc"
#include "choices.cc"
#include "norms.cc"
#include "products.cc"
#include "stores.cc"
